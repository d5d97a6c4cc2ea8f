"""The benchmark's own side: every case does a step, at a size that takes no time. Nothing is timed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import run
from benchmarks import workload as w
from benchmarks.run import Worker, table

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def test_every_case_does_a_step():
    code = (
        "from benchmarks import workload as w\n"
        f"w.SHAPE.update({SMALL}); w.PROMPT, w.RESPONSE, w.PAIRS, w.ROLLOUT = 6, 4, 2, 3\n"
        "from benchmarks.ours import CASES\n"
        "for case in CASES.values(): step = case(); step(); step()\n"
        "print(list(CASES))"
    )  # in a process of its own: turns.py takes standard output for itself
    done = subprocess.run([sys.executable, "-c", code], cwd=run.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {c.ours for c in run.CONTESTS} <= set(json.loads(done.stderr.strip().splitlines()[-1].replace("'", '"')))


def test_pairs_end_in_eos_and_have_the_lengths():
    for row in w.pairs(3):
        assert len(row["prompt"]) == w.PROMPT
        assert len(row["chosen"]) == len(row["rejected"]) == w.RESPONSE
        assert row["chosen"][-1] == row["rejected"][-1] == w.SHAPE["eos_token_id"]


def test_a_worker_that_dies_is_reported_in_its_own_words():
    with pytest.raises(Exception, match="no such case"):
        Worker([sys.executable, "-c", "raise SystemExit('no such case')"], 1)


def test_the_table_says_what_was_missed():
    row = {
        "name": "x",
        "ours": 1.0,
        "peer": 2.0,
        "ratio": 2.0,
        "target": 3.0,
        "ours_step_mib": 1.0,
        "peer_step_mib": 4.0,
    }
    assert "2.00 | 3 (missed)" in table([row])
    assert "missed" not in table([row | {"target": 2.0}])
