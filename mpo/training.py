"""The loop that SFT, reward model and DPO share, and the microbatches that PPO uses, too."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import kernels
from mpo import device, parallel
from mpo.checkpoint import save_model
from mpo.config import Common, Limits, Training, exact_div
from mpo.data.batches import Pair, shuffled_batches
from mpo.errors import InputError
from mpo.guards import NotFinite, agree_finite, failure, not_finite
from mpo.model import Llama, ScalarModel, configure_layers
from mpo.optimisers import learning_rate, make_optimiser, optimiser_step
from mpo.progress import progress
from mpo.saves import Part, Saves
from mpo.stage import Stage

Metrics = dict[str, Tensor]
Losses = Callable[[list[Pair]], tuple[Tensor, Metrics]]
"""Microbatch of b pairs -> their losses (b,), and metrics (b,) each."""


class Memory(Protocol):
    """What a loss remembers from step to step, besides weights (train_dpo.RunningMean)."""

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""


def keep_freed_memory() -> None:
    """Let glibc hand freed tensors out again instead of giving them back to the system.

    By default every large tensor is a mapping of its own, whose pages the kernel clears at each first
    touch: much of a small model's step.
    """
    mmap_max, trim_threshold = -4, -1  # mallopt's names for them (malloc.h)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def setup_torch(config: Common) -> None:
    """Threads, memory, precision, and denormals flushed (they slow small models down a hundredfold)."""
    if kernels.default not in (None, *kernels.IMPLEMENTATIONS):
        raise InputError(f"MPO_KERNELS={kernels.default}: expected one of {', '.join(kernels.IMPLEMENTATIONS)} here")
    if isinstance(config, Limits):
        device.start(config.device, config.dtype, config.deterministic)
    parallel.start(getattr(config, "shard", False))
    torch.set_num_threads(config.threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    torch.set_flush_denormal(True)
    kernels.use_bf16(getattr(config, "bf16", False))
    if not getattr(config, "recompute", False):  # which wants memory back, and not in pieces
        keep_freed_memory()


def batches_of(pairs: Sequence[Pair], batch: int, epochs: float, seed: int, steps: int = 0) -> list[list[Pair]]:
    """All batches of a run in order: `steps` of them, or as many as `epochs` (or a part of one) make."""
    if len(pairs) < batch:
        raise InputError(f"{len(pairs)} rows do not fill one batch of {batch}; lower --batch or bring more rows")

    def forever() -> Iterator[list[Pair]]:
        epoch = 0
        while True:
            yield from shuffled_batches(pairs, batch, seed, epoch)
            epoch += 1

    per_epoch = sum(1 for _ in shuffled_batches(pairs, batch, seed, 0))
    endless = forever()
    return [next(endless) for _ in range(steps or max(1, round(per_epoch * epochs)))]


def short_rest(pairs: Sequence[Pair], batch: int) -> dict[str, int]:
    """How many rows every epoch leaves out, other ones each time, since they fill no batch."""
    rest = len(pairs) % batch
    return {"left out of each epoch: no full batch": rest} if rest else {}


def milestones(steps: int, keep: int) -> dict[int, str]:
    """After which steps a model is kept on the way, and the name of its folder."""
    at = {round(steps * i / (keep + 1)) for i in range(1, keep + 1)} - {0, steps}
    return {step: f"step-{step}" for step in sorted(at)}


def microbatches(rows: int, microbatch: int, models: Sequence[nn.Module]) -> Iterator[list[int]]:
    """This process's share of a batch's rows, as many at a time as fit; gradients are put together behind the last.

    Errors: InputError where the processes do not divide the rows, or the microbatch a share.
    """
    mine = parallel.exact_share(rows, "the rows of an optimiser step")
    each = min(microbatch, len(mine))
    for i in range(exact_div(len(mine), each, "the rows of an optimiser step and --microbatch")):
        for model in models:
            parallel.synchronise(model, (i + 1) * each == len(mine))
        yield mine[i * each : (i + 1) * each]


def accumulate(
    model: nn.Module, batch: list[Pair], losses_of: Losses, units: Callable[[Pair], float], microbatch: int
) -> dict[str, float]:
    """Add the gradient of the batch's mean loss, microbatch by microbatch; returns means of loss and metrics.

    Losses and metrics are divided by the number of units (tokens or pairs) of the whole batch, so
    that 1 x 8 and 8 x 1 microbatches give the same gradient, in any number of processes (whose gradients are averaged).
    Errors: NotFinite, in all of them.
    """
    total = sum(units(pair) for pair in batch)
    metrics: dict[str, float] = {}
    bad = list[int]()
    for index in microbatches(len(batch), microbatch, [model]):
        losses, more = losses_of([batch[i] for i in index])
        bad += not_finite(losses, index)
        (losses.sum() * (parallel.count() / total)).backward()
        for name, values in {"loss": losses.detach(), **more}.items():
            metrics[name] = metrics.get(name, 0.0) + float(values.sum()) / total
    agree_finite("the loss", bad)
    return parallel.sums(metrics)


def train(
    model: Llama | ScalarModel,
    batches: Sequence[list[Pair]],
    losses_of: Losses,
    units: Callable[[Pair], float],
    config: Training,
    stage: Stage,
    keep: int = 0,
    memory: Memory | None = None,
) -> dict[str, float]:
    """Run every batch once, from where an interrupted try was; returns the means of the last tenth of the steps.

    `units`: by whose number losses are divided (`accumulate`). `keep` models are kept on the way.
    Errors: RunError, before a weight is touched, where a loss or gradient is not finite.
    """
    exact_div(config.batch, config.microbatch, "--batch and --microbatch")
    parallel.learns(model)
    configure_layers(model, config.recompute, config.compile)
    optimiser = make_optimiser(model, config.lr, config.weight_decay, kind=config.optimiser)
    saves = Saves(stage, config, {"model": Part(model, optimiser)})
    done, numbers = saves.restore({"recent": [], "memory": memory.state() if memory else {}})
    recent: list[dict[str, float]] = numbers["recent"]
    if memory:
        memory.restore(numbers["memory"])
    model.train()
    kept = milestones(len(batches), keep)
    bar = progress(range(done, len(batches)), stage.name, done)
    for step in bar:
        try:
            metrics = accumulate(model, batches[step], losses_of, units, config.microbatch)
            lr = learning_rate(step, len(batches), config.lr, config.warmup, config.final_lr)
            metrics |= {"grad_norm": optimiser_step(optimiser, model, lr, config.grad_clip), "lr": lr}
        except NotFinite as e:
            rows = [
                {"id": p.row.id, "prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in batches[step]
            ]
            raise failure(stage, step, e, rows, saves.before(step, numbers)) from None
        stage.log(step, metrics)
        if step + 1 in kept:
            save_model(stage.out / kept[step + 1], model)
        recent = [*recent[-max(1, len(batches) // 10) :], metrics]
        numbers = {"recent": recent, "memory": memory.state() if memory else {}}
        saves.behind(step + 1, numbers, last=step + 1 == len(batches))
        shown = [name for name in ("loss", "accuracy") if name in metrics]
        bar.set_postfix({name: f"{sum(m[name] for m in recent) / len(recent):.3f}" for name in shown}, refresh=False)
    return {name: sum(m[name] for m in recent) / len(recent) for name in recent[-1]}
