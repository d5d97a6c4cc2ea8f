"""The page of a run: complete, the same each time, closed to everything outside it, and made of whatever there is."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo.runtime.errors import InputError
from mpo.tools import page, page_figures, page_svg
from mpo.tools.page_figures import column, smoothed, thinned
from mpo.tools.page_run import read_run, warnings_of
from mpo.tools.page_svg import Label

pytest.importorskip("matplotlib")

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'& $body ${title} \ud800 a_{$2$}"
INTERVAL = [0.5, 0.25, 0.75]


def write_stage(
    run: Path,
    name: str,
    script: str,
    flags: dict[str, Any] | None = None,
    results: dict[str, Any] | None = None,
    made_from: dict[str, tuple[str, dict[str, str]]] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    finished: bool = True,
) -> Path:
    """A stage's folder, as stage.py leaves it. `made_from`: input -> its path within the run, and its hashes."""
    folder = run / name
    folder.mkdir(parents=True)
    config = {"out": str(folder), "seed": 1, **(flags or {})}
    (folder / "stage.json").write_text(json.dumps(config))
    if metrics is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    inputs = {k: {"path": str(run / path), "sha256": sha} for k, (path, sha) in (made_from or {}).items()}
    manifest = {"stage": script, "config": config, "inputs": inputs, "results": results or {}, "seconds": 1234.5}
    manifest |= {"outputs": {"stage.json": "0", "model.safetensors": name * 20}, "peak_memory_mb": 98.7}
    if finished:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def model(name: str) -> tuple[str, dict[str, str]]:
    """The output of a stage that `write_stage` has written, as an input of another."""
    return name, {"model.safetensors": name * 20}


def write_ppo(run: Path, name: str, ref: str, **more: Any) -> Path:
    steps = [{"step": i, "score": 0.1 * i, "kl_exact": 0.05 * i, "length": 9, "eos_rate": 1} for i in range(4)]
    return write_stage(run, name, "train_ppo", {"prompts": "p"}, {}, {"ref": model(ref)}, steps, **more)


def write_eval(run: Path, policies: list[str], gold: bool, text: str = "Yes.") -> Path:
    """An evaluation of two prompts."""
    judges = ("gold", "reward") if gold else ("reward",)
    result: dict[str, Any] = {"words": 3.0, "eos_rate": 0.5, "distinct_1": 0.5, "distinct_2": 0.5, "reward": INTERVAL}
    for judge in judges:
        result |= {judge: INTERVAL, f"{judge}_win_sft_length_controlled": 0.5}
        result |= {f"{judge}_win_sft": INTERVAL, f"{judge}_win_chosen": INTERVAL}
    results = {name: result | ({} if name == "chosen" else {"kl": INTERVAL}) for name in (*policies, "chosen")}
    made_from = {name: model(name) for name in policies}
    folder = write_stage(run, "eval", "eval", {"temperature": 1.0}, {"prompts": 2}, made_from)
    (folder / "results.json").write_text(json.dumps({"prompts": 2, "policies": results}))
    for name in results:
        row = {
            "domain": text,
            "prompt": f"Human: {text}\n\nAssistant:",
            "response": f" {text}",
            "words": 3,
            "reward": 1.0,
        }
        row |= {"gold": 2.0} if gold else {}
        rows = [row, row | {"domain": "other", "finished": False}]
        (folder / f"responses-{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


class Reader(HTMLParser):
    """What a browser would see: elements with their attributes, and all text outside scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        self.text += "" if self.inside in ("script", "style") else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_closed(text: str) -> Reader:
    """Check that a page loads nothing and runs nothing but its own script, and that no id occurs twice."""
    read = Reader(text)
    policy = next(m["content"] for m in read.all("meta") if m.get("http-equiv") == "Content-Security-Policy") or ""
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';")
    assert len(scripts) == len(read.all("script")) == 1
    assert not {"link", "img", "iframe", "object", "embed", "base", "form", "image"} & {tag for tag, _ in read.elements}
    for tag, attributes in read.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "src"], tag
        assert all((attributes.get(name) or "#").startswith("#") for name in ("href", "xlink:href")), tag
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    return read


@pytest.fixture(scope="module")
def hh_page(hh_run) -> str:
    return page.make_page(hh_run)


def test_a_finished_run_has_every_section_and_the_same_bytes_each_time(hh_run, hh_page):
    read = check_closed(hh_page)
    assert [a["id"] for a in read.all("section")] == list(page.SECTIONS)
    assert hh_page == page.make_page(hh_run)
    # 2 win rates, 2 rewards against KL, lengths; 1 of PPO; 1 + 2 + 3 + 6 learning curves; 1 histogram
    assert len(read.all("figure")) == len(read.all("svg")) == 5 + 1 + 12 + 1
    assert len(read.all("article")) == 8
    for words in ("Task hh", "the built-in world", "DPO", "Entropy", "contradicted", "wrong kind", "peak memory"):
        assert words in read.text
    manifest = json.loads((hh_run / "mpo" / "manifest.json").read_text())
    assert manifest["outputs"]["model.safetensors"][:12] in read.text


def test_colours_come_from_the_page_in_light_and_dark(hh_page):
    drawings = "".join(re.findall(r"<svg.*?</svg>", hh_page, re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): ([^;\"()]*)", drawings)) == {"none", "var"}
    style = re.findall(r"<style>(.*?)</style>", hh_page, re.DOTALL)[0]
    for name in page_svg.VARIABLES.values():
        assert len(re.findall(rf"--{name}: #\w{{6}};", style)) == 2, name  # light and dark


def test_nothing_from_the_data_is_markup(tmp_path):
    run = tmp_path / "a<b>&run"
    write_stage(run, "sft", "train_sft", {"model": HOSTILE}, {"parameters": 5}, metrics=[{"step": 0, "loss": 1}])
    write_stage(run, "data", "prepare_data", {"task": HOSTILE}, {"source": HOSTILE})
    rm = write_stage(run, "rm", "train_rm", {}, {})
    probe = [{"kind": HOSTILE, "mistake": HOSTILE, "right_above": 0.5}]
    (rm / "probe.json").write_text(json.dumps(probe))
    write_stage(run, "<i>mpo", "train_ppo", {}, {"warnings": {"kl": HOSTILE}}, metrics=[{"score": 1, "kl_exact": 1}])
    write_eval(run, ["sft", "<u>$2$"], True, HOSTILE)
    text = page.make_page(run)
    page.write_text(tmp_path / "page.html", text)
    read = check_closed(text)
    assert {"i", "u", "b"}.isdisjoint(tag for tag, _ in read.elements)
    seen = HOSTILE.replace("\ud800", "?")
    assert read.text.count(seen) >= 3 + 2 * 6  # facts, the probe sheet's two, prompts and responses
    assert "<i>mpo" in read.text
    assert "<u>$2$" in read.text  # not as a formula, either


def test_a_run_without_gold_is_judged_by_the_reward_model(tmp_path):
    write_stage(tmp_path, "sft", "train_sft")
    write_ppo(tmp_path, "mpo", "sft")
    write_eval(tmp_path, ["sft", "mpo"], False)
    read = check_closed(page.make_page(tmp_path))
    assert "by the reward model, which flatters" in read.text
    assert "Gold reward against KL" not in read.text
    assert "gold" not in read.text.split("Samples side by side")[-1]
    assert [a["id"] for a in read.all("section")] == ["results", "ppo", "curves", "samples", "files"]


def test_an_unfinished_run_has_a_page_of_what_there_is(tmp_path):
    flags = {"data": str(tmp_path / "data"), "tokenizer": str(tmp_path / "tokenizer"), "model": "tiny"}
    write_stage(tmp_path, "data", "prepare_data", {"task": "hh"}, {"source": "builtin"})
    metrics = [{"step": i, "loss": None if i == 1 else 1.0} for i in range(3)]
    sft = write_stage(tmp_path, "sft", "train_sft", flags, metrics=metrics, finished=False)
    with (sft / "metrics.jsonl").open("a") as f:
        f.write('{"step": 3, "lo')  # the stage was killed while it wrote this
    stages = read_run(tmp_path)
    assert [(s.name, s.kind, s.parents) for s in stages] == [
        ("data", "prepare_data", []),
        ("sft", "train_sft", ["data"]),
    ]
    assert column(stages[1].metrics, "loss")[0].tolist() == [1, 3]  # without the loss that is not finite
    read = check_closed(page.make_page(tmp_path))
    assert "sft: unfinished after 3 steps; the same command goes on with it" in read.text
    assert "SFT (unfinished): Loss" in read.text
    assert [a["id"] for a in read.all("section")] == ["curves", "files"]


@pytest.mark.parametrize("kind", ["train_sft", "train_rm", "train_dpo", "train_ppo"])
@pytest.mark.parametrize("steps", [0, 1, 2, 1000])
def test_a_stage_of_any_length_can_be_drawn(tmp_path, kind, steps):
    names = [name for curve in page_figures.CURVES[kind] for name in curve.lines]
    metrics = [{"step": i, **dict.fromkeys(names, 0.5)} for i in range(steps)]
    write_stage(tmp_path, "one", kind, metrics=metrics)
    read = check_closed(page.make_page(tmp_path))
    drawn = 0 if steps == 0 else len(page_figures.CURVES[kind]) + (kind == "train_ppo")
    assert len(read.all("svg")) == drawn


def test_several_ppo_stages_reward_models_and_links_to_another_run(tmp_path):
    other, run = tmp_path / "first", tmp_path / "second"
    write_stage(other, "sft", "train_sft")
    run.mkdir()
    (run / "sft").symlink_to(other / "sft")
    for name in ("rm", "rm-2"):
        folder = write_stage(run, name, "train_rm", {}, {}, {"model": model("sft")})
        probe = [{"kind": "fact", "mistake": "wrong", "right_above": 0.75}]
        (folder / "probe.json").write_text(json.dumps(probe[: name == "rm-2" or 1]))
    write_ppo(run, "mpo", "sft")
    write_ppo(run, "ppo", "sft")
    assert [s.name for s in read_run(run)] == ["sft", "rm", "rm-2", "mpo", "ppo"]
    assert warnings_of(read_run(run)) == []
    text = page.make_page(run)
    read = check_closed(text)
    assert f"finished (in {other})" in read.text
    assert read.text.count("PPO: Length") == read.text.count("MPO: Length") == 1
    assert text.count('<table class="heat">') == 2
    figure = text.split('<section id="ppo">')[1].split("</section>")[0]
    assert {">MPO</text>", ">PPO</text>"} <= set(re.findall(r">\w+</text>", figure))


def test_signs_of_collapse_and_outdated_stages_are_warned_of(tmp_path):
    write_stage(tmp_path, "sft", "train_sft")
    collapsed = {"warnings": {"kl": "rollout 7: 12.0 nats per response"}}
    write_stage(tmp_path, "mpo", "train_ppo", {}, collapsed, {"ref": ("sft", {"model.safetensors": "another"})})
    assert warnings_of(read_run(tmp_path)) == [
        "mpo: rollout 7: 12.0 nats per response",
        "mpo: made from another sft than the one that is here (make verify says more)",
    ]
    assert "12.0 nats per response" in check_closed(page.make_page(tmp_path)).text


@pytest.mark.parametrize("by", ["gap", "uncertainty"])
def test_the_histogram_has_the_parts_of_the_split_and_the_threshold_of_a_split_by_gap(tmp_path, by):
    sizes = {"easy": 3, "hard": 2, "contradicted": 1, "pairs": 3, "prompts": 3}
    results = {"gamma": 0.5, "sizes": sizes, "share_gap_in_0_1": 0.5}
    folder = write_stage(tmp_path, "split", "split_data", {"by": by}, results)
    parts = ["easy"] * 3 + ["hard"] * 2 + ["contradicted"]
    rows = [{"chosen": 1.0, "rejected": 0.1 * i, "part": part} for i, part in enumerate(parts)]
    (folder / "scores.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = page.make_page(tmp_path)
    shown = re.findall(r">([^<>]+)</text>", text)
    assert {"easy 3", "hard 2", "contradicted 1"} <= set(shown)
    assert ("gamma 0.50" in shown) == (by == "gap")
    (folder / "scores.jsonl").write_text('{"chosen": 1}\n')
    with pytest.raises(InputError, match=r"scores\.jsonl:1: not the scores of a pair"):
        page.make_page(tmp_path)
    (folder / "scores.jsonl").unlink()
    assert 'id="split"' not in page.make_page(tmp_path)


def test_only_some_samples_are_shown_and_the_page_says_so(tmp_path, monkeypatch):
    write_stage(tmp_path, "sft", "train_sft")
    write_eval(tmp_path, ["sft"], True)
    monkeypatch.setattr(page, "MOST_SAMPLES", 1)
    read = check_closed(page.make_page(tmp_path))
    assert len(read.all("article")) == 1
    assert "1 of the 2 prompts, equally from every kind; every response is in eval/responses-*.jsonl." in read.text


def test_without_scripts_every_sample_can_be_read(hh_page):
    read = Reader(hh_page)
    assert not any("hidden" in attributes for attributes in read.all("article"))
    assert all("hidden" in a for a in read.all("div") if a.get("class") == "controls")  # they would do nothing


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine")
def test_in_a_browser_the_filter_and_the_search_choose_the_samples(tmp_path):
    write_stage(tmp_path, "sft", "train_sft")
    folder = write_eval(tmp_path, ["sft"], True)
    words = ["red apple", "green apple", "red pear", "blue plum"]
    rows = [{"domain": "ab"[i // 2], "prompt": "Which?", "response": w, "words": 2} for i, w in enumerate(words)]
    for name in ("sft", "chosen"):
        (folder / f"responses-{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = page.make_page(tmp_path)
    act = (
        'kind.value = "a"; search.value = "Red APPLE"; search.dispatchEvent(new Event("input"));'
        'document.title = samples.map((s) => +s.hidden).join("");'
    )
    acted = text.replace("  update();\n}", f"  update();\n{act}\n}}")
    assert acted != text
    (tmp_path / "page.html").write_text(re.sub(r"<meta http-equiv.*?>", "", acted))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--dump-dom",
    ]
    done = subprocess.run(
        [*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120, check=False
    )
    assert "<title>0111</title>" in done.stdout
    assert ">1 of 4 prompts</output>" in done.stdout
    (tmp_path / "page.html").write_text(text.replace("<body>", "<body><script>document.title = 'open'</script>"))
    done = subprocess.run(
        [*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120, check=False
    )
    assert ">4 of 4 prompts</output>" in done.stdout  # its own script runs
    assert "<title>open</title>" not in done.stdout  # and no other


def test_without_matplotlib_there_is_the_text_report_and_a_line_on_how_to_get_the_page(tmp_path, monkeypatch, capsys):
    write_stage(tmp_path, "sft", "train_sft")
    write_eval(tmp_path, ["sft"], True)
    (tmp_path / "eval" / "report.txt").write_text("the text report\n")
    monkeypatch.setattr(page_svg, "available", lambda: False)
    page.main([str(tmp_path)])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "the text report"
    assert last.startswith(f"With figures, for a browser: make report RUN={tmp_path} writes {tmp_path}/report.html.")
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(InputError, match="figures need matplotlib"):
        page_figures.main([str(tmp_path), str(tmp_path / "x.svg")])


def test_the_command_says_where_the_page_is(tmp_path, capsys):
    write_stage(tmp_path, "data", "prepare_data", {"task": "hh"}, {})
    page.main([str(tmp_path)])
    assert capsys.readouterr().out == f"With figures, for a browser: {tmp_path}/report.html\n"
    assert (tmp_path / "report.html").read_text() == page.make_page(tmp_path)
    with pytest.raises(InputError, match="contains no stage; name a run folder"):
        page.main([str(tmp_path / "data")])


def test_the_picture_of_the_readme_is_drawn_from_a_run(hh_run, tmp_path, capsys):
    file = tmp_path / "picture.svg"
    page_figures.main([str(hh_run), str(file)])
    assert capsys.readouterr().out == f"{file}\n"
    drawing = file.read_text()
    assert drawing.count('id="axes_') == 3
    assert "var(--" not in drawing  # a file of its own has no page to take colours from
    page_figures.main([str(hh_run), str(file)])
    assert file.read_text() == drawing
    for words in (["only-one"], ["a", "b", "c"], ["-x", "b"]):
        with pytest.raises(InputError, match="usage: python -m"):
            page_figures.main(words)


def test_smoothing_keeps_a_constant_and_the_mean_of_a_window():
    assert smoothed(np.full(9, 2.0)).tolist() == [2.0] * 9
    # 80 values: a window of two on each side (80 // 40), but never fewer than three on each side
    values = np.arange(80.0)
    assert smoothed(values)[40] == pytest.approx(40)
    assert smoothed(values)[0] == pytest.approx((0 + 1 + 2 + 3) / 4)
    assert thinned(np.arange(800.0)).tolist()[:2] == [0.5, 2.5]  # 400 pieces of two
    assert thinned(np.arange(3.0)).tolist() == [0, 1, 2]


def test_labels_of_lines_that_end_together_do_not_cover_each_other():
    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1])
        axes.set_xlim(0, 2)
        page_svg.write_labels(axes, [Label(name, 1, 1.0, page_svg.INK) for name in ("one", "two", "three")])

    drawing = page_svg.svg(draw)
    places = re.findall(r'x="([\d.]+)" y="([\d.]+)"[^>]*>(?:one|two|three)</text>', drawing)
    assert len(places) == 3
    for (x, y), (other_x, other_y) in itertools.combinations([(float(x), float(y)) for x, y in places], 2):
        assert abs(y - other_y) >= page_svg.SIZE or abs(x - other_x) >= 5 * 0.5 * page_svg.SIZE
