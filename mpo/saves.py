"""Saves of an unfinished stage: all that the rest of it depends on, in one safetensors file, whole or not at all.

Every random choice is keyed by (seed, purpose, step), batches follow from the seed and learning rates from the step:
so the step alone stands for generators, data cursor and schedules. What is left are the weights, the optimisers'
moments and a few numbers. A stage that was killed and goes on from its last save ends with the same bytes as one that
ran through.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mpo import interrupts
from mpo.config import Training
from mpo.errors import InputError, Interrupted, RunError
from mpo.files import sync, whole
from mpo.stage import SAVES, Stage

Numbers = dict[str, Any]  # what JSON can hold
Optimiser = torch.optim.Optimizer
# Flags that a stage's result does not depend on.
CHANGES_NOTHING = {"out", "overwrite", "threads", "save_every", "saves"}
SHARE = 0.05  # of the time at most is spent on saving


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
        for path in sorted(self.folder.glob("step-*.safetensors"), reverse=True):
            try:
                step, numbers = self._read(path)
                print(f"{self.stage.name}: going on behind step {step} of an interrupted try ({path})")
                break
            except InputError as e:
                print(f"{self.stage.name}: {e}; it is left out", file=sys.stderr)
                path.unlink()
        self.stage.forget(step)
        interrupts.defer(True)
        return step, numbers

    def behind(self, step: int, numbers: Numbers, last: bool) -> None:
        """Called behind every step: save where that is due or the stage is asked to stop.

        Errors: Interrupted, behind a save, where a signal came; RunError where it cannot be written.
        """
        stopped = interrupts.received()
        if last or stopped or self._due():
            self.write(step, numbers)
        if last:
            interrupts.defer(False)
        if stopped:
            raise Interrupted(stopped, f" behind step {step}, which is saved")

    def _due(self) -> bool:
        wait = self.config.save_every and max(self.config.save_every, self.cost / SHARE)
        return time.monotonic() - self.at >= wait

    def before(self, step: int, numbers: Numbers) -> Path | None:
        """Save what a step that failed began with, None where that is not good either."""
        interrupts.defer(False)
        try:
            return self.write(step, numbers)
        except RunError:
            return None

    def write(self, step: int, numbers: Numbers) -> Path:
        """Save now, and drop all but the last few saves."""
        began = time.monotonic()
        tensors = dict(self._tensors())
        if bad := next((name for name, t in tensors.items() if not torch.isfinite(t).all()), None):
            raise RunError(f"{self.stage.name}: {bad} is not finite behind step {step}; not saved. Lower --lr")
        about = {"step": str(step), "key": self.key, "numbers": json.dumps(numbers), "seconds": str(self.stage.seconds)}
        path, metrics = self.folder / f"step-{step:08d}.safetensors", self.stage.out / "metrics.jsonl"
        if metrics.exists():
            sync(metrics)  # its lines up to here belong to the save
        with whole(path) as partial:
            save_file(tensors, partial, about | {"sha256": _digest(tensors)})
        for old in sorted(self.folder.glob("step-*.safetensors"))[: -self.config.saves]:
            old.unlink()
        self.at = time.monotonic()
        self.cost = self.at - began
        return path

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, part in self.parts.items():
            for key, value in _weights(part.model).items():
                yield f"{name}/weight/{key}", value.detach().contiguous()
            for key, p in part.model.named_parameters():
                state = part.optimiser.state.get(p, {}) if part.optimiser else {}
                for moment, value in state.items():
                    yield f"{name}/{moment}/{key}", value.contiguous()

    @torch.no_grad()
    def _read(self, path: Path) -> tuple[int, Numbers]:
        """Into the models and optimisers, when all of it has been found good."""
        try:
            with safe_open(path, framework="pt") as f:
                about, tensors = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise InputError(f"{path}: not a whole safetensors file ({e})") from None
        if about.get("key") != self.key:
            raise InputError(f"{path}: made with other flags or inputs")
        if about.get("sha256") != _digest(tensors):
            raise InputError(f"{path}: its content is damaged (another hash)")
        weights, moments = [], []
        for name, part in self.parts.items():
            for key, value in _weights(part.model).items():
                weights.append((value, _shaped(path, tensors, f"{name}/weight/{key}", value)))
            kinds = {n.split("/")[1] for n in tensors if n.startswith(f"{name}/")} - {"weight"}
            for key, p in part.model.named_parameters() if part.optimiser else ():
                moments.append((part, p, {m: tensors[at] for m in kinds if (at := f"{name}/{m}/{key}") in tensors}))
        for value, saved in weights:
            value.copy_(saved)
        for part, p, state in moments:
            if part.optimiser and state:
                part.optimiser.state[p] = state
        self.stage.earlier = float(about["seconds"])
        return int(about["step"]), json.loads(about["numbers"])


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, a shared one once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _shaped(path: Path, tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    if name not in tensors or tensors[name].shape != like.shape:
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        raise InputError(f"{path}: {name} is {found}, this model has {tuple(like.shape)}")
    return tensors[name]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
