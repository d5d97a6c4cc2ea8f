"""Files that appear whole or not at all, and the manifest that says what a stage did."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo.errors import InputError

PACKAGES = ("torch", "numpy", "sentencepiece", "safetensors", "tqdm")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline, whole or not at all; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON, or end in one line that names the file and what is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; has the stage that writes it finished?") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not valid JSON ({e})") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_tree(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of every file in a folder but logs and the manifest itself."""
    if path.is_file():
        return {path.name: sha256(path)}
    skip = {"manifest.json", "metrics.jsonl"}
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name not in skip)
    return {str(p.relative_to(path)): sha256(p) for p in files}


def peak_memory_mb() -> float:
    """The most memory this process has held so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


class Stage:
    """A stage's output folder: stage.json (its flags) first, metrics.jsonl as it goes, manifest.json last."""

    def __init__(self, config: Any, inputs: Mapping[str, str], out: str, overwrite: bool):
        """Open the folder. `inputs` names the files and folders this stage reads.

        Errors: InputError when an input is missing, or when `out` holds a finished stage and
        `overwrite` is false.
        """
        self.out = Path(out)
        self.manifest = self.out / "manifest.json"
        for name, path in inputs.items():
            if not Path(path).exists():
                raise InputError(f"--{name} {path}: no such file or folder; has the stage that writes it run?")
        if self.manifest.exists() and not overwrite:
            raise InputError(f"--out {out}: holds a finished stage; name another folder or pass --overwrite true")
        if self.out.is_symlink():
            self.out.unlink()  # shared with another run (make FROM=...): never written through
        self.out.mkdir(parents=True, exist_ok=True)
        self.manifest.unlink(missing_ok=True)  # from here on the folder is unfinished
        (self.out / "metrics.jsonl").unlink(missing_ok=True)
        for kept in self.out.glob("step-*"):  # models kept on the way by an earlier run
            shutil.rmtree(kept)
        self.config, self.inputs, self.started = config, dict(inputs), time.time()
        self.input_hashes = {name: hash_tree(Path(path)) for name, path in inputs.items()}
        write_json(self.out / "stage.json", asdict(config))  # config.json is the model's own

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step to metrics.jsonl."""
        with (self.out / "metrics.jsonl").open("a") as f:
            f.write(json.dumps({"step": step, **{k: round(float(v), 6) for k, v in metrics.items()}}) + "\n")

    def finish(self, **results: Any) -> None:
        """Write the manifest, and with it declare the stage finished."""
        write_json(
            self.manifest,
            {
                "stage": Path(sys.argv[0]).stem,
                "config": asdict(self.config),
                "inputs": {n: {"path": p, "sha256": self.input_hashes[n]} for n, p in self.inputs.items()},
                "outputs": hash_tree(self.out),
                "results": results,
                "seconds": round(time.time() - self.started, 1),
                "peak_memory_mb": peak_memory_mb(),
                "python": platform.python_version(),
                "packages": {p: importlib.metadata.version(p) for p in PACKAGES},
            },
        )
