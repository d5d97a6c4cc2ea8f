"""Files are written completely or not at all, and JSON is strict."""

from __future__ import annotations

import os

import pytest

from mpo.runtime.errors import InputError, RunError
from mpo.runtime.files import read_json, write_between, write_bytes, write_json


def test_a_failed_write_leaves_the_old_file_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def failing_fsync(fd):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(RunError, match=r"a.json: cannot be written \(disk full\); nothing was overwritten"):
        write_bytes(path, b"half")
    assert read_json(path) == {"x": 1}


def test_nan_cannot_be_written_as_json(tmp_path):
    with pytest.raises(RunError, match="not finite"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[" * 100_000, "not valid JSON")])
def test_the_message_about_invalid_json_names_the_file(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=f"a.json: {message}"):
        read_json(tmp_path / "a.json")


def test_only_the_part_of_a_page_between_the_marks_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- a -->\nold\n<!-- end -->\nbelow\n")
    write_between(page, "<!-- a -->\n", "<!-- end -->", "new\n")
    assert page.read_text() == "above\n<!-- a -->\nnew\n<!-- end -->\nbelow\n"
    with pytest.raises(ValueError, match="not found"):
        write_between(page, "<!-- b -->\n", "<!-- end -->", "lost\n")
    assert "new" in page.read_text()
