"""Files whole or not at all; a finished stage is never overwritten unasked."""

from __future__ import annotations

import json
import os

import pytest

from mpo.artifacts import Stage, hash_tree, read_json, write_bytes, write_json
from mpo.config import DataConfig
from mpo.errors import InputError, RunError


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def broken(fd):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(RunError, match=r"a.json: cannot be written \(disk full\); nothing was overwritten"):
        write_bytes(path, b"half")
    assert read_json(path) == {"x": 1}


def test_nan_is_not_json(tmp_path):
    with pytest.raises(RunError, match="not finite"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[" * 100_000, "not valid JSON")])
def test_bad_json_names_the_file(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=f"a.json: {message}"):
        read_json(tmp_path / "a.json")


def stage(tmp_path, overwrite=False, **inputs):
    config = DataConfig(out=str(tmp_path / "out"))
    return Stage(config, inputs, config.out, overwrite)


def test_the_manifest_records_inputs_and_outputs(tmp_path):
    (tmp_path / "in.txt").write_text("hello")
    s = stage(tmp_path, data=str(tmp_path / "in.txt"))
    s.log(0, {"loss": 1.0})
    write_json(s.out / "result.json", [1])
    assert not s.manifest.exists()
    s.finish(rows=3)
    manifest = read_json(s.manifest)
    hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # echo -n hello | sha256sum
    assert manifest["inputs"]["data"]["sha256"] == {"in.txt": hello}
    assert set(manifest["outputs"]) == {"stage.json", "result.json"}
    assert manifest["results"] == {"rows": 3}
    assert manifest["config"]["seed"] == 1
    assert json.loads((s.out / "metrics.jsonl").read_text()) == {"step": 0, "loss": 1.0}
    assert manifest["outputs"] == hash_tree(s.out)


def test_a_finished_stage_is_kept_unless_asked(tmp_path):
    stage(tmp_path).finish()
    with pytest.raises(InputError, match="holds a finished stage"):
        stage(tmp_path)
    assert (tmp_path / "out" / "manifest.json").exists()
    stage(tmp_path, overwrite=True)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_unfinished_stage_starts_again(tmp_path):
    stage(tmp_path).log(0, {"loss": 1.0})
    stage(tmp_path)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
