"""The benchmarks: every case of ours runs, operations are counted correctly, and the page shows every result."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import real, run, scaling, stages
from benchmarks import workload as w
from benchmarks.run import RowsConfig, Worker
from mpo.runtime.files import write_json

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def test_every_case_runs_two_steps():
    code = (
        "from benchmarks import workload as w\n"
        f"w.SHAPE.update({SMALL}); w.PROMPT, w.RESPONSE, w.PAIRS, w.ROLLOUT = 6, 4, 2, 3\n"
        "from benchmarks.ours import CASES\n"
        "for case in CASES.values(): step = case(); step(); step()\n"
        "print(list(CASES))"
    )  # in a separate process, since turns.py redirects standard output
    done = subprocess.run([sys.executable, "-c", code], cwd=run.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {c.ours.removesuffix("-bf16") for c in run.CONTESTS} <= set(
        json.loads(done.stderr.strip().splitlines()[-1].replace("'", '"'))
    )


def test_the_responses_of_a_pair_end_in_eos_and_have_the_stated_length():
    for row in w.pairs(3):
        assert len(row["prompt"]) == w.PROMPT
        assert len(row["chosen"]) == len(row["rejected"]) == w.RESPONSE
        assert row["chosen"][-1] == row["rejected"][-1] == w.SHAPE["eos_token_id"]


def test_every_case_runs_with_adapters_and_trains_nothing_else():
    code = (
        "from benchmarks import workload as w\n"
        f"w.SHAPE.update({SMALL}); w.PROMPT, w.RESPONSE, w.PAIRS, w.ROLLOUT, w.LORA = 6, 4, 2, 3, 2\n"
        "from benchmarks import ours\n"
        "for case in ('sft', 'dpo-best', 'reward', 'ppo'): ours.CASES[case]()()\n"
        "print([n for n, p in ours.to_train(ours.model(0)).named_parameters() if p.requires_grad and 'lora' not in n])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=run.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_a_measurement_that_was_stopped_goes_on_with_the_rows_that_are_missing(tmp_path, monkeypatch):
    asked = list[str]()

    def measure(name, config):
        asked.append(name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"this project": {"seconds": 1.0, "step_mib": 1.0}, "machine": "M", "commit": "C"}

    monkeypatch.setattr(real, "measure", measure)
    monkeypatch.setattr(real, "write_page", lambda path, bench: None)
    config = RowsConfig(out=str(tmp_path / "bench.json"), only="LoRA")
    with pytest.raises(KeyboardInterrupt):
        real.main(config)
    real.main(config)
    assert asked == ["SFT, LoRA", "RM, LoRA", "DPO, LoRA", "DPO, LoRA", "PPO, LoRA"]
    assert list(json.loads((tmp_path / "bench.json").read_text())["real"]) == [n for n in real.names() if "LoRA" in n]


def test_this_project_takes_turns_with_one_other_way_at_a_time_and_ratios_stay_within_a_pair(monkeypatch):
    """While trl is measured, the machine is twice as slow as before; that changes no ratio."""
    held = list[list[str]]()

    def hold(commands, repeats, threads, environment):
        held.append(list(commands))
        slow = 2.0 if "trl" in commands else 1.0
        rows = {w: {"seconds": slow * (1 if w == "this project" else 3), "step_mib": 5.0} for w in commands}
        return {w: row | {"all": [row["seconds"]] * 3} for w, row in rows.items()}

    monkeypatch.setattr(real, "hold", hold)
    row = real.measure("DPO, LoRA", RowsConfig())
    assert held == [["this project", way] for way in ("in bf16", "plain torch", "trl")]
    assert [row[way].get("times") for way in ("in bf16", "plain torch", "trl", "this project")] == [3, 3, 3, None]
    assert row["this project"]["seconds"] == 1.0  # the median of all turns
    assert "trl" not in real.commands("PPO, LoRA")


def test_only_one_size_of_the_growth_is_measured_on_request_and_other_points_are_kept(tmp_path, monkeypatch):
    asked, point = list[int](), {way: {"seconds": 1.0, "step_mib": 1.0} for way in scaling.WAYS}
    old = {scaling.key(scaling.point("pairs", 64)): point, scaling.key(scaling.point("width", 128)): point}
    write_json(tmp_path / "bench.json", {"scaling": old})
    monkeypatch.setattr(scaling, "measure", lambda sizes, config: asked.append(sizes["width"]) or point)
    for name in ("draw", "write_page"):
        monkeypatch.setattr(scaling, name, lambda *rest: None)
    scaling.main(scaling.ScalingConfig(out=str(tmp_path / "bench.json"), only="width"))
    assert asked == [256, 512, 768, 1024, 2048]
    points = json.loads((tmp_path / "bench.json").read_text())["scaling"]
    assert old.keys() < points.keys()
    assert all("pairs 4" in name for name in points.keys() - old.keys())


def test_a_worker_that_dies_is_reported_with_its_own_message():
    with pytest.raises(Exception, match="no such case"):
        Worker([sys.executable, "-c", "raise SystemExit('no such case')"], 1)


def test_the_table_marks_a_missed_target_and_shows_the_share_of_the_peak():
    sides = {"ours": {"seconds": 1.0, "step_mib": 1.0}, "peer": {"seconds": 2.0, "step_mib": 4.0}}
    row = {"name": "x", "ratio": 2.0, "target": 3.0, "gflops": 50.0} | sides
    assert "2.00          | 3 (missed)" in run.first_table([row], 100.0)
    assert "50 %" in run.first_table([row], 100.0)
    assert "missed" not in run.first_table([row | {"target": 2.0}], 100.0)


@pytest.mark.parametrize("case", ["ours", "plain", "linear_cross_entropy"])
def test_all_ways_to_compute_log_probs_agree(case):
    if case == "linear_cross_entropy" and not hasattr(torch.nn.functional, case):
        pytest.skip("this version of torch does not have linear_cross_entropy")
    draw = torch.Generator().manual_seed(0)
    h, weight, targets = torch.randn(5, 8, generator=draw), torch.randn(11, 8, generator=draw), torch.arange(5)
    expected = (h @ weight.T).log_softmax(-1)[torch.arange(5), targets]
    code = (  # in a separate process, as above
        "import sys, torch; from benchmarks.heads import way\n"
        "draw = torch.Generator().manual_seed(0)\n"
        "h, w, t = torch.randn(5, 8, generator=draw), torch.randn(11, 8, generator=draw), torch.arange(5)\n"
        f"out = way('{case}')(h, w, t); print([float(x) for x in (out if torch.is_tensor(out) else out[0])])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=run.ROOT, capture_output=True, text=True)
    actual = torch.tensor(json.loads(done.stderr.strip().splitlines()[-1]))
    torch.testing.assert_close(actual.abs(), expected.abs(), rtol=1e-4, atol=1e-4)


def test_the_number_of_operations_matches_a_count_by_hand(monkeypatch):
    """The products of one text of 2 + 2 tokens in two layers of width 2 can be counted on paper."""
    monkeypatch.setattr(
        w, "SHAPE", w.SHAPE | {"hidden_size": 2, "num_hidden_layers": 2, "intermediate_size": 3, "vocab_size": 5}
    )
    monkeypatch.setattr(w, "SHAPE", w.SHAPE | {"num_key_value_heads": 2, "head_dim": 1})
    for name, value in {"PROMPT": 2, "RESPONSE": 2, "PAIRS": 1, "ROLLOUT": 1}.items():
        monkeypatch.setattr(w, name, value)
    # Weights of a layer: 3 * 4 = 12 for queries, keys and values; 4 + 3 * 6 = 22 for the rest, which in the last layer
    # only the tokens that are read need. Attention: 2 * width in each layer for each key that a token attends to, of
    # which the prompt has 2 (half of 2 x 2) and a response 6 (2 x 2 of the prompt, half of 2 x 2 of its own). Head: 10.
    assert w.flops("generate") == 2 * (4 * (34 + 12) + 2 * 22 + 8 * (2 + 6) + 2 * 10)
    # The reward model reads one token of each of two responses, and has no head to speak of.
    assert w.flops("reward") == 3 * 2 * (6 * (34 + 12) + 2 * 22 + 8 * (2 + 2 * 6))
    # SFT has one response to each prompt. With one head of keys, their weights and those of values are 2 x 1 each.
    assert w.flops("sft") == 3 * 2 * (4 * (34 + 12) + 2 * 22 + 8 * (2 + 6) + 2 * 10)
    monkeypatch.setattr(w, "SHAPE", w.SHAPE | {"num_key_value_heads": 1})
    assert w.flops("sft") == 3 * 2 * (4 * (30 + 8) + 2 * 22 + 8 * (2 + 6) + 2 * 10)


def test_the_page_shows_every_measurement(tmp_path):
    sides = {"ours": {"seconds": 1.0, "step_mib": 1.0}, "peer": {"seconds": 2.0, "step_mib": 4.0}}
    row = {"name": "a step", "ratio": 2.0, "target": 3.0, "gflops": 50.0} | sides
    heads = {"name": "log-probs", "ours": {"seconds": 0.5, "step_mib": 7.0}}
    about = {"machine": "M", "commit": "C", "threads": 2, "repeats": 3, "peak": 100.0}
    ways = {"this project": {"seconds": 0.5, "step_mib": 8.0}}
    ways["plain torch"] = {"seconds": 1.25, "step_mib": 8.0, "times": 2.5}
    more = {"scaling": {"pairs 4": {"machine": "S", "commit": "D"}}, "stages": {"table": "| sft | 5 |"}}
    more["real"] = {"SFT, LoRA": ways | {"machine": "R", "commit": "E"}}
    run.write_page(tmp_path / "page.md", about | {"rows": [row], "heads": [heads]} | more)
    page = (tmp_path / "page.md").read_text()
    for part in (
        "a step",
        "500 / 7",
        "Machine: S. Commit: D.",
        "| sft | 5 |",
        "reaches 100 GFLOP/s",
        "Machine: R. Commit: E.",
    ):
        assert part in page
    cells = [c.strip() for c in next(line for line in page.splitlines() if line.startswith("| SFT, LoRA")).split("|")]
    assert cells[2:-1] == ["2.00", "-", "0.80", "-", "2.50", "-", "8 / 8 / -"]
    assert "{" not in page


def test_without_the_first_table_no_page_is_written_and_nothing_fails(tmp_path, capsys):
    (tmp_path / "page.md").write_text("as it was")
    run.write_page(tmp_path / "page.md", {"real": {}})
    assert (tmp_path / "page.md").read_text() == "as it was"
    assert "not written" in capsys.readouterr().out


def test_the_comparison_of_stages_adds_up_their_seconds(tmp_path):
    for name, seconds in (("before", 10.0), ("now", 4.0)):
        for stage in stages.STAGES:
            manifest = {"config": {}, "inputs": {}, "outputs": {}, "results": {}}
            write_json(
                tmp_path / name / stage / "manifest.json", manifest | {"seconds": seconds, "peak_memory_mb": 7.0}
            )
    text = stages.compare(tmp_path / "before", tmp_path / "now")
    assert [x.strip() for x in text.splitlines()[-1].split("|")[1:5]] == ["all", "80", "32", "2.5"]


def test_the_environment_variable_changes_the_size_of_the_workload():
    code = "from benchmarks import workload as w; print(w.SHAPE['vocab_size'], w.PROMPT, w.RESPONSE, w.PAIRS)"
    environment = os.environ | {"MPO_BENCH": '{"vocabulary": 50, "tokens": 96}'}
    done = subprocess.run([sys.executable, "-c", code], cwd=run.ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["50", "64", "32", "16"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dpo 2", "('dpo', [2])"),
        ("", "usage: how; cases: dpo, ppo"),
        ("dpo", "usage: how; cases: dpo, ppo"),
        ("dpo 0", "usage: how; cases: dpo, ppo"),
        ("dpo two", "usage: how; cases: dpo, ppo"),
        ("sft 2", "usage: how; cases: dpo, ppo"),
    ],
)
def test_a_worker_with_wrong_arguments_prints_its_usage(words, expected):
    code = "from benchmarks import turns; print(turns.arguments('how', cases=['dpo', 'ppo']))"
    command = [sys.executable, "-c", code, *words.split()]  # in a separate process, as above
    done = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True)
    assert done.stderr == f"{expected}\n"
    assert done.returncode == (expected[0] != "(")
