"""make verify: what is damaged, stale or unfinished, and what a model was made from."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, write_json
from mpo.tools.verify import chain, verify
from tests.conftest import SMALL
from tests.support.scripts import ROOT, run_script


@pytest.fixture
def run(hh_run, tmp_path):
    """A copy of a finished run, whose manifests name its own folders."""
    copy = tmp_path / "run"
    shutil.copytree(hh_run, copy)
    for manifest in copy.glob("*/manifest.json"):
        manifest.write_text(manifest.read_text().replace(str(hh_run), str(copy)))
    return copy


def states(run):
    return {name: found.state for name, found in verify(run).items()}


ALL = ("data", "tokenizer", "sft", "rm", "split", "dpo", "mpo", "eval")


def test_a_finished_run_is_good_and_shows_its_chain(run):
    assert states(run) == dict.fromkeys(ALL, "good")
    assert chain(verify(run), "mpo") == ["data", "tokenizer", "sft", "rm", "split", "dpo", "mpo"]
    command = [sys.executable, "-m", "mpo.tools.verify", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "SHA-256): data, tokenizer, sft " in done.stdout
    assert "| why" not in done.stdout
    assert "every file matches its manifest" in done.stdout


def test_a_changed_byte_is_found_and_what_was_made_from_it_is_stale(run):
    model = run / "dpo" / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 4
    model.write_bytes(content)
    good = dict.fromkeys(ALL, "good")
    assert states(run) == good | {"dpo": "damaged", "mpo": "stale", "eval": "stale"}
    assert verify(run)["dpo"].faults == ["model.safetensors has a different hash"]
    done = subprocess.run(
        [sys.executable, "-m", "mpo.tools.verify", str(run)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "| why" in done.stdout
    assert "not good: dpo, mpo, eval" in done.stdout


def test_a_file_that_is_gone_and_a_stage_without_a_manifest(run):
    (run / "rm" / "probe.json").unlink()
    (run / "eval" / "manifest.json").unlink()
    found = verify(run)
    assert found["rm"].faults == ["probe.json is missing"]
    assert found["eval"].faults == ["no manifest; 0 saves to resume from"]
    assert (found["split"].state, found["sft"].state) == ("stale", "good")


def test_a_stage_that_was_made_anew_leaves_the_rest_stale(run):
    common = ("--data", run / "data", "--tokenizer", run / "tokenizer", "--epochs", 0.5, "--overwrite", "true", *SMALL)
    run_script("train_sft.py", "--out", run / "sft", "--seed", 5, *common)
    assert states(run) == dict(zip(ALL, ["good"] * 3 + ["stale"] * 5, strict=True))
    assert verify(run)["rm"].stale == [f"made from a different model ({run / 'sft'}): model.safetensors"]
    run_script("train_sft.py", "--out", run / "sft", "--seed", 1, *common)  # the same bytes again
    assert states(run) == dict.fromkeys(ALL, "good")


def test_flags_that_are_not_those_of_the_manifest_are_found(run):
    flags = read_json(run / "sft" / "stage.json")
    write_json(run / "sft" / "stage.json", flags | {"seed": 7})
    assert verify(run)["sft"].state == "damaged"
    assert "stage.json and manifest.json are of different runs: --seed" in verify(run)["sft"].faults


def test_a_run_that_was_moved_is_good(run, tmp_path):
    run.rename(tmp_path / "elsewhere")
    assert states(tmp_path / "elsewhere") == dict.fromkeys(ALL, "good")


def test_a_circle_of_manifests_is_one_line(run):
    for name, other in (("sft", "dpo"), ("dpo", "sft")):
        manifest = read_json(run / name / "manifest.json")
        manifest["inputs"] = {"model": {"path": str(run / other), "sha256": {}}}
        write_json(run / name / "manifest.json", manifest)
    with pytest.raises(InputError, match="made from itself"):
        verify(run)


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(InputError, match="contains no stage"):
        verify(tmp_path)
