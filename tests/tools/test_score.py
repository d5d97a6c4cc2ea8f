"""The command that scores a file of pairs: its numbers, its sections, what it writes, and how it goes on."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from mpo.config import ScoreConfig
from mpo.data.formats import read_file
from mpo.data.rows import write_rows
from mpo.kernels.functions import Packing
from mpo.model.checkpoint import load_scalar, save_model
from mpo.model.llama import scalar_from
from mpo.runtime.errors import InputError, Interrupted
from mpo.runtime.files import read_json
from mpo.runtime.flags import parse
from mpo.runtime.seeding import generator
from mpo.tools import score
from mpo.tools.score import SECTIONS, by_category, report_of
from mpo.world.build import build
from tests.conftest import small_model
from tests.support.makefile import make
from tests.support.scripts import run_script


@pytest.fixture(scope="module")
def rm(tmp_path_factory, tokenizer):
    """A reward model whose scores have a mean and a scale."""
    folder = tmp_path_factory.mktemp("score") / "rm"
    model = scalar_from(small_model(vocab_size=tokenizer.size, max_position_embeddings=400), generator(1, "head"))
    model.score_mean += 2.0
    model.score_std *= 0.5
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Rows of the built-in world, which have domains."""
    path = tmp_path_factory.mktemp("score") / "pairs.jsonl"
    write_rows(path, build("hh", seed=5, train=20, test=4)["train"])
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(out, rm, data, *more):
    score.main(parse(ScoreConfig, ["--out", str(out), "--rm", str(rm), "--data", str(data), "--threads", "1", *more]))
    return read_json(out / "manifest.json")["results"]


def benchmark(path, subsets):
    """A file in RewardBench's layout, with so many rows of each subset."""
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {name}.", "rejected": "I do not know."}
        | {"chosen_model": "one", "rejected_model": "two", "subset": name, "id": i}
        for name, n in subsets.items()
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_are_those_of_the_texts_as_transformers_gives_them(tmp_path, rm, pairs, tokenizer):
    results = run(tmp_path / "out", rm, pairs)
    model, rows = load_scalar(rm), {row["id"]: row for row in lines_of(pairs)}
    scored = lines_of(tmp_path / "out" / "scores.jsonl")
    assert [row["id"] for row in scored] == list(rows)
    right = dict[str, list[float]]()
    for row in scored:
        texts = rows[row["id"]]
        for name in ("chosen", "rejected"):
            ids = [tokenizer.bos, *tokenizer.vocabulary.encode(texts["prompt"])]
            ids += [*tokenizer.vocabulary.encode(texts[name]), tokenizer.eos]
            centred = model(torch.tensor(ids), Packing([len(ids)]))[-1].item()
            assert row[name] == pytest.approx(centred + 2.0 / 0.5, abs=1e-4)  # the mean, in units of the scale
        right.setdefault(texts["domain"], []).append(float(row["chosen"] > row["rejected"]))
        assert row["domain"] == texts["domain"]
    assert len(right) > 1
    for domain, values in right.items():
        line = results["categories"][domain]
        assert (line["pairs"], line["ties"]) == (len(values), 0)
        assert line["accuracy"][0] == pytest.approx(sum(values) / len(values))
    everything = [value for values in right.values() for value in values]
    assert results["categories"]["all"]["accuracy"][0] == pytest.approx(sum(everything) / 20)
    assert results["rows"] == {"kept": 20}


def test_a_subset_of_own_rows_is_a_category_and_one_category_needs_no_line(tmp_path, rm):
    rows = [{"prompt": "Hi", "chosen": f"Yes {i}", "rejected": "No", "subset": "ab"[i % 2]} for i in range(4)]
    for n, names in ((4, ["a", "b", "all"]), (1, ["all"])):
        path = tmp_path / f"{n}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:n]))
        assert list(run(tmp_path / f"out{n}", rm, path)["categories"]) == names


# --- RewardBench -----------------------------------------------------------------------------------


def test_the_sections_have_the_sizes_of_the_paper():
    """2403.13787, table 1; Reasoning has 447 pairs of math-prm, which count as 984."""
    sizes = {section: sum(weights.values()) for section, weights in SECTIONS.items()}
    assert sizes == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1431 - 447 + 984}


def test_a_section_weighs_its_subsets_and_the_score_is_the_mean_of_the_sections():
    domains = ["math-prm"] * 4 + ["hep-go"] * 2 + ["mt-bench-easy", "alpacaeval-easy", "unheard-of"]
    won = np.array([1, 1, 1, 0, 0, 0.5, 1, 0, 1])
    lines = by_category(domains, won, 1, sections=True)
    names = ["Chat", "- alpacaeval-easy", "- mt-bench-easy", "Reasoning", "- math-prm", "- hep-go", "RewardBench"]
    assert list(lines) == [*names, "unheard-of"]
    chat, reasoning = (100 * 0 + 28 * 1) / 128, (984 * 0.75 + 164 * 0.25) / (984 + 164)
    for name, expected in (("Chat", chat), ("Reasoning", reasoning), ("RewardBench", (chat + reasoning) / 2)):
        assert lines[name].value == pytest.approx(expected)
    assert (lines["Reasoning"].pairs, lines["Reasoning"].ties, lines["RewardBench"].pairs) == (6, 1, 8)
    assert lines["Chat"].interval == pytest.approx((chat, chat, chat))  # one pair of each subset: nothing to resample
    value, low, high = lines["- math-prm"].interval
    assert (value, low, high) == (0.75, 0.25, 1.0)  # P(1 of 4) is 4.7 %, P(none) 0.4 %


def test_an_interval_has_the_width_of_the_normal_approximation():
    won = np.arange(3000) % 4 > 0
    _, low, high = by_category([""] * 3000, won.astype(float), 1, sections=False)["all"].interval
    width = 1.96 * math.sqrt(0.75 * 0.25 / 3000)
    assert (low, high) == pytest.approx((0.75 - width, 0.75 + width), abs=0.003)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_file_of_rewardbench_is_read_in_every_form(tmp_path, rm, kind):
    subsets = {"alpacaeval-easy": 3, "llmbar-natural": 2, "donotanswer": 2, "math-prm": 2, "hep-rust": 1}
    path = benchmark(tmp_path / "filtered.jsonl", subsets)
    items = lines_of(path)
    if kind == "json":
        (tmp_path / "filtered.json").write_text(json.dumps(items))
    if kind == "csv":
        rows = [",".join(items[0]), *(",".join(f'"{value}"' for value in item.values()) for item in items)]
        (tmp_path / "filtered.csv").write_text("\n".join(rows))
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.Table.from_pylist(items), tmp_path / "filtered.parquet"
        )
    results = run(tmp_path / "out", rm, tmp_path / f"filtered.{kind}")
    assert results["format"] == "RewardBench pairs"
    assert {name: line["pairs"] for name, line in results["categories"].items() if name[0] != "-"} == {
        "Chat": 3,
        "Chat Hard": 2,
        "Safety": 2,
        "Reasoning": 3,
        "RewardBench": 10,
    }
    report = (tmp_path / "out" / "report.txt").read_text()
    assert "math-prm counts as much as all six subsets about code" in report
    assert "| - alpacaeval-easy | 3     |" in report


def test_rows_that_do_not_fit_are_counted_and_the_rest_is_scored(tmp_path, rm):
    path = benchmark(tmp_path / "filtered.jsonl", {"donotanswer": 2})
    more = lines_of(path)[0]
    with path.open("a") as file:
        file.write(json.dumps(more | {"chosen": "word " * 350}) + "\n")  # two lengths that fit apart, not together
        file.write(json.dumps(more | {"prompt": "word " * 350}) + "\n")
        file.write(json.dumps(more | {"rejected": more["chosen"]}) + "\n")
    rows = run(tmp_path / "out", rm, path)["rows"]
    assert rows.pop("kept") == 2
    assert rows.pop("dropped: same response twice") == 1
    assert rows == {"dropped: longer than the 400 tokens that the model takes": 2}
    only = tmp_path / "only.jsonl"
    only.write_text(json.dumps(more | {"rejected": more["chosen"]}) + "\n")
    with pytest.raises(InputError, match=r"no row makes a pair \(1 same response twice\)"):
        run(tmp_path / "none", rm, only)
    only.write_text(json.dumps(more | {"chosen": "word " * 900}) + "\n")
    with pytest.raises(InputError, match=r"none of the rows fits \(1 dropped: longer than the 400 tokens"):
        run(tmp_path / "none", rm, only)


# --- as the other stages ---------------------------------------------------------------------------


def test_a_finished_run_prints_its_table_again_and_other_inputs_are_refused(tmp_path, rm, pairs):
    words = ("-m", "mpo.tools.score", "--out", tmp_path / "out", "--rm", rm, "--threads", 1, "--data")
    first = run_script(*words, pairs).stdout
    again = run_script(*words, pairs).stdout
    report = (tmp_path / "out" / "report.txt").read_text()
    assert report in first
    assert again == report + f"{tmp_path / 'out'}: is finished, with these flags and inputs\n"
    other = benchmark(tmp_path / "other.jsonl", {"donotanswer": 2})
    message = run_script(*words, other, expect=2).stderr
    assert "holds a finished stage, but the content of its input data has changed" in message
    assert (tmp_path / "out" / "report.txt").read_text() == report


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, rm, pairs, monkeypatch):
    run(tmp_path / "whole", rm, pairs, "--microbatch", "4")
    monkeypatch.setattr(score, "SAVE_EVERY", 0.0)
    original, calls = score.score_all, []

    def stopping(model, part, batch):
        calls.append([pair.row.id for pair in part])
        if len(calls) == 4:
            raise Interrupted(15, "")
        return original(model, part, batch)

    monkeypatch.setattr(score, "score_all", stopping)
    with pytest.raises(Interrupted):
        run(tmp_path / "out", rm, pairs, "--microbatch", "4")
    with pytest.raises(InputError, match="holds the saves of an unfinished stage, but --seed was 1 and is now 2"):
        run(tmp_path / "out", rm, pairs, "--seed", "2")
    run(tmp_path / "out", rm, pairs, "--microbatch", "4")
    assert [ids[0] for ids in calls[3:]] == [calls[3][0]] * 2 + [calls[5][0]]
    assert sum(map(len, calls)) == 20 + 4
    assert not (tmp_path / "out" / "saves").exists()
    whole, resumed = (lines_of(tmp_path / name / "scores.jsonl") for name in ("whole", "out"))
    assert whole == resumed


def test_damaged_saves_are_not_used(tmp_path):
    path = tmp_path / "about.json"
    for content in ("{", "[]", '{"scores": [[1]]}', '{"scores": [1]}', '{"scores": [["x", 1]]}', '{"x": 1}'):
        path.write_text(content)
        assert score.earlier_scores(path, 9) == []
    path.write_text('{"scores": [[1, 2.5], [3, 4]]}')
    assert score.earlier_scores(path, 9) == [[1.0, 2.5], [3.0, 4.0]]
    assert score.earlier_scores(path, 1) == []


def test_a_score_that_is_not_finite_is_refused_with_its_row(tmp_path, rm, pairs, monkeypatch):
    nan = torch.tensor([0.0, float("nan")])
    monkeypatch.setattr(score, "score_all", lambda model, part, batch: (nan[: len(part)], nan[: len(part)]))
    with pytest.raises(InputError, match=rf"{pairs}:2: the reward model's score is not a finite number"):
        run(tmp_path / "out", rm, pairs, "--microbatch", "2")


def test_ties_count_as_half_and_are_shown():
    report = report_of(by_category(["a", "a"], np.array([0.5, 1.0]), 1, sections=False), "x", False)
    assert "| all      | 2     | 75 [50, 100] | 1    |" in report
    assert "A tie counts as half" in report


@pytest.mark.parametrize(
    ("words", "rm", "data", "out"),
    [
        (["RUN=runs/x"], "runs/x/rm", "runs/x/data/test.jsonl", "runs/scores/runs-x-rm/runs-x-data-test.jsonl"),
        (["RM=a/b", "DATA=my pairs.csv"], "a/b", "'my pairs.csv'", "'runs/scores/a-b/my pairs.csv'"),
        (["RM=a", "DATA=p.json", "OUT=o", "SHARD=1"], "a", "p.json --shard true", "o"),
    ],
)
def test_make_names_a_folder_after_reward_model_and_file_and_takes_the_runs_own_without_them(words, rm, data, out):
    done = make("-n", "score", *words)
    *_, command = done.stdout.strip().splitlines()
    assert command.endswith(f"-m mpo.tools.score --out {out} --seed 1 --rm {rm} --data {data}")


def test_the_format_keeps_no_id_since_prompts_repeat(tmp_path):
    path = benchmark(tmp_path / "filtered.jsonl", {"hep-go": 1, "hep-js": 1})
    _, rows = read_file(path, Counter())
    assert [(row.id, row.domain) for row in rows] == [("filtered-0", "hep-go"), ("filtered-1", "hep-js")]
