"""The loop that SFT, reward model and DPO share, and the optimiser step that PPO calls too."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import kernels
from mpo.artifacts import Stage
from mpo.checkpoint import save_model
from mpo.config import Common, Training, exact_div
from mpo.data.batches import Pair, shuffled_batches
from mpo.errors import InputError
from mpo.model import Llama, ScalarModel
from mpo.progress import progress

Metrics = dict[str, Tensor]
LossSums = Callable[[list[Pair]], tuple[Tensor, Metrics]]
"""Microbatch -> the sum of its losses, and the sums of its metrics."""


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
    torch.set_num_threads(config.threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    torch.set_flush_denormal(True)
    kernels.use_bf16(getattr(config, "bf16", False))
    keep_freed_memory()


def adamw(model: nn.Module, lr: float, weight_decay: float, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps, fused=True)


def learning_rate(step: int, steps: int, peak: float, warmup: float, final: float) -> float:
    """Linear warm-up over a share of the steps, then a cosine down to `final` * peak."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))


def optimiser_step(optimiser: torch.optim.Optimizer, model: nn.Module, lr: float, grad_clip: float) -> float:
    """Clip the gradient, take one step at this learning rate, clear; returns the norm before clipping.

    Errors: InputError when the gradient is not finite, before it touches a weight.
    """
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), grad_clip))
    if not math.isfinite(norm):
        raise InputError(f"the gradient is {norm}: no step was taken; lower --lr or look at the last batch")
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    optimiser.zero_grad()
    return norm


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


def milestones(steps: int, keep: int) -> dict[int, str]:
    """After which steps a model is kept on the way, and the name of its folder."""
    at = {round(steps * i / (keep + 1)) for i in range(1, keep + 1)} - {0, steps}
    return {step: f"step-{step}" for step in sorted(at)}


def train(
    model: Llama | ScalarModel,
    batches: Sequence[list[Pair]],
    loss_sums: LossSums,
    units: Callable[[Pair], float],
    config: Training,
    stage: Stage,
    keep: int = 0,
) -> dict[str, float]:
    """Run every batch once; returns the means of the last tenth of the steps.

    Losses and metrics are divided by the number of units (tokens or pairs) of the whole batch, so
    that 1 x 8 and 8 x 1 microbatches give the same gradient. `keep` models are kept on the way.
    """
    exact_div(config.batch, config.microbatch, "--batch and --microbatch")
    optimiser = adamw(model, config.lr, config.weight_decay)
    model.train()
    kept = milestones(len(batches), keep)
    recent: list[dict[str, float]] = []
    bar = progress(batches, stage.out.name)
    for step, batch in enumerate(bar):
        total = sum(units(pair) for pair in batch)
        metrics: dict[str, float] = {"loss": 0.0}
        for start in range(0, len(batch), config.microbatch):
            loss, sums = loss_sums(batch[start : start + config.microbatch])
            (loss / total).backward()
            for name, value in {"loss": loss.detach(), **sums}.items():
                metrics[name] = metrics.get(name, 0.0) + float(value) / total
        lr = learning_rate(step, len(batches), config.lr, config.warmup, config.final_lr)
        metrics |= {"grad_norm": optimiser_step(optimiser, model, lr, config.grad_clip), "lr": lr}
        stage.log(step, metrics)
        if step + 1 in kept:
            save_model(stage.out / kept[step + 1], model)
        recent = [*recent[-max(1, len(batches) // 10) :], metrics]
        shown = [name for name in ("loss", "accuracy") if name in metrics]
        bar.set_postfix({name: f"{sum(m[name] for m in recent) / len(recent):.3f}" for name in shown}, refresh=False)
    return {name: sum(m[name] for m in recent) / len(recent) for name in recent[-1]}
