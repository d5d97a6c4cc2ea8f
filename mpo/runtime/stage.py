"""A stage's folder, and the manifest that records what the stage did."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo.runtime import distributed
from mpo.runtime.errors import InputError, RunError
from mpo.runtime.files import finite, read_json, sha256, write_bytes, write_json

NOT_HASHED = {"manifest.json", "metrics.jsonl"}
SAVES = "saves"  # subfolder with the saves of an unfinished stage (saves.py)
PACKAGES = ("torch", "numpy", "sentencepiece", "safetensors", "tqdm")


def hash_tree(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of every file in a folder except the logs and the manifest itself."""
    if path.is_file():
        return {path.name: sha256(path)}
    files = (p for p in path.rglob("*") if p.is_file() and p.name not in NOT_HASHED)
    names = sorted((p.relative_to(path), p) for p in files)
    return {str(name): sha256(p) for name, p in names if name.parts[0] != SAVES and not p.name.endswith(".partial")}


def peak_memory_mb() -> float:
    """The most memory that this process has used so far, in MB."""
    try:  # on Linux, getrusage would also count the program that started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)
    except (OSError, IndexError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


class Stage:
    """A stage's output folder: stage.json (its flags) is written first, then metrics.jsonl, manifest.json last."""

    def __init__(self, config: Any, inputs: Mapping[str, str], out: str, overwrite: bool):
        """Open the folder.

        Args:
            config: the stage's flags.
            inputs: the files and folders that this stage reads, by flag.
            out: the folder.
            overwrite: replace a finished stage.

        Raises:
            InputError: an input is missing or is not what its manifest says, or `out` holds a finished stage.
        """
        self.out, self.name = Path(out), Path(out).name
        self.manifest = self.out / "manifest.json"
        self.config, self.inputs = config, dict(inputs)
        self.started, self.earlier = time.time(), 0.0  # earlier: seconds before it was interrupted
        self.input_hashes = distributed.from_main(lambda: self._open(overwrite))

    def _open(self, overwrite: bool) -> dict[str, dict[str, str]]:
        """Check the inputs, and mark the folder as unfinished; returns the inputs' hashes."""
        for name, path in self.inputs.items():
            if not Path(path).exists():
                raise InputError(f"--{name} {path}: no such file or folder; has the stage that writes it run?")
        if self.manifest.exists() and not overwrite:
            raise InputError(f"--out {self.out}: holds a finished stage; name another folder or pass --overwrite true")
        hashes = {name: hash_tree(Path(path)) for name, path in self.inputs.items()}
        for name, path in self.inputs.items():
            check_manifest(Path(path), hashes[name])
            hashes[name].pop("stage.json", None)  # an input is its content, not how it was made
        self._empty()
        return hashes

    def _empty(self) -> None:
        """Make the folder, and remove from it what a finished run left."""
        try:
            if self.out.is_symlink():
                self.out.unlink()  # it belongs to another run (make FROM=...) and is never written to
            self.out.mkdir(parents=True, exist_ok=True)
            self.manifest.unlink(missing_ok=True)
            for partial in list(self.out.rglob(".*.partial")):  # left by a write that was killed
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
            if not (self.out / SAVES).is_dir():
                self.forget(0)
        except OSError as e:
            raise RunError(f"--out {self.out}: cannot be written ({e.strerror})") from None
        write_json(self.out / "stage.json", asdict(self.config))  # the name config.json is the model's

    def forget(self, step: int) -> None:
        """Remove metrics and intermediate models that come from later than the first `step` steps."""
        metrics = self.out / "metrics.jsonl"
        lines = metrics.read_bytes().splitlines(keepends=True)[:step] if metrics.exists() else []
        if lines:
            write_bytes(metrics, b"".join(lines))
        else:
            metrics.unlink(missing_ok=True)
        for kept in self.out.glob("step-*"):
            if int(kept.name[5:]) > step:
                shutil.rmtree(kept)

    @property
    def seconds(self) -> float:
        """How long the stage has taken, including the time before it was interrupted."""
        return self.earlier + time.time() - self.started

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of one step to metrics.jsonl."""
        if not distributed.is_main():
            return
        line = json.dumps({"step": step, **finite({k: round(float(v), 6) for k, v in metrics.items()})}) + "\n"
        try:
            with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as f:
                f.write(line)
        except OSError as e:
            raise RunError(f"{self.out / 'metrics.jsonl'}: cannot be written ({e.strerror})") from None

    def finish(self, **results: Any) -> None:
        """Write the manifest, which declares the stage finished."""
        peak = distributed.all_max([peak_memory_mb()])[0]
        if not distributed.is_main():
            return
        write_json(
            self.manifest,
            {
                "stage": Path(sys.argv[0]).stem,
                "config": asdict(self.config),
                "inputs": {n: {"path": p, "sha256": self.input_hashes[n]} for n, p in self.inputs.items()},
                "outputs": hash_tree(self.out),
                "results": finite(results),
                "seconds": round(self.seconds, 1),
                "processes": distributed.world_size(),
                "peak_memory_mb": peak,  # of the process that used most
                "python": platform.python_version(),
                "packages": {p: importlib.metadata.version(p) for p in PACKAGES},
            },
        )
        shutil.rmtree(self.out / SAVES, ignore_errors=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """A stage's manifest. Raises InputError where the file is not one."""
    content = read_json(path)
    needed = {"config": dict, "inputs": dict, "outputs": dict, "results": dict}
    good = isinstance(content, dict) and all(isinstance(content.get(k), kind) for k, kind in needed.items())
    if good:
        of = list(content["inputs"].values())
        good = all(isinstance(x, dict) and isinstance(x.get("sha256"), dict) for x in of)
        good = good and all(isinstance(x.get("path"), str) and "\0" not in x["path"] for x in of)
    if not good:
        raise InputError(f"{path}: not a stage's manifest; delete {path.parent} and run its stage again")
    result: dict[str, Any] = content
    return result


def check_manifest(folder: Path, hashes: Mapping[str, str]) -> None:
    """Check a stage's folder against its manifest; a folder without one is accepted as it is.

    Raises InputError naming the first file that differs.
    """
    manifest = (folder if folder.is_dir() else folder.parent) / "manifest.json"
    if not manifest.is_file():
        return
    outputs = read_manifest(manifest)["outputs"]
    for name, digest in hashes.items():
        if name in outputs and outputs[name] != digest:
            raise InputError(
                f"{manifest.parent / name}: changed since its stage finished (manifest.json has another hash); "
                f"delete {manifest.parent} and run its stage again"
            )
    if folder.is_dir() and (gone := sorted(outputs.keys() - hashes.keys())):
        raise InputError(
            f"{folder / gone[0]}: is gone since its stage finished; delete {folder} and run its stage again"
        )
