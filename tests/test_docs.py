"""What the documentation says is what the code does."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

import train_dpo
from mpo.config import DPOConfig
from mpo.data.batches import encode
from mpo.data.rows import Row, write_rows
from mpo.data.tokenizer import load_tokenizer
from mpo.model.checkpoint import load_scalar, save_model
from mpo.model.scoring import score_all
from mpo.preference import losses
from mpo.preference.losses import PREFERENCE_LOSSES
from mpo.runtime.files import read_json
from mpo.runtime.flags import parse
from mpo.world import hh
from mpo.world.build import ANNOTATORS, NEAR, build
from mpo.world.gold import BEST, WORST
from tests.conftest import small_model
from tests.support.scripts import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert missing == []


def test_the_world_page_gives_the_annotators_numbers():
    page = (ROOT / "docs" / "world.md").read_text()
    for name, a in ANNOTATORS.items():
        assert f"| {name} | {a.slope:g} | {a.careless:g} | {a.glaring:g} | {NEAR[name]:g} |" in page
    assert f"scores {BEST}, whatever the kind of prompt, and no answer scores less than {WORST:g}" in page


def test_the_world_page_names_every_term_of_the_gold_reward():
    from mpo.world.gold import gold_terms

    page = (ROOT / "docs" / "world.md").read_text()
    prompts = ["\n\nHuman: How can I steal a bike?\n\nAssistant:", "\n\nHuman: I lost my wallet.\n\nAssistant:"]
    prompts += ["\n\nHuman: How can I cook rice?\n\nAssistant:", "\n\nHuman: What color is grass?\n\nAssistant:"]
    for prompt in prompts:
        assert hh.understand(prompt).kind in hh.KINDS
        for term in gold_terms(prompt, "Hm."):
            assert term in page or {"rudeness": "rude"}.get(term, "?") in page, term


def test_every_make_variable_in_the_docs_exists():
    makefile = (ROOT / "Makefile").read_text()
    page = (ROOT / "docs" / "pipeline.md").read_text()
    for name in re.findall(r"`([A-Z]+(?:_FLAGS)?)(?:=1)?`", page):
        assert re.search(rf"\b{name}\b", makefile), name


def test_the_losses_page_names_every_loss_with_its_constants():
    page = (ROOT / "docs" / "losses.md").read_text()
    for name, loss in PREFERENCE_LOSSES.items():
        constants = [p for p in inspect.signature(loss).parameters.values() if p.name not in ("pairs", "beta")]
        row = re.search(rf"^\| {name} \|.*$", page, re.MULTILINE)
        assert row, name
        for constant in constants:
            assert f"{constant.name}={constant.default:g}" in row[0], name


def test_the_example_of_a_reward_model_in_transformers_gives_our_scores(hh_run):
    """The page's example, run as written, on another folder."""
    pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    page = (ROOT / "docs" / "models.md").read_text()
    example = re.search(r"### Ours elsewhere.*?```python\n(.*?)```", page, re.DOTALL)[1]
    names: dict[str, object] = {}
    exec(compile(example.replace("runs/hh/rm", str(hh_run / "rm")), "docs/models.md", "exec"), names)
    row = Row("x", names["prompt"], *names["responses"])
    pairs, _ = encode([row], load_tokenizer(hh_run / "rm"), 384, 128)
    ours = torch.cat(score_all(load_scalar(hh_run / "rm", centred=False), pairs, 1))
    torch.testing.assert_close(names["scores"].detach(), ours, rtol=0, atol=1e-4)


def test_your_own_loss_in_five_lines(tmp_path, monkeypatch, tokenizer):
    """The page's example, run as written: registered, parsed with a constant and a sum, trained with."""
    page = (ROOT / "docs" / "losses.md").read_text()
    example = re.search(r"## Add your own loss in five lines.*?```python\n(.*?)```", page, re.DOTALL)[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 5
    monkeypatch.setattr("mpo.preference.losses.PREFERENCE_LOSSES", dict(PREFERENCE_LOSSES))
    monkeypatch.setattr("mpo.preference.objective.PREFERENCE_LOSSES", losses.PREFERENCE_LOSSES)
    exec(compile(example, "docs/losses.md", "exec"), {})
    model = small_model(vocab_size=tokenizer.size, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    save_model(tmp_path / "model", model)
    tokenizer.save(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", build("hh", seed=3, train=16, test=4)["train"])
    flags = {"data": tmp_path / "rows.jsonl", "model": tmp_path / "model", "out": tmp_path / "out"}
    flags |= {"loss": "anchored:weight=0.2+0.1*sft", "batch": 4, "microbatch": 4, "lr": 1e-2}
    train_dpo.main(parse(DPOConfig, [f"--{name}={value}" for name, value in flags.items()]))
    results = read_json(tmp_path / "out" / "manifest.json")["results"]
    assert results["steps"] == 3
    # log-ratios are 0 before the first step: ln 2, no penalty, and a tenth of a likelihood above 0
    assert results["first_loss"] > 0.6931
