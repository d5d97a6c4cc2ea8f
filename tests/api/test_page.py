"""docs/library.md: its five snippets run as they stand there, one after the other, on a small run."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
import torch

import mpo
from mpo.__main__ import COMMANDS
from tests.support.scripts import ROOT

PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"## (\d)\..*?\n```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def shown(hh_run, tmp_path_factory):
    """What a notebook would show below each snippet: the values of its expressions. The last entry: all names."""
    losses, threads = dict(mpo.losses.PREFERENCE_LOSSES), torch.get_num_threads()
    names, values = {}, []
    folder = tmp_path_factory.mktemp("page")
    for number, snippet in SNIPPETS:
        code = snippet.replace('"runs/hh/', f'"{hh_run}/').replace('"runs/mine/', f'"{folder}/')
        cell = []
        for statement in ast.parse(code, f"docs/library.md, {number}").body:
            if isinstance(statement, ast.Expr):
                cell.append(eval(compile(ast.Expression(statement.value), "docs/library.md", "eval"), names))
            else:
                exec(compile(ast.Module([statement], []), "docs/library.md", "exec"), names)
        values.append(cell)
    yield [*values, names]
    mpo.losses.PREFERENCE_LOSSES.clear()
    mpo.losses.PREFERENCE_LOSSES.update(losses)
    assert torch.get_num_threads() == threads


def test_there_are_five_of_a_few_lines():
    assert [number for number, _ in SNIPPETS] == ["1", "2", "3", "4", "5"]
    assert all(len([line for line in snippet.splitlines() if line.strip()]) <= 7 for _, snippet in SNIPPETS)


def test_a_model_is_asked(shown):
    one, several = shown[0]
    assert isinstance(one, str)
    assert [type(answer) for answer in several] == [str, str]


def test_scores_and_tokens_are_shown(shown):
    scores, tokens = shown[1]
    assert len(scores) == 2
    assert [t.token for t in tokens][-1] == "</s>"
    assert all(t.kl >= -1e-6 for t in tokens)
    assert repr(tokens).startswith("| token")


def test_losses_and_the_split_are_shown(shown):
    (sigmoid, ipo), split = shown[2]
    logps = shown[-1]["logps"]
    assert sigmoid.tolist() == pytest.approx(torch.log1p(torch.exp(-0.5 * logps.D)).tolist(), rel=1e-5)
    assert ipo.tolist() == pytest.approx(((logps.D - 1) ** 2).tolist(), rel=1e-5)
    assert sorted(split.easy + split.hard + split.contradicted) == [0, 1]


def test_rewards_become_advantages(shown):
    (advantages,), names = shown[3], shown[-1]
    kl, score = names["kl"][0].tolist(), names["rm"].score(names["question"], names["answer"])
    assert names["rewards"][0].tolist() == pytest.approx(
        [-0.05 * k for k in kl[:-1]] + [score - 0.05 * kl[-1]], abs=1e-5
    )
    assert advantages[0, -1].item() == pytest.approx(names["rewards"][0, -1].item())


def test_a_loss_of_ones_own_is_trained_with(shown):
    mine, policy = shown[-1]["mine"], shown[-1]["policy"]
    assert mine.results["steps"] == 1
    assert mine.logp("Hi", "Yes") != policy.logp("Hi", "Yes")


def test_every_name_of_the_table_exists_with_these_parameters():
    homes = {"policy": mpo.Policy, "rm": mpo.RewardModel, "mpo": mpo}
    rows = re.findall(r"^\| `(mpo|policy|rm)\.(\w+)\((.*?)\)`", PAGE, re.MULTILINE)
    assert len(rows) >= 9
    for home, name, parameters in rows:
        known = [p for p in inspect.signature(getattr(homes[home], name)).parameters if p != "self"]
        asked = [p.strip(" *") for p in parameters.split(",")]
        assert set(asked) <= set(known), name
    assert not {"load", "train", "losses", "equations", "split_by_gap", "InputError", "RunError"} - set(mpo.__all__)


def test_the_page_names_every_command():
    assert [name for name in COMMANDS if f"`{name}`" not in PAGE] == []
