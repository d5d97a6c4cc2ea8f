"""What a stage may write into and when it is done already; its manifest records its inputs and outputs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mpo.config import DataConfig
from mpo.runtime.errors import InputError, UpToDate
from mpo.runtime.files import read_json, write_json
from mpo.runtime.manifest import Recipe, hash_tree
from mpo.runtime.stage import Stage
from tests.support.scripts import run_script


def open_stage(tmp_path, overwrite=False, inputs=None, **flags):
    config = DataConfig(out=str(tmp_path / "out"), **flags)
    return Stage(config, inputs or {}, config.out, overwrite)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder with its time and its bytes."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished stage with one input, in.txt."""
    (tmp_path / "in.txt").write_text("hello")
    stage = open_stage(tmp_path, inputs={"data": str(tmp_path / "in.txt")})
    write_json(stage.out / "result.json", [1])
    stage.finish()
    return stage.out


def test_the_manifest_records_inputs_and_outputs(tmp_path):
    (tmp_path / "in.txt").write_text("hello")
    stage = open_stage(tmp_path, inputs={"data": str(tmp_path / "in.txt")})
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


def test_a_finished_stage_is_not_repeated_for_what_changes_only_rounding(finished, tmp_path):
    before, inputs = contents(finished), {"data": str(tmp_path / "in.txt")}
    os.utime(finished / "manifest.json", (1, 1))
    for word in (False, True):
        with pytest.raises(UpToDate, match="is finished, with these flags and inputs"):
            open_stage(tmp_path, word, inputs, threads=2)
    after = contents(finished)
    assert {name: content for name, (_, content) in after.items()} == {n: c for n, (_, c) in before.items()}
    # Make compares times: the manifest must be newer than whatever made it run the stage.
    assert after["manifest.json"][0] >= before["manifest.json"][0]


def test_a_finished_stage_is_replaced_only_on_a_word_and_the_flags_that_differ_are_named(finished, tmp_path):
    before, inputs = contents(finished), {"data": str(tmp_path / "in.txt")}
    with pytest.raises(InputError) as refusal:
        open_stage(tmp_path, inputs=inputs, seed=2, train=5)
    assert str(refusal.value) == (
        f"--out {finished}: holds a finished stage, but --seed was 1 and is now 2; --train was 28000 and is now 5. Go "
        "on with the old flags and inputs, take another folder (RUN), or discard what is there with REDO=1 (without "
        "make: --overwrite true)"
    )
    assert contents(finished) == before
    (finished / "mine.txt").write_text("not of the stage")
    open_stage(tmp_path, True, inputs, seed=2, train=5)
    assert contents(finished).keys() == {"stage.json", "mine.txt"}


def test_an_input_with_another_content_is_noticed_whatever_its_time(finished, tmp_path):
    before, file = contents(finished), tmp_path / "in.txt"
    file.write_text("HELLO")
    os.utime(file, (1, 1))
    with pytest.raises(InputError, match=r"the content of its input data has changed \(in.txt\)"):
        open_stage(tmp_path, inputs={"data": str(file)})
    assert contents(finished) == before
    file.write_text("hello")  # the same content with a newer time
    with pytest.raises(UpToDate):
        open_stage(tmp_path, inputs={"data": str(file)})


def test_an_input_more_or_less_is_a_difference(finished, tmp_path):
    file = str(tmp_path / "in.txt")
    with pytest.raises(InputError, match="but its input ref is new"):
        open_stage(tmp_path, inputs={"data": file, "ref": file})
    with pytest.raises(InputError, match="but its input data is left out"):
        open_stage(tmp_path)


def test_the_order_of_policies_makes_another_evaluation_and_their_folders_do_not():
    """The first policy is the baseline. A run that was moved has other folders with the same content."""
    inputs = {"sft": {"model.safetensors": "1"}, "dpo": {"model.safetensors": "2"}}
    made = Recipe.of({"policies": "sft=runs/a/sft,dpo=runs/a/dpo"}, inputs)
    assert made.differences(Recipe.of({"policies": "sft=runs/b/sft,dpo=runs/b/dpo"}, inputs)) == []
    assert made.differences(Recipe.of({"policies": "dpo=runs/a/dpo,sft=runs/a/sft"}, inputs)) == [
        "--policies was sft,dpo and is now dpo,sft"
    ]


def test_a_finished_stage_that_was_changed_by_hand_is_not_replaced_without_the_word(finished, tmp_path):
    (finished / "result.json").write_text("[2]")
    with pytest.raises(InputError, match=r"its result\.json has a different hash"):
        open_stage(tmp_path, inputs={"data": str(tmp_path / "in.txt")})
    assert (finished / "result.json").read_text() == "[2]"


def test_an_input_that_a_stage_wrote_and_that_was_changed_since_is_refused(finished, tmp_path):
    (finished / "result.json").write_text("[2]")
    config = DataConfig(out=str(tmp_path / "next"))
    with pytest.raises(InputError, match=r"result\.json has a different hash: it was changed after"):
        Stage(config, {"data": str(finished)}, config.out, False)


@pytest.mark.parametrize("name", ["manifest.json", "notes.txt", "saves/step-00000001/about.json"])
def test_a_folder_that_no_stage_wrote_is_not_written_to(tmp_path, name):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    before = contents(tmp_path / "out")
    for word in (False, True):
        with pytest.raises(InputError, match="holds files that no stage has written; name another folder"):
            open_stage(tmp_path, word)
    assert contents(tmp_path / "out") == before


def test_an_out_that_is_a_file_or_leads_nowhere_is_one_line(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is not a folder"):
        open_stage(tmp_path, True)
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"is a link to .*gone, which is not there"):
        open_stage(tmp_path, True)


def test_a_manifest_that_is_not_ours_may_lie_beside_an_input(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"name": "somebody else\'s"}')
    (tmp_path / "data" / "rows.jsonl").write_text("{}")
    for path in (tmp_path / "data", tmp_path / "data" / "rows.jsonl"):
        open_stage(tmp_path, inputs={"data": str(path)})


def test_a_linked_stage_of_another_run_is_read_and_never_written_to(finished, tmp_path):
    other = tmp_path / "other" / "out"
    other.parent.mkdir()
    other.symlink_to(finished)
    before, inputs = contents(finished), {"data": str(tmp_path / "in.txt")}
    with pytest.raises(UpToDate):
        open_stage(tmp_path / "other", inputs=inputs)
    stage = open_stage(tmp_path / "other", inputs=inputs, seed=2)
    assert not other.is_symlink()
    write_json(stage.out / "result.json", [2])
    assert {name: content for name, (_, content) in contents(finished).items()} == {
        n: c for n, (_, c) in before.items()
    }


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
