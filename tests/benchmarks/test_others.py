"""Other peers: every side computes the same steps from the same weights, and the table shows what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import others, run
from benchmarks import workload as w
from benchmarks.run import RowsConfig
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_json

SMALL = {"vocabulary": 60, "tokens": 12, "pairs": 2, "width": 64, "layers": 2}


def in_a_process(command: list[str], sizes: dict) -> subprocess.CompletedProcess[str]:
    """Run a command at a small size; turns.py redirects standard output, so nothing of it is imported here."""
    environment = os.environ | {"MPO_BENCH": json.dumps(SMALL | sizes), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=run.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("name", [name for name in others.names() if "plain" not in name])
def test_every_peer_takes_the_steps_that_this_project_takes(name):
    """The losses of three steps depend on rows, forward pass, loss, gradient and optimiser."""
    sides = others.commands(name)
    if not Path(sides[run.PEER][0]).exists():
        pytest.skip(f"{sides[run.PEER][0]} is not there; `make bench` installs it")
    sizes = {"MPO_BENCH": json.dumps(SMALL)}
    rows = run.hold({way: sides[way] for way in (run.OURS, run.PEER)}, 2, 1, sizes)
    assert len(rows[run.OURS]["losses"]) == 3
    assert rows[run.PEER]["losses"] == pytest.approx(rows[run.OURS]["losses"], rel=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"heads": 4, "kv_heads": 2, "tied": 1}])
def test_plain_torch_takes_the_steps_that_this_project_takes(sizes):
    """Also with grouped heads and a head that is the embedding. A step of DPO is the same with a cached reference."""
    code = (
        "import json; from benchmarks import ours, plain\n"
        "def losses(step): return [step() for _ in range(3)]\n"
        "made = {'ours ' + case: losses(ours.CASES[case]()) for case in ('sft', 'dpo', 'dpo-best')}\n"
        "made |= {'plain ' + case: losses(plain.CASES[case](False)) for case in ('sft', 'dpo')}\n"
        "print(json.dumps(made))"
    )
    made = json.loads(in_a_process([sys.executable, "-c", code], sizes).stderr.strip().splitlines()[-1])
    assert made["plain sft"] == pytest.approx(made["ours sft"], rel=1e-5)
    assert made["plain dpo"] == pytest.approx(made["ours dpo"], rel=1e-5)
    assert made["ours dpo-best"] == pytest.approx(made["ours dpo"], rel=1e-5)
    assert made["ours sft"] == sorted(made["ours sft"], reverse=True)  # it learns


def test_plain_torch_compiles_and_pads_rows_of_other_lengths_without_a_trace():
    """The log-prob of a row is the same alone and beside a longer one; targets are the response, one place earlier."""
    code = (
        "import torch; from benchmarks import plain\n"
        "rows = [([5, 6], [7]), ([8], [9, 10, 11, 12])]\n"
        "ids, targets = plain.padded(rows)\n"
        "model = plain.Plain(0)\n"
        "compiled = torch.compile(model, backend='eager')\n"
        "alone = [float(model(*plain.padded([row])).sum()) for row in rows]\n"
        "print([ids.tolist(), targets.tolist(), model(ids, targets).sum(-1).tolist(), alone,"
        " compiled(ids, targets).sum(-1).tolist()])"
    )
    lines = in_a_process([sys.executable, "-c", code], {}).stderr.strip().splitlines()
    ids, targets, together, alone, compiled = json.loads(lines[-1])
    assert ids == [[5, 6, 7, 3], [8, 9, 10, 11]]
    assert targets == [[-100, 7, -100, -100], [9, 10, 11, 12]]
    assert together == pytest.approx(alone, rel=1e-5)
    assert compiled == pytest.approx(together, rel=1e-5)


@pytest.mark.parametrize(("tied", "kv_heads"), [(False, 8), (True, 2)])
def test_the_weights_are_those_of_a_llama_and_change_with_the_seed(monkeypatch, tied, kv_heads):
    sizes = {"vocab_size": 40, "num_hidden_layers": 2, "tie_word_embeddings": tied, "num_key_value_heads": kv_heads}
    monkeypatch.setattr(w, "SHAPE", w.SHAPE | sizes)
    values, others_values = w.weights(0), w.weights(1)
    theirs = LlamaForCausalLM(LlamaConfig(**w.SHAPE)).state_dict()
    assert {name: x.shape for name, x in values.items()} == {name: tuple(x.shape) for name, x in theirs.items()}
    assert all((values[name] != others_values[name]).any() for name in values)
    assert torch.from_numpy(values["model.norm.weight"]).mean() == pytest.approx(1, abs=0.1)


def test_what_killed_workers_leave_in_the_folder_for_temporary_files_is_removed(tmp_path, monkeypatch):
    """A worker that takes its turns as turns.py has it, and says which files it made."""
    code = (
        "import json, sys, tempfile\n"
        "folder = tempfile.mkdtemp()\n"
        f"open({str(tmp_path / 'says')!r}, 'w').write(folder)\n"
        "print(json.dumps({'ready': True, 'mib': 1.0}), flush=True)\n"
        "for line in sys.stdin: print(json.dumps({'seconds': 1.0, 'peak_mib': 3.0, 'loss': 0.5}), flush=True)"
    )
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(run.tempfile, "tempdir", None)
    row = run.hold({"one": [sys.executable, "-c", code]}, 2, 1)["one"]
    assert row == {"seconds": 1.0, "all": [1.0, 1.0], "step_mib": 2.0, "losses": [0.5, 0.5, 0.5]}
    made = Path((tmp_path / "says").read_text())
    assert tmp_path in made.parents
    assert not made.exists()


def sides(name: str, changed: float = 0.0) -> dict:
    """What `hold` returns of a row, where a step of the peer takes three times as long as ours."""
    rows = {way: {"seconds": 2.0, "all": [2.0], "step_mib": 10.0} for way in others.commands(name)}
    for row in rows.values():
        row["losses"] = [0.7, 0.6, 0.5]
    rows[run.PEER] |= {"seconds": 6.0, "step_mib": 40.0, "losses": [0.7, 0.6 + changed, 0.1]}
    return rows


def test_a_peer_that_computes_something_else_is_not_compared(monkeypatch):
    """Losses of the first two steps count: the second shows the gradient. Later ones add up the roundings."""
    others.check_losses("DPO step, torchtune", sides("DPO step, torchtune", 0.00005))
    for changed in (0.00007, -0.00007, float("nan")):
        with pytest.raises(InputError, match="DPO step, torchtune: after 1 steps"):
            others.check_losses("DPO step, torchtune", sides("DPO step, torchtune", changed))
    monkeypatch.setattr(others, "hold", lambda commands, repeats, threads: sides("DPO step, torchtune", 0.1))
    with pytest.raises(InputError):
        others.measure("DPO step, torchtune", RowsConfig())


def test_a_row_has_this_project_with_the_reference_cached_only_where_there_is_a_reference(monkeypatch):
    monkeypatch.setattr(others, "hold", lambda commands, *rest: {way: sides(name)[way] for way in commands})
    for name, ways in (
        ("SFT step, plain torch", {run.OURS, run.PEER}),
        ("DPO step, plain torch", {run.OURS, run.CACHED, run.PEER}),
    ):
        row = others.measure(name, RowsConfig())
        assert row.keys() == ways | {"machine", "commit"}
        assert [row[way].get("times") for way in (run.OURS, run.PEER)] == [3, None]


def test_the_table_of_other_peers_has_each_side_and_no_times_where_nothing_is_cached():
    rows = {"SFT step, x": {"ours": 2.0, "peer": 5.0}, "DPO step, x": {"ours": 2.0, "cached": 1.0, "peer": 6.0}}
    names = {"ours": run.OURS, "cached": run.CACHED, "peer": run.PEER}
    made = {}
    for name, row in rows.items():
        made[name] = {
            names[way]: {"seconds": s, "step_mib": 10 * s, "times": row["peer"] / s} for way, s in row.items()
        }
        made[name] |= {"machine": "M", "commit": "C"}
    lines = run.others_table(made).splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines[-2:]]
    assert cells == [
        ["SFT step, x", "2.000", "-", "5.000", "2.50", "-", "20 / 50"],
        ["DPO step, x", "2.000", "1.000", "6.000", "3.00", "6.00", "20 / 60"],
    ]
    assert lines[0] == "Machine: M. Commit: C."
    assert "Not measured yet" in run.others_table({})


def test_a_measurement_of_other_peers_goes_on_where_it_was_stopped_and_again_measures_all(tmp_path, monkeypatch):
    asked = list[str]()

    def measure(name, config):
        asked.append(name)
        write_json(out, json.loads(out.read_text()) | {"meanwhile": len(asked)})  # as another command may
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {run.OURS: {"times": 1.0}}

    monkeypatch.setattr(others, "measure", measure)
    monkeypatch.setattr(others, "write_page", lambda path, bench: None)
    out = tmp_path / "bench.json"
    write_json(out, {"real": {"DPO": 1}})
    only = [name for name in others.names() if "SFT" in name]
    with pytest.raises(KeyboardInterrupt):
        others.main(RowsConfig(out=str(out), only="SFT"))
    others.main(RowsConfig(out=str(out), only="SFT"))
    assert asked == [only[0], only[1], *only[1:]]
    others.main(RowsConfig(out=str(out), only="SFT", again=True))
    assert asked[-len(only) :] == only
    bench = json.loads(out.read_text())
    assert bench["real"] == {"DPO": 1}
    assert bench["meanwhile"] == len(asked)
    assert list(bench["others"]) == only


def test_the_first_tables_leave_what_other_commands_have_measured(tmp_path, monkeypatch):
    kept = {"others": {"a": 1}, "scaling": {"b": 2}, "something new": 3}
    out = tmp_path / "bench.json"
    write_json(out, kept | {"rows": [{"name": "r"}], "heads": [{"name": "h"}], "machine": "old"})
    monkeypatch.setattr(run, "rate", lambda threads: 100.0)
    monkeypatch.setattr(run, "write_page", lambda path, bench: None)
    run.main(run.BenchConfig(only="no row has this name", out=str(out)))
    bench = json.loads(out.read_text())
    assert {key: bench[key] for key in kept} == kept
    assert (bench["rows"], bench["heads"], bench["peak"]) == ([{"name": "r"}], [{"name": "h"}], 100.0)
