"""Data is data: nothing in a row file or model folder is executed, leaves its folder, fills the memory or hangs."""

from __future__ import annotations

import ast
import gzip
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from mpo.__main__ import COMMANDS
from mpo.data.rows import read_rows
from mpo.data.tokenizer import load_tokenizer
from mpo.model.checkpoint import load_model, save_model
from mpo.runtime.errors import InputError
from mpo.tools.download import FILES, fetch
from tests.conftest import small_model
from tests.support.scripts import ROOT, run_script

SOURCES = list(ROOT.glob("*.py")) + [p for d in ("mpo", "kernels", "experiments") for p in (ROOT / d).rglob("*.py")]
BANNED_MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "yaml", "code", "runpy"}
BANNED_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.save",
    "np.load",
    "numpy.load",
    "os.system",
}

ALLOWED = {"mpo/__main__.py": ["runpy", "runpy.run_module"]}  # see the test of the command below


def dotted(node):
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def offences(text):
    """Imports and calls by which data could become code."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name in BANNED_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module in BANNED_MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            found += [name for name in [dotted(node.func)] if name in BANNED_CALLS]
            found += ["shell=True" for k in node.keywords if k.arg == "shell" and getattr(k.value, "value", 0) is True]
    return found


@pytest.mark.parametrize(
    "text", ["import pickle", "from yaml import load", "torch.load(x)", "eval('1')", "f(shell=True)"]
)
def test_the_search_finds_what_it_is_for(text):
    assert offences(text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_can_turn_data_into_code(path):
    allowed = ALLOWED.get(str(path.relative_to(ROOT)), [])
    assert [offence for offence in offences(path.read_text()) if offence not in allowed] == []


def test_the_command_runs_only_modules_of_the_package():
    """It is the one place that may run a module by its name, which it takes from its own table."""
    assert all(module.startswith("mpo.") for module, _ in COMMANDS.values())
    calls = [n for n in ast.walk(ast.parse((ROOT / "mpo/__main__.py").read_text())) if isinstance(n, ast.Call)]
    (run,) = [call for call in calls if dotted(call.func) == "runpy.run_module"]
    assert ast.unparse(run.args[0]) == "COMMANDS[name][0]"


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.model", "config.json"])
def test_a_pickle_is_never_opened_as_one(tmp_path, name):
    folder, mark = tmp_path / "model", tmp_path / "executed"
    save_model(folder, small_model())
    for other in ("model.safetensors",) if name == "pytorch_model.bin" else ():
        (folder / other).unlink()
    content = pickle.dumps(Bomb(str(mark)))
    (folder / name).write_bytes(content)
    with pytest.raises(InputError):
        load_tokenizer(folder) if name == "tokenizer.model" else load_model(folder)
    assert not mark.exists()
    pickle.loads(content)  # it would have
    assert mark.exists()


def edit(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


HUGE = [
    {"vocab_size": 10**11},
    {"hidden_size": 10**6, "vocab_size": 10**6},
    {"num_hidden_layers": 10**9},
    {"intermediate_size": 10**11},
    {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
    {"head_dim": 10**11},
]


@pytest.mark.parametrize("changes", HUGE, ids=str)
def test_a_config_cannot_fill_the_memory(tmp_path, changes):
    save_model(tmp_path, small_model())
    edit(tmp_path, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError):
        load_model(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_a_header_of_100_gb_is_refused(tmp_path):
    save_model(tmp_path, small_model())
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.write((100 << 30).to_bytes(8, "little"))
        f.truncate(101 << 30)  # a sparse file: it takes no room
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_model(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    model = small_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = value
    save_model(tmp_path, model)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds numbers that are not finite"):
        load_model(tmp_path)


def test_whole_numbers_are_no_weights(tmp_path):
    model = small_model()
    save_model(tmp_path, model)
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    save_file(tensors | {"model.norm.weight": torch.ones(24, dtype=torch.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight .* torch\.int64"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["fifo", "loop", "folder", "/dev/zero"])
def test_what_is_no_file_neither_hangs_nor_fills(tmp_path, name, how):
    save_model(tmp_path, small_model())
    path = tmp_path / name
    path.unlink()
    if how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if how == "loop" else how)
    with pytest.raises(InputError):
        load_model(tmp_path)


def test_a_compressed_line_without_end_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as f:
        for _ in range(512):
            f.write(bytes(1 << 20))
    assert path.stat().st_size < 4 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"rows.jsonl.gz:1: a line of more than"):
        read_rows(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_secrets_of_the_environment_appear_nowhere(tmp_path):
    secret = "hf_0123456789SECRET"
    environment = os.environ | {
        "HF_TOKEN": secret,
        "AWS_SECRET_ACCESS_KEY": secret,
        "MPO_HH_URL": f"https://u:{secret}@h/",
    }
    flags = ["--out", str(tmp_path / "data"), "--train", "40", "--test", "8"]
    command = [sys.executable, "prepare_data.py", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    flags = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "tokenizer"), "--vocab", "400"]
    command = [sys.executable, "train_tokenizer.py", *flags]
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert secret not in done.stdout + done.stderr + again.stdout + again.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_the_password_of_a_mirror_is_not_shown(tmp_path):
    with pytest.raises(InputError) as refused:
        fetch(FILES[0], tmp_path, "http://user:hunter2@127.0.0.1:9/")
    assert "hunter2" not in str(refused.value)
    assert "http://127.0.0.1:9/" in str(refused.value)


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path):
    row = {"prompt": "p", "chosen": " a", "rejected": " b", "margin": "\x1b]0;owned\x07\n"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "evil\x1b[31m.jsonl")
    done = run_script("prepare_data.py", "--data", tmp_path / "evil\x1b[31m.jsonl", "--out", tmp_path / "o", expect=2)
    assert "\x1b" not in done.stderr
    assert done.stderr.count("\n") == 1
