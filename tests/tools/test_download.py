"""The download against a server on this machine: whole, broken off, wrong, absent."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mpo.runtime.errors import InputError
from mpo.tools.download import File, check, fetch

CONTENT = bytes(range(256)) * 400
FILE = File("base/train.jsonl.gz", "", "sha256", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
GIT = File("base/train.jsonl.gz", "", "git", hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest())


@pytest.fixture
def server():
    """Serves CONTENT; counts the bytes it sends; honours Range unless told not to."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start = 0
            if self.server.ranges and (asked := self.headers.get("Range")):
                start = int(asked.removeprefix("bytes=").rstrip("-"))
            body = self.server.content[start:]
            self.server.sent += len(body)  # before it goes out: the client may be done before we are
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.ranges, server.sent = CONTENT, True, 0
    server.address = f"http://127.0.0.1:{server.server_address[1]}/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_file_is_fetched_once(server, tmp_path):
    for _ in range(2):
        fetch(FILE, tmp_path, server.address)
    assert (tmp_path / FILE.path).read_bytes() == CONTENT
    assert server.sent == len(CONTENT)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(server, tmp_path, ranges):
    partial = tmp_path / (FILE.path + ".partial")
    partial.parent.mkdir()
    partial.write_bytes(CONTENT[:70_000])
    server.ranges = ranges
    fetch(FILE, tmp_path, server.address)
    assert (tmp_path / FILE.path).read_bytes() == CONTENT
    assert server.sent == len(CONTENT) - (70_000 if ranges else 0)
    assert not partial.exists()


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"x"])
def test_wrong_content_never_gets_the_name(server, tmp_path, content):
    server.content = content
    with pytest.raises(InputError, match="run the same command again"):
        fetch(FILE, tmp_path, server.address)
    assert list((tmp_path / "base").iterdir()) == []


def test_another_file_of_that_name_is_kept(server, tmp_path):
    mine = tmp_path / FILE.path
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(InputError, match=r"is not the official file \(4 bytes instead of 102400\); move it"):
        fetch(FILE, tmp_path, server.address)
    assert mine.read_text() == "mine"
    assert server.sent == 0


def test_no_network_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"no connection .*without a network.*make hh DATA=builtin"):
        fetch(FILE, tmp_path, "http://127.0.0.1:9/")


def test_both_kinds_of_hash(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(CONTENT)
    assert check(FILE, path) == check(GIT, path) == ""
    path.write_bytes(CONTENT[::-1])
    assert "sha256 hash" in check(FILE, path)
    assert "git hash" in check(GIT, path)
