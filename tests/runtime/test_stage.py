"""A finished stage is only overwritten on request, and its manifest records its inputs and outputs."""

from __future__ import annotations

import json

import pytest

from mpo.config import DataConfig
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, write_json
from mpo.runtime.stage import Stage, hash_tree
from tests.support.scripts import run_script


def open_stage(tmp_path, overwrite=False, **inputs):
    config = DataConfig(out=str(tmp_path / "out"))
    return Stage(config, inputs, config.out, overwrite)


def test_the_manifest_records_inputs_and_outputs(tmp_path):
    (tmp_path / "in.txt").write_text("hello")
    stage = open_stage(tmp_path, data=str(tmp_path / "in.txt"))
    stage.log(0, {"loss": 1.0})
    write_json(stage.out / "result.json", [1])
    assert not stage.manifest.exists()
    stage.finish(rows=3)
    manifest = read_json(stage.manifest)
    hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # echo -n hello | sha256sum
    assert manifest["inputs"]["data"]["sha256"] == {"in.txt": hello}
    assert set(manifest["outputs"]) == {"stage.json", "result.json"}
    assert manifest["results"] == {"rows": 3}
    assert manifest["config"]["seed"] == 1
    assert json.loads((stage.out / "metrics.jsonl").read_text()) == {"step": 0, "loss": 1.0}
    assert manifest["outputs"] == hash_tree(stage.out)


def test_a_finished_stage_is_kept_unless_overwrite_is_set(tmp_path):
    open_stage(tmp_path).finish()
    with pytest.raises(InputError, match="holds a finished stage"):
        open_stage(tmp_path)
    assert (tmp_path / "out" / "manifest.json").exists()
    open_stage(tmp_path, overwrite=True)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_unfinished_stage_starts_again_without_its_old_metrics(tmp_path):
    open_stage(tmp_path).log(0, {"loss": 1.0})
    open_stage(tmp_path)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_peak_memory_does_not_count_the_program_that_started_this_one():
    ballast = bytearray(1 << 30)
    ballast[::4096] = b"x" * len(ballast[::4096])  # writing to each page makes the system allocate it
    code = "from mpo.runtime.stage import peak_memory_mb; print(peak_memory_mb())"
    done = run_script("-c", code)
    assert 10 < float(done.stdout) < 900
