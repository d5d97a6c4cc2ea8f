"""The examples of docs/extending.md, run as they stand there."""

from __future__ import annotations

import math
import re

import pytest

from mpo.config import PPOConfig
from mpo.model.checkpoint import load_model
from mpo.ppo import equations
from mpo.ppo.rewards import assign_credit
from mpo.runtime.files import read_json
from tests.ppo.test_rewards import FLAGS, rollout_of
from tests.support.scripts import ROOT, run_script

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def example(heading: str) -> str:
    """The Python code below a heading of the page."""
    return re.search(rf"## {heading}\n.*?```python\n(.*?)```", PAGE, re.DOTALL)[1]


def test_an_estimator_is_a_function_and_a_line(monkeypatch):
    monkeypatch.setattr(equations, "CRITIC_FREE", dict(equations.CRITIC_FREE))
    monkeypatch.setattr("mpo.ppo.rewards.CRITIC_FREE", equations.CRITIC_FREE)
    exec(compile(example("An advantage estimator"), "docs/extending.md", "exec"), {})
    rollout = rollout_of(critic=False)
    credit = assign_credit(rollout, 0.3, PPOConfig(**FLAGS, advantage="best_of_group", group=2))
    returns = credit.rewards.sum(1).tolist()
    best = [max(returns[:2])] * 2 + [max(returns[2:])] * 2
    for b in range(4):
        expected = [returns[b] - best[b]] * int(rollout.mask[b].sum())
        assert credit.loss_advantages[b][rollout.mask[b]].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def script(tmp_path):
    """The page's stage as a file of its own, outside the project."""
    path = tmp_path / "perplexity.py"
    path.write_text(f"import sys\n\nsys.path.insert(0, {str(ROOT)!r})\n{example('A stage')}")
    return path


def test_a_stage_is_one_file(script, hh_run, tmp_path):
    flags = ("--data", hh_run / "data" / "test.jsonl", "--model", hh_run / "sft", "--out", tmp_path / "out")
    done = run_script(script, *flags)
    assert "out: perplexity " in done.stdout
    result = read_json(tmp_path / "out" / "manifest.json")["results"]["perplexity"]
    loss = read_json(hh_run / "sft" / "manifest.json")["results"]["held_out_loss"]  # of the same rows
    assert result == pytest.approx(math.exp(loss), rel=1e-4)
    assert "rows computed at once" in run_script(script, "--help").stdout
    done = run_script(script, "--data", "nowhere", *flags[2:4], "--out", tmp_path / "other", expect=2)
    assert done.stderr.startswith("perplexity.py: error: --data nowhere: no such file or folder")


def test_its_memory_plan_is_a_line(script, hh_run, tmp_path):
    flags = ("--data", hh_run / "data" / "test.jsonl", "--model", hh_run / "sft", "--out", tmp_path / "out")
    done = run_script(script, *flags, "--plan", "true")
    size = sum(p.numel() for p in load_model(hh_run / "sft").parameters())
    assert f"{size / 1e6:,.1f} M parameters" in done.stdout
    assert not (tmp_path / "out").exists()


def test_without_that_line_the_plan_is_refused_in_one_line(script, hh_run, tmp_path):
    flags = ("--data", hh_run / "data" / "test.jsonl", "--model", hh_run / "sft", "--out", tmp_path / "out")
    text = script.read_text()
    for old, new in (
        ("memory_loads.LOADS[PerplexityConfig] = load\n", ""),
        ("run(main, PerplexityConfig, plan=memory.show)", "run(main, PerplexityConfig)"),
    ):
        text = text.replace(old, new)
        script.write_text(text)
        done = run_script(script, *flags, "--plan", "true", expect=2)
        assert done.stderr.splitlines()[-1].startswith("perplexity.py: error: --plan: ")
        assert "Traceback" not in done.stderr


def test_every_place_that_the_page_names_exists():
    names = re.findall(r"`(?:memory\.|kernels\.)?([A-Za-z_]+)`", PAGE)
    code = "\n".join(p.read_text(encoding="utf-8") for room in ("mpo", "kernels") for p in (ROOT / room).rglob("*.py"))
    flags = {"q_proj", "k_proj", "v_proj", "impl", "advantage", "model_type", "main", "run"}
    assert [name for name in names if name not in flags and not re.search(rf"\b{name}\b", code)] == []
