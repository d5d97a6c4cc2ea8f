"""Downloads from the hub, against a local server that answers as the hub's API does."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mpo.runtime.files import read_json
from mpo.tools.hub import advice
from tests.support.scripts import ROOT

pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 40,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"pickled",
    "modeling_own.py": b"print('never run')",
    "onnx/model.safetensors": b"another form",
    "train.jsonl": b'{"chosen": "a", "rejected": "b"}\n',
    "README.md": b"# a card",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Two revisions of a model and a data set: main and v1, both COMMIT. Other names do not exist or are gated."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":
            kind, name, revision = parts[1], "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            if name != "org/name" or revision not in ("main", "v1", COMMIT):
                code = "GatedRepo" if name == "org/gated" else "RepoNotFound"
                code = "RevisionNotFound" if name == "org/name" else code
                self.answer(403 if code == "GatedRepo" else 404, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"})
                return
            if "tree" in parts:
                tree = [{"type": "file", "path": f, "size": len(body), "oid": f} for f, body in FILES.items()]
                self.answer(200, json.dumps(tree).encode())
                return
            siblings = [{"rfilename": file} for file in FILES]
            about = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            self.answer(200, json.dumps(about | {"likes": 0, "_id": kind}).encode())
            return
        file = self.path.partition(f"/resolve/{COMMIT}/")[2]
        self.answer(200, FILES[file], {"X-Repo-Commit": COMMIT, "ETag": f'"{file}"'})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def download(address: str, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder, with the hub at an address."""
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env |= {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    env |= {"HF_HOME": str(cwd / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "mpo.tools.hub", *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def address_of(server: http.server.HTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def downloaded(folder: Path) -> list[str]:
    inside = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return sorted(str(p) for p in inside if not p.parts[0].startswith("."))


@pytest.mark.parametrize(
    ("kind", "name", "folder", "files"),
    [
        ("model", "org/name", "models/org/name", ["config.json", "hub.json", "model.safetensors", "tokenizer.json"]),
        (
            "model",
            "org/name@v1",
            "models/org/name@v1",
            ["config.json", "hub.json", "model.safetensors", "tokenizer.json"],
        ),
        ("dataset", "org/name", "data/org/name", ["config.json", "hub.json", "tokenizer.json", "train.jsonl"]),
    ],
)
def test_what_this_project_reads_is_downloaded_once_and_the_commit_is_recorded(
    hub, tmp_path, kind, name, folder, files
):
    done = download(address_of(hub), tmp_path, kind, name)
    assert (done.returncode, done.stdout) == (0, f"{folder}: complete, commit {COMMIT}\n"), done.stderr
    assert downloaded(tmp_path / folder) == files
    for file in files:
        assert file == "hub.json" or (tmp_path / folder / file).read_bytes() == FILES[file]
    asked = name.partition("@")[2] or "main"
    expected = {"kind": kind, "id": "org/name", "revision": asked, "commit": COMMIT}
    assert read_json(tmp_path / folder / "hub.json") == expected
    before = len(hub.asked)
    assert download(address_of(hub), tmp_path, kind, name).stdout == done.stdout
    assert len(hub.asked) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/unknown", "org/unknown: no such folder, and the hub does not give a model of this name"),
        ("org/gated", "HF_TOKEN"),
        ("org/name@v9", "org/name@v9: no such folder, and the hub does not give a model of this name"),
        ("name", "not of the form ORG/NAME"),
        ("../../etc", "not of the form ORG/NAME"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(hub, tmp_path, name, words):
    done = download(address_of(hub), tmp_path, "model", name)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert words in done.stderr
    assert not (tmp_path / "models" / name / "hub.json").exists()


def test_a_folder_of_ones_own_is_not_downloaded_into(hub, tmp_path):
    own = tmp_path / "models" / "org" / "name" / "config.json"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    done = download(address_of(hub), tmp_path, "model", "org/name")
    assert (done.returncode, own.read_text(), hub.asked) == (2, "mine", [])
    assert "models/org/name: holds files that were not downloaded here" in done.stderr


def test_a_download_that_was_broken_off_goes_on(hub, tmp_path):
    folder = tmp_path / "models" / "org" / "name"
    assert download(address_of(hub), tmp_path, "model", "org/name").returncode == 0
    (folder / "hub.json").unlink()
    (folder / "tokenizer.json").unlink()
    assert download(address_of(hub), tmp_path, "model", "org/name").returncode == 0
    assert (folder / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]


@pytest.mark.parametrize("name", ["org/name", "Org-1/na.me_2@v1", "a/b"])
def test_a_name_that_a_hub_can_have_gets_advice(name):
    assert advice("model", name).endswith(f"-m mpo.tools.hub model {name}")


@pytest.mark.parametrize(
    "name", ["data/hh", "runs/hh", "my/pairs.jsonl", "my/rows.json.gz", "/a/b", "a/b/c", "x", "../x"]
)
def test_a_name_that_means_a_path_gets_none(name):
    assert advice("dataset", name) == ""


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    done = download("http://127.0.0.1:9", tmp_path, "model", "org/name")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.splitlines()[-1].startswith("hub.py: stopped: org/name: could not be downloaded")
