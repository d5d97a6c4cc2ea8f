"""Text is UTF-8 in every file, whatever the locale. No program fails because of a terminal that cannot show it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest

from mpo.model.checkpoint import save_model
from tests.conftest import small_model
from tests.support.scripts import ROOT

FOLDERS = ("mpo", "kernels", "experiments", "benchmarks", "requirements")
SOURCES = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]


def left_to_the_locale(source: str) -> list[str]:
    """The calls that read or write text in the encoding of the locale, each as "line: name"."""
    result = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        owner = getattr(getattr(node.func, "value", None), "id", "")
        named = {k.arg: k.value for k in node.keywords}
        words = [x.value for a in [*node.args, *named.values()] for x in ast.walk(a) if isinstance(x, ast.Constant)]
        modes = [word for word in words if isinstance(word, str) and re.fullmatch("[rwaxbt+]+", word)]
        binary = any("b" in mode for mode in modes)
        text = {
            "read_text": True,
            "write_text": isinstance(node.func, ast.Attribute),  # of a path; our own function always writes UTF-8
            "open": owner != "os" and not binary,
            "fdopen": not binary,
            "TemporaryFile": bool(modes) and not binary,
            "NamedTemporaryFile": bool(modes) and not binary,
        }
        pipes = name in ("run", "Popen", "check_output") and {"text", "universal_newlines"} & named.keys()
        if (pipes or text.get(name)) and "encoding" not in named:
            result.append(f"{node.lineno}: {name}")
    return result


def test_the_search_finds_what_it_is_for():
    bad = "p.read_text()\np.open()\nopen(p, 'a')\nos.fdopen(3, 'w')\nsubprocess.run(c, text=True)\np.write_text(t)\n"
    assert [line.split(":")[0] for line in left_to_the_locale(bad)] == ["1", "2", "3", "4", "5", "6"]
    good = (
        "p.read_text(encoding='utf-8')\nopen(p, 'rb')\np.open('ab')\nos.open(p, os.O_RDONLY)\nrun(c)\nwrite_text(p, t)"
    )
    assert left_to_the_locale(good) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_reads_or_writes_text_in_the_encoding_of_the_locale(path):
    assert left_to_the_locale(path.read_text(encoding="utf-8")) == []


def run(code_or_module: list[str], stdout: object, **environment: str) -> subprocess.Popen[bytes]:
    """Start a program of the project with stdout as given, and wait for its end."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | environment
    command = [sys.executable, *code_or_module]
    done = subprocess.Popen(command, cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.PIPE)
    done.stderr_text = done.communicate(timeout=120)[1].decode()  # type: ignore[attr-defined]
    return done


@pytest.fixture
def report(tmp_path):
    """The command that prints the report of a run. The report has characters of many kinds."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "report.txt").write_text("naïve – 你好 ✓\n", encoding="utf-8")
    return ["-m", "mpo.tools.report", str(tmp_path)]


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}],
    ids=["PYTHONIOENCODING", "locale"],
)
def test_a_terminal_without_these_characters_gets_a_mark_for_each(report, tmp_path, environment):
    with (tmp_path / "shown").open("wb") as out:
        done = run(report, out, **environment)
    assert (done.returncode, done.stderr_text) == (0, "")
    assert (tmp_path / "shown").read_bytes().startswith(b"na?ve ? ?? ?\n")


def test_a_terminal_that_has_them_gets_these_characters(report, tmp_path):
    with (tmp_path / "shown").open("wb") as out:
        run(report, out, PYTHONIOENCODING="utf-8")
    assert (tmp_path / "shown").read_bytes().startswith("naïve – 你好 ✓\n".encode())


@pytest.mark.parametrize("buffered", ["1", ""], ids=["at once", "at the end"])
@pytest.mark.parametrize("words", [None, ["train_sft.py", "--help"]], ids=["report", "help"])
def test_a_program_whose_reader_is_gone_ends_without_a_word(report, words, buffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = run(words or report, writer, PYTHONUNBUFFERED=buffered)
    os.close(writer)
    assert done.stderr_text == ""
    assert done.returncode == 141 or (words and done.returncode == 0)  # argparse may drop a help text that fails


def test_an_error_is_told_although_nobody_reads_the_output(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = run(["-m", "mpo.tools.report", str(tmp_path / "nowhere")], writer)
    os.close(writer)
    assert done.returncode == 2
    assert done.stderr_text.startswith("report.py: error: ")
    assert done.stderr_text.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no file that is always full")
@pytest.mark.parametrize("buffered", ["1", ""], ids=["at once", "at the end"])
def test_output_to_a_full_disk_ends_in_one_line(report, buffered):
    with open("/dev/full", "wb") as full:
        done = run(report, full, PYTHONUNBUFFERED=buffered)
    assert done.returncode == 1
    assert done.stderr_text.startswith("report.py: stopped: ")
    assert done.stderr_text.count("\n") == 1


def test_chat_takes_and_shows_any_bytes(tmp_path, tokenizer):
    save_model(tmp_path, small_model(vocab_size=tokenizer.size, bos_token_id=1, eos_token_id=2, pad_token_id=3))
    tokenizer.save(tmp_path)
    command = [sys.executable, "chat.py", "--model", str(tmp_path), "--max_new", "20"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=env, input=b"caf\xe9 \xc3\xa9\n", capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"> ") == 2
