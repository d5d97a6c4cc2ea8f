"""Saves of an unfinished stage: all that the rest of it depends on, in one folder, whole or not at all.

Every random choice is keyed by (seed, purpose, step), batches follow from the seed and learning rates from the step:
so the step alone stands for generators, data cursor and schedules. What is left are the weights, the optimisers'
moments and a few numbers. A stage that was killed and goes on from its last save ends with the same bytes as one that
ran through; with another number of processes, with the same up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mpo import interrupts, parallel, shards
from mpo.config import Training
from mpo.errors import InputError, Interrupted, RunError
from mpo.files import read_json, sha256, sync, whole_folder, write_json
from mpo.stage import SAVES, Stage

Numbers = dict[str, Any]  # what JSON can hold
Optimiser = torch.optim.Optimizer
# Flags that a stage's result does not depend on, but for rounding.
CHANGES_NOTHING = {"out", "overwrite", "threads", "save_every", "saves", "plan"}
CHANGES_NOTHING |= {"shard", "recompute", "compile", "device", "deterministic"}
SHARE = 0.05  # of the time at most is spent on saving
ABOUT = "about.json"


class Part(NamedTuple):
    """A model that is saved, with its optimiser where it has one."""

    model: nn.Module
    optimiser: Optimiser | None = None


class Saves:
    """The saves of one stage, and when the next one is due."""

    def __init__(self, stage: Stage, config: Training, parts: Mapping[str, Part]):
        """`parts`: what the save holds, by name."""
        self.stage, self.config, self.parts = stage, config, parts
        self.folder = stage.out / SAVES
        flags = {k: v for k, v in asdict(config).items() if k not in CHANGES_NOTHING | stage.inputs.keys()}
        self.key = hashlib.sha256(json.dumps([flags, stage.input_hashes], sort_keys=True).encode()).hexdigest()
        self.at, self.cost = time.monotonic(), 0.0  # when the last save ended, and how long it took

    def restore(self, numbers: Numbers) -> tuple[int, Numbers]:
        """Go on where an interrupted try was: the steps that are done, and its numbers; (0, numbers) where none was.

        From here on signals wait for the end of a step (interrupts.py).
        """
        step = 0
        if found := parallel.from_first(self._newest):
            path, about = found
            self._fill(path)
            self.stage.earlier = about["seconds"]
            step, numbers = about["step"], json.loads(about["numbers"])
            print(f"{self.stage.name}: going on behind step {step} of an interrupted try ({path})")
        parallel.from_first(lambda: self.stage.forget(step))
        interrupts.defer(True)
        return step, numbers

    def behind(self, step: int, numbers: Numbers, last: bool) -> None:
        """Called behind every step: save where that is due or the stage is asked to stop.

        Errors: Interrupted, behind a save, where a signal came; RunError where it cannot be written.
        """
        stopped, due = parallel.most([interrupts.received(), self._due()])
        if last or stopped or due:
            self.write(step, numbers)
        if last:
            interrupts.defer(False)
        if stopped:
            raise Interrupted(int(stopped), f" behind step {step}, which is saved")

    def _due(self) -> bool:
        wait = self.config.save_every and max(self.config.save_every, self.cost / SHARE)
        return time.monotonic() - self.at >= wait

    def before(self, step: int, numbers: Numbers) -> Path | None:
        """Save what step `step` was about to change, so that it can be seen again; None where that fails, too."""
        try:
            return self.write(step, numbers)
        except RunError:
            return None

    def write(self, step: int, numbers: Numbers) -> Path:
        """Save now, and drop all but the last few saves."""
        began = time.monotonic()
        tensors = dict(self._tensors())
        broken = [i for i, t in enumerate(tensors.values()) if not torch.isfinite(parallel.local(t)).all()]
        if worst := int(parallel.most([max(broken, default=-1) + 1])[0]):
            name = list(tensors)[worst - 1]
            raise RunError(f"{self.stage.name}: {name} is not finite behind step {step}; not saved. Lower --lr")
        path, metrics = self.folder / f"step-{step:08d}", self.stage.out / "metrics.jsonl"
        if metrics.exists():
            sync(metrics)  # its lines up to here belong to the save
        with whole_folder(path) as partial:
            shards.write(partial, tensors)
            if parallel.first():
                hashes = {file.name: sha256(file) for file in sorted(partial.glob("*.safetensors"))}
                about = {"step": step, "key": self.key, "seconds": self.stage.seconds, "sha256": hashes}
                about["numbers"] = json.dumps(numbers)  # a string, since some may be NaN
                write_json(partial / ABOUT, about | {"check": _digest(about)})
        if parallel.first():
            for old in sorted(self.folder.glob("step-*"))[: -self.config.saves]:
                shutil.rmtree(old)
        self.at = time.monotonic()
        self.cost = self.at - began
        return path

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, part in self.parts.items():
            parallel.settle(part.model)
            for key, value in _weights(part.model).items():
                yield f"{name}/weight/{key}", value.detach().contiguous()
            for key, p in part.model.named_parameters():
                state = part.optimiser.state.get(p, {}) if part.optimiser else {}
                for moment, value in state.items():
                    yield f"{name}/{moment}/{key}", value.contiguous()

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The last save that is whole and of this stage, and what it says of itself; others are dropped."""
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                return path, self._checked(path)
            except InputError as e:
                print(f"{self.stage.name}: {e}; it is left out", file=sys.stderr)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return None

    def _checked(self, path: Path) -> dict[str, Any]:
        """What a save says of itself, when all of it has been found good."""
        about = read_json(path / ABOUT)
        if not isinstance(about, dict) or about.pop("check", None) != _digest(about):
            raise InputError(f"{path / ABOUT}: damaged, or not what a save says of itself")
        if about["key"] != self.key:
            raise InputError(f"{path}: made with other flags or inputs")
        hashes = {file.name: sha256(file) for file in path.glob("*.safetensors")}
        if hashes != about["sha256"]:
            raise InputError(f"{path}: its content is damaged (another hash)")
        try:
            saved = shards.shapes(path)
        except (SafetensorError, OSError, KeyError, ValueError) as e:
            raise InputError(f"{path}: not safetensors ({e})") from None
        for name, part in self.parts.items():
            for key, value in _weights(part.model).items():
                found = saved.get(f"{name}/weight/{key}")
                if found != tuple(value.shape):
                    raise InputError(f"{path}: {name}/weight/{key} is {found}, this model has {tuple(value.shape)}")
        return about

    def _fill(self, path: Path) -> None:
        """Models and optimisers, from a save that was checked."""
        saved, into = shards.shapes(path), dict[str, Tensor]()
        for name, part in self.parts.items():
            parallel.settle(part.model)
            into |= {f"{name}/weight/{key}": value.detach() for key, value in _weights(part.model).items()}
            moments = sorted({n.split("/")[1] for n in saved if n.startswith(f"{name}/")} - {"weight"})
            for key, p in part.model.named_parameters() if part.optimiser else ():
                names = {m: f"{name}/{m}/{key}" for m in moments if f"{name}/{m}/{key}" in saved}
                state = {m: _moment(p, saved[at]) for m, at in names.items()}
                if part.optimiser and state:
                    part.optimiser.state[p] = state
                into |= {at: state[m] for m, at in names.items()}
        shards.read(path, into)


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _moment(p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What an optimiser holds of a weight, in fp32: as much, which is sharded as it is, or less."""
    if shape == p.shape:
        return torch.zeros_like(p.detach(), dtype=torch.float32)
    return parallel.local(p.detach()).new_zeros(shape, dtype=torch.float32)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Buffers, and the parameters that learn (or all of a model that only follows another), a shared one once."""
    parameters = dict(model.named_parameters())
    learning = {name: p for name, p in parameters.items() if p.requires_grad}
    return (learning or parameters) | dict(model.named_buffers())
