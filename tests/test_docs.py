"""What the documentation says is what the code does."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

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

sys.path.insert(0, str(ROOT / "docs" / "site"))
from doors import doors

INDEX = ROOT / "docs" / "index.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def prose(page: Path) -> str:
    """The text of a page without its blocks of code, in which nothing is a link or a heading."""
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2`*~* *$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<=\n\n)( {4}.*\n|\n)+", "", text)


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead within the repository."""
    text = re.sub(r"(`+).+?\1", "code", prose(page), flags=re.DOTALL)
    targets = re.findall(r"\]\(\s*([^)\s]+)[^)]*\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    names: list[str] = []
    for title in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        names.append(f"{name}-{names.count(name)}" if name in names else name)
    return set(names)


def test_the_anchors_are_github_s(tmp_path):
    page = tmp_path / "page.md"
    lines = [
        "# A `make` goal: [what](x.md) it's",
        "## Two  words-here",
        "",
        "```sh",
        "# no heading",
        "```",
        "",
        "    # nor this",
    ]
    page.write_text("\n".join([*lines, "", "## The end", "### The end", ""]))
    assert anchors(page) == {"a-make-goal-what-its", "two--words-here", "the-end", "the-end-1"}


def test_links_are_read_from_the_text_and_not_from_code(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "A [b](c.md#d), [`e`](\nf.py), `g[0](h)`, ![i](j.png), [k](https://l.m).\n\n    n[0](o)\n\n[p](#q)\n"
    )
    assert links(page) == ["c.md#d", "f.py", "j.png", "#q"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link
        elif anchor:  # a line of a file, or several: #L12, #L12-L15
            assert re.fullmatch(r"L\d+(-L\d+)?", anchor), link
            assert int(anchor.rpartition("L")[2]) <= len(target.read_text().splitlines()), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_page_begins_with_its_only_title(page):
    assert page.read_text().startswith("# ")
    assert len(re.findall(r"^# ", prose(page), re.MULTILINE)) == 1


def test_every_page_is_behind_exactly_one_door():
    """The list in docs/index.md is the navigation of the site. A new page needs a line there."""
    listed = [(ROOT / "docs" / path).resolve() for _, pages in doors(INDEX.read_text()) for _, path in pages]
    assert sorted(listed) == sorted(page for page in PAGES if page != INDEX)


def test_the_index_has_four_doors_and_the_readme_links_each():
    names = [name for name, _ in doors(INDEX.read_text()) if name]
    assert names == ["Learn", "Use", "Evidence", "Inside"]
    assert {f"docs/index.md#{name.lower()}" for name in names} <= set(links(ROOT / "README.md"))


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
