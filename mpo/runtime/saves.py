"""Saves of an unfinished stage: everything that the rest of the stage depends on, in one folder.

Every random choice is keyed by (seed, purpose, step), batches follow from the seed, and learning rates from the step.
So the step number stands for generators, data cursor and schedules, and a save holds besides it only weights, the
optimisers' moments and a few numbers. A stage that is killed and goes on from its last save ends with the same bytes
as one that was never interrupted; with another number of processes, with the same numbers up to rounding.
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

from mpo.config import Training
from mpo.runtime import distributed, signals, tensor_files
from mpo.runtime.errors import InputError, Interrupted, RunError
from mpo.runtime.files import atomic_folder, read_json, sha256, sync, write_json
from mpo.runtime.manifest import SAVES, Recipe
from mpo.runtime.stage import ABOUT, Stage

Numbers = dict[str, Any]  # what JSON can hold
Optimiser = torch.optim.Optimizer
KEPT = 2  # saves that are kept until the stage is finished
SHARE = 0.05  # largest share of the time that saving may take


class Part(NamedTuple):
    """A model to save, with its optimiser if it has one."""

    model: nn.Module
    optimiser: Optimiser | None = None


class Saves:
    """The saves of one stage, and when the next one is due."""

    def __init__(self, stage: Stage, config: Training, parts: Mapping[str, Part]):
        """`parts`: what a save holds, by name."""
        self.stage, self.config, self.parts = stage, config, parts
        self.folder = stage.out / SAVES
        self.last_at, self.last_cost = time.monotonic(), 0.0  # when the last save ended, and how long it took

    def restore(self, numbers: Numbers, steps: int) -> tuple[int, Numbers]:
        """Continue from the last save: returns the steps done and the saved numbers, or (0, numbers) without one.

        From here until all `steps` are done, signals wait for the end of a step (signals.py).
        """
        step = 0
        if newest := distributed.from_main(self._newest):
            path, about = newest
            self._fill(path)
            self.stage.earlier = about["seconds"]
            step, numbers = about["step"], json.loads(about["numbers"])
            print(f"{self.stage.name}: going on after step {step}, from {path}")
            signals.promise(f"goes on after step {step}")
        distributed.from_main(lambda: self.stage.forget(step))
        signals.defer(step < steps)
        return step, numbers

    def after(self, step: int, numbers: Numbers, last: bool) -> None:
        """To be called after every step: saves where that is due or a signal came.

        Raises Interrupted, after saving, where a signal came; RunError where the save cannot be written.
        """
        stopped, due = distributed.all_max([signals.received(), self._due()])
        if last or stopped or due:
            self.write(step, numbers)
        if last:
            signals.defer(False)
        if stopped:
            raise Interrupted(int(stopped), f" after step {step}, which is saved; the same command goes on from there")

    def _due(self) -> bool:
        wait = self.config.save_every and max(self.config.save_every, self.last_cost / SHARE)
        return time.monotonic() - self.last_at >= wait

    def before(self, step: int, numbers: Numbers) -> Path | None:
        """Save the state before step `step`, which failed, so that it can be repeated; None where that fails, too."""
        try:
            return self.write(step, numbers)
        except RunError:
            return None

    def write(self, step: int, numbers: Numbers) -> Path:
        """Save now, and remove all but the last few saves."""
        began = time.monotonic()
        tensors = dict(self._tensors())
        broken = [i for i, t in enumerate(tensors.values()) if not torch.isfinite(distributed.local_tensor(t)).all()]
        if worst := int(distributed.all_max([max(broken, default=-1) + 1])[0]):
            name = list(tensors)[worst - 1]
            raise RunError(f"{self.stage.name}: {name} is not finite after step {step}; not saved. Lower --lr")
        path, metrics = self.folder / f"step-{step:08d}", self.stage.out / "metrics.jsonl"
        if metrics.exists():
            sync(metrics)  # the lines so far belong to this save
        with atomic_folder(path) as partial:
            tensor_files.write(partial, tensors)
            if distributed.is_main():
                hashes = {file.name: sha256(file) for file in sorted(partial.glob("*.safetensors"))}
                about = {"step": step, **asdict(self.stage.recipe), "seconds": self.stage.seconds, "sha256": hashes}
                about["numbers"] = json.dumps(numbers)  # as a string, since some may be NaN
                write_json(partial / ABOUT, about | {"check": _digest(about)})
        if distributed.is_main():
            for old in sorted(self.folder.glob("step-*"))[:-KEPT]:
                shutil.rmtree(old)
        signals.promise(f"goes on after step {step}")
        self.last_at = time.monotonic()
        self.last_cost = self.last_at - began
        return path

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, part in self.parts.items():
            distributed.reshard(part.model)
            for key, value in _weights(part.model).items():
                yield f"{name}/weight/{key}", value.detach().contiguous()
            for key, p in part.model.named_parameters():
                state = part.optimiser.state.get(p, {}) if part.optimiser else {}
                for moment, value in state.items():
                    yield f"{name}/{moment}/{key}", value.contiguous()

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The last complete save of this stage, and its about.json. Damaged saves are set aside under another name."""
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                return path, self._checked(path)
            except InputError as e:
                aside = path.with_name(f"damaged-{path.name}-{time.time_ns()}")
                print(f"{self.stage.name}: {e}; it is not used, and kept as {aside.name}", file=sys.stderr)
                path.rename(aside)
        return None

    def _checked(self, path: Path) -> dict[str, Any]:
        """A save's about.json, once the whole save has been checked. Raises InputError."""
        about = read_json(path / ABOUT)
        if not isinstance(about, dict) or about.pop("check", None) != _digest(about):
            raise InputError(f"{path / ABOUT}: damaged, or not the description of a save")
        if differences := Recipe(about["flags"], about["inputs"]).differences(self.stage.recipe):
            raise InputError(f"{path}: made with other flags or inputs ({'; '.join(differences)})")
        hashes = {file.name: sha256(file) for file in path.glob("*.safetensors")}
        if hashes != about["sha256"]:
            raise InputError(f"{path}: its content is damaged (another hash)")
        try:
            saved = tensor_files.shapes(path)
        except (SafetensorError, OSError, KeyError, ValueError) as e:
            raise InputError(f"{path}: not safetensors ({e})") from None
        for name, part in self.parts.items():
            for key, value in _weights(part.model).items():
                shape = saved.get(f"{name}/weight/{key}")
                if shape != tuple(value.shape):
                    raise InputError(f"{path}: {name}/weight/{key} is {shape}, this model has {tuple(value.shape)}")
        return about

    def _fill(self, path: Path) -> None:
        """Fill models and optimisers from a save that has been checked."""
        saved, targets = tensor_files.shapes(path), dict[str, Tensor]()
        for name, part in self.parts.items():
            distributed.reshard(part.model)
            targets |= {f"{name}/weight/{key}": value.detach() for key, value in _weights(part.model).items()}
            moments = sorted({n.split("/")[1] for n in saved if n.startswith(f"{name}/")} - {"weight"})
            for key, p in part.model.named_parameters() if part.optimiser else ():
                names = {m: f"{name}/{m}/{key}" for m in moments if f"{name}/{m}/{key}" in saved}
                state = {m: _empty_moment(p, saved[at]) for m, at in names.items()}
                if part.optimiser and state:
                    part.optimiser.state[p] = state
                targets |= {at: state[m] for m, at in names.items()}
        tensor_files.read(path, targets)


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _empty_moment(p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An fp32 tensor for an optimiser's moment of `p`, sharded like it if it has its shape."""
    if shape == p.shape:
        return torch.zeros_like(p.detach(), dtype=torch.float32)
    return distributed.local_tensor(p.detach()).new_zeros(shape, dtype=torch.float32)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Buffers and trained parameters, tied ones once."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())
