"""Chat: a line becomes a prompt in the form of the run's rows, and no input ends it with a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from mpo.data.typed import as_prompt, form_of_run
from mpo.model.checkpoint import save_model
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_json
from tests.conftest import small_model
from tests.data.test_folders import comparison
from tests.data.test_rows import GOOD, write
from tests.support.scripts import ROOT, run_script


@pytest.fixture
def model(tokenizer, tmp_path):
    """The folder of a random model."""
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    save_model(tmp_path / "model", small_model(vocab_size=tokenizer.size, **ids))
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def test_a_line_becomes_a_prompt_in_the_form_of_the_rows():
    first = as_prompt("dialogue", "", "Hi")
    assert first == "\n\nHuman: Hi\n\nAssistant:"
    assert as_prompt("dialogue", first + " Yes?", "Bye") == first + " Yes?\n\nHuman: Bye\n\nAssistant:"
    assert as_prompt("text", "ignored", "Q: 2 + 2? A:") == "Q: 2 + 2? A:"
    post = "SUBREDDIT: r/{}\n\nTITLE: {}\n\nPOST: I fell | twice.\n\nTL;DR:"
    assert as_prompt("post", "ignored", "r/advice | Help | I fell | twice.") == post.format("advice", "Help")
    assert as_prompt("post", "", "I fell | twice.") == post.format("relationships", "What should I do?")


@pytest.mark.parametrize(
    ("rows", "flags", "form"),
    [
        ([{**GOOD, "id": i, "prompt": f"Q: {i}? A:"} for i in range(4)], [], "text"),
        ([{**GOOD, "prompt": f"{i}?"} for i in range(4)], [], "dialogue"),
        (
            [comparison(info={"post": f"{i}", "title": "t", "subreddit": "s"}) for i in range(4)],
            ["--task", "tldr"],
            "post",
        ),
    ],
)
def test_the_form_is_the_one_that_the_data_stage_recorded(tmp_path, rows, flags, form):
    file = write(tmp_path / "rows.jsonl", *rows)
    run_script("prepare_data.py", "--data", file, "--out", tmp_path / "data", *flags)
    assert form_of_run(str(tmp_path / "data")) == form


def test_without_a_recorded_form_the_task_decides(tmp_path):
    assert form_of_run("") == "dialogue"
    manifest = {"stage": "s", "config": {}, "inputs": {}, "outputs": {}, "results": {"task": "tldr"}}
    write_json(tmp_path / "manifest.json", manifest)
    assert form_of_run(str(tmp_path)) == "post"
    write_json(tmp_path / "manifest.json", {**manifest, "results": {"loss": 1.0}})
    with pytest.raises(InputError, match="not the folder of a data stage"):
        form_of_run(str(tmp_path))
    with pytest.raises(InputError, match="no such file"):
        form_of_run(str(tmp_path / "nowhere"))


def chat(model, text, *flags):
    command = [sys.executable, "chat.py", "--model", str(model), "--max_new", "3", *flags]
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, check=False)


def test_bytes_that_are_not_utf8_are_replaced_and_every_line_is_answered(model):
    done = chat(model, b"hello \xff\xfe there\nnul \0 byte\n\n" + "ü".encode() + b" no line break at the end")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"> ") == 5


def test_ctrl_c_ends_chat_without_a_message(model):
    command = [sys.executable, "chat.py", "--model", str(model), "--max_new", "3"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert b"type a message" in child.stdout.readline()
        assert child.stdout.read(2) == b"> "  # it waits for a line now
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (0, b"\n", b"")


def test_no_room_for_a_prompt_is_refused(model):
    done = run_script("chat.py", "--model", model, "--max_new", 100000, expect=2)
    assert "--max_new 100000: leaves no room for a prompt" in done.stderr
