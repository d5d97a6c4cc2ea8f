"""A stage's folder: what may be written into it, what is written, and when the stage counts as finished.

Work is kept. A finished stage that was made from the same flags and inputs is not repeated. One that was made from
others, or an unfinished one whose saves were, is discarded only with --overwrite true (REDO=1 in make).
"""

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo.config import STAGES
from mpo.runtime import device, distributed, signals
from mpo.runtime.errors import InputError, RunError, UpToDate
from mpo.runtime.files import finite, read_json, write_bytes, write_json
from mpo.runtime.lock import Lock
from mpo.runtime.manifest import (
    FLAGS,
    HUB,
    MANIFEST,
    METRICS,
    SAVES,
    TRACKER,
    Hashes,
    Recipe,
    changed_files,
    check_manifest,
    hash_tree,
    is_stage,
    read_manifest,
    recorded,
)
from mpo.runtime.trackers import Tracker

PACKAGES = ("torch", "numpy", "sentencepiece", "safetensors", "tqdm")
ABOUT = "about.json"  # in a save: what it holds, and what it was made from (saves.py)
WITH_REDO = "REDO=1 (without make: --overwrite true)"


def peak_memory_mb() -> float:
    """The most memory that this process has used so far, in MB."""
    try:  # on Linux, getrusage would also count the program that started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)
    except (OSError, IndexError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def would_discard(out: str | Path, what: str, reasons: Sequence[str]) -> str:
    """The refusal of a stage that would discard work (`what`) that was made with other flags or inputs."""
    return (
        f"--out {out}: holds {what}, but {'; '.join(reasons)}. Go on with the old flags and inputs, take another "
        f"folder (RUN), or discard what is there with {WITH_REDO}"
    )


def script_of(config: Any) -> str:
    """The name of the script that has these flags. The program that runs may be another one, such as `mpo dpo`."""
    program = Path(sys.argv[0]).stem.removeprefix("mpo ")
    return next((script for script, flags in STAGES.items() if flags is type(config)), program)


class Stage:
    """A stage's output folder: stage.json (its flags) is written first, then metrics.jsonl, manifest.json last."""

    def __init__(self, config: Any, inputs: Mapping[str, str], out: str, overwrite: bool):
        """Open the folder, for this process alone.

        Args:
            config: the stage's flags.
            inputs: the files and folders that this stage reads, by flag.
            out: the folder.
            overwrite: whether to discard what is there if it was made with other flags or inputs.

        Raises:
            InputError: an input is missing or differs from its manifest; or `out` is not a stage's folder, another
                process works on it, or it holds a stage or saves that were made with other flags or inputs.
            UpToDate: the stage is finished, with these flags and inputs.
        """
        self.out, self.name = Path(out), Path(out).name
        self.manifest = self.out / MANIFEST
        self.config, self.inputs = config, dict(inputs)
        self.started, self.earlier = time.time(), 0.0  # earlier: seconds spent before an interruption
        self.lock: Lock | None = None  # only the main process holds it
        self.tracker: Tracker | None = None  # with --log, from the first step on
        self.input_hashes = distributed.from_main(lambda: self._open(overwrite))

    @property
    def recipe(self) -> Recipe:
        """What the result of this stage depends on."""
        return Recipe.of(asdict(self.config), self.input_hashes)

    def _open(self, overwrite: bool) -> dict[str, Hashes]:
        """Check inputs and folder, and mark the folder as unfinished; returns the inputs' hashes."""
        for name, path in self.inputs.items():
            if not Path(path).exists():
                raise InputError(f"--{name} {path}: no such file or folder; has the stage that writes it run?")
        try:
            self._claim()
            self.input_hashes = {name: hash_tree(Path(path)) for name, path in self.inputs.items()}
            for name, path in self.inputs.items():
                check_manifest(Path(path), self.input_hashes[name])
                self.input_hashes[name].pop(FLAGS, None)  # the content of an input counts, not how it was made
            self._keep_or_discard(overwrite)
            self._empty()
        except OSError as e:
            raise RunError(f"--out {self.out}: cannot be written ({e.strerror})") from None
        return self.input_hashes

    def _claim(self) -> None:
        """Make the folder if it is not there, and lock it. Raises InputError for a folder that is not a stage's."""
        if self.out.is_symlink() and not self.out.exists():
            raise InputError(f"--out {self.out}: is a link to {os.readlink(self.out)}, which is not there")
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out {self.out}: is not a folder")
        if self._belongs_to_another_run():
            return
        self.out.mkdir(parents=True, exist_ok=True)
        if not is_stage(self.out) and any(not p.name.startswith(".") for p in self.out.iterdir()):
            raise InputError(f"--out {self.out}: holds files that no stage has written; name another folder")
        self.lock = Lock(self.out)

    def _belongs_to_another_run(self) -> bool:
        """Whether the folder is a link to a finished stage (make FROM=...), which is never written to."""
        return self.out.is_symlink() and self.manifest.exists()

    def _keep_or_discard(self, overwrite: bool) -> None:
        """Decide what becomes of the work that is in the folder already.

        Raises UpToDate if this stage is finished, and InputError if work would be lost without `overwrite`.
        """
        outputs: Hashes = {}
        if self.manifest.exists():
            manifest = read_manifest(self.manifest)
            outputs = manifest["outputs"]
            reasons = recorded(manifest).differences(self.recipe)
            if not reasons:
                reasons = [f"its {fault}" for fault in changed_files(outputs, hash_tree(self.out))]
            if not reasons:
                os.utime(self.manifest)  # so that make, too, sees it as newer than its inputs
                raise UpToDate(f"{self.out}: is finished, with these flags and inputs")
            what = "a finished stage"
        else:
            what, reasons = "the saves of an unfinished stage", self._saves_differ()
        if not reasons or self._belongs_to_another_run():
            return
        if not overwrite:
            raise InputError(would_discard(self.out, what, reasons))
        print(f"{self.name}: discards {what} in {self.out}: {'; '.join(reasons)}")
        self._discard(outputs)

    def _discard(self, outputs: Hashes) -> None:
        """Remove saves, and the files that a finished stage has written, so that no old file is among the new ones."""
        self.manifest.unlink(missing_ok=True)
        (self.out / TRACKER).unlink(missing_ok=True)
        shutil.rmtree(self.out / SAVES, ignore_errors=True)
        for name in outputs.keys() - {FLAGS}:  # without stage.json the folder would not be ours
            path = self.out / name
            if path.resolve().is_relative_to(self.out.resolve()):
                path.unlink(missing_ok=True)

    def _saves_differ(self) -> list[str]:
        """How the last readable save of an unfinished stage differs from this one; empty if there is no such save."""
        for about in sorted((self.out / SAVES).glob(f"step-*/{ABOUT}"), reverse=True):
            try:
                made = read_json(about)
                return Recipe(dict(made["flags"]), dict(made["inputs"])).differences(self.recipe)
            except (InputError, KeyError, TypeError, ValueError):
                continue  # damaged; saves.py reports it
        return []

    def _empty(self) -> None:
        """Remove from the folder what a finished or interrupted run left, except saves."""
        if self._belongs_to_another_run():
            self.out.unlink()
            self._claim()
        self.manifest.unlink(missing_ok=True)
        for partial in list(self.out.rglob(".*.partial")):  # left by a write that was killed
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        if not (self.out / SAVES).is_dir():
            self.forget(0)
        write_json(self.out / FLAGS, asdict(self.config))  # not config.json, which is the model's
        signals.promise("begins this stage again")

    def forget(self, step: int) -> None:
        """Remove the metrics and intermediate models of all steps after `step`."""
        metrics = self.out / METRICS
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
        """Append the metrics of one step to metrics.jsonl and, with --log, send them to a tracker."""
        if not distributed.is_main():
            return
        line = json.dumps({"step": step, **finite({k: round(float(v), 6) for k, v in metrics.items()})}) + "\n"
        try:
            with (self.out / METRICS).open("a", encoding="utf-8") as f:
                f.write(line)
        except OSError as e:
            raise RunError(f"{self.out / 'metrics.jsonl'}: cannot be written ({e.strerror})") from None
        if (name := getattr(self.config, "log", "none")) != "none":
            self.tracker = self.tracker or self._new_tracker(name)
            self.tracker.log(step, metrics)

    def _new_tracker(self, name: str) -> Tracker:
        recipe = hashlib.sha256(json.dumps(asdict(self.recipe), sort_keys=True).encode()).hexdigest()
        return Tracker(name, self.out, asdict(self.config), recipe)

    def _about_input(self, name: str, path: str) -> dict[str, Any]:
        """What the manifest says of an input; of one from a hub, also the commit that was downloaded."""
        hub = Path(path) / HUB
        return {"path": path, "sha256": self.input_hashes[name], **({"hub": read_json(hub)} if hub.is_file() else {})}

    def finish(self, **results: Any) -> None:
        """Write the manifest, which declares the stage finished."""
        here = device.peak_memory_mb()
        peak, on_device = distributed.all_max([peak_memory_mb(), here or 0.0])
        if not distributed.is_main():
            return
        write_json(
            self.manifest,
            {
                "stage": script_of(self.config),
                "config": asdict(self.config),
                "inputs": {n: self._about_input(n, p) for n, p in self.inputs.items()},
                "outputs": hash_tree(self.out),
                "results": finite(results),
                "seconds": round(self.seconds, 1),
                "processes": distributed.world_size(),
                "peak_memory_mb": peak,  # of the process that used most
                **({} if here is None else {"peak_device_memory_mb": on_device}),
                "python": platform.python_version(),
                "packages": {p: importlib.metadata.version(p) for p in PACKAGES},
            },
        )
        shutil.rmtree(self.out / SAVES, ignore_errors=True)
        (self.out / TRACKER).unlink(missing_ok=True)
        if self.tracker:
            self.tracker.close()
        if self.lock:
            self.lock.release()
