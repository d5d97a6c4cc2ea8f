"""Optimisers: torch's AdamW by default; to save memory, AdamW on bf16 weights, and Adafactor.

A bf16 weight has 8 significant bits. Rounded to the nearest, it would lose every change smaller than 1/512 of it. So
it is rounded up or down at random, with probabilities that make it right on average (2010.06192).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mpo.runtime import distributed
from mpo.runtime.errors import InputError
from mpo.runtime.seeding import generator
from mpo.training.guards import NotFinite

BETAS = 0.9, 0.95
State = dict[str, Tensor]


def learning_rate(step: int, steps: int, peak: float, warmup: float, final: float) -> float:
    """Linear warm-up over a share of the steps, then a cosine down to `final` * peak."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimiser(
    model: nn.Module, lr: float, weight_decay: float, eps: float = 1e-8, kind: str = "adamw"
) -> torch.optim.Optimizer:
    """AdamW or Adafactor for the trained weights of a model, with weight decay on matrices only.

    Raises InputError for Adafactor on sharded weights, whose columns no process has whole.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, rest = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if kind == "adafactor" and any(distributed.local_tensor(p) is not p for p in trained):
        raise InputError("--optimiser adafactor: does not work on sharded weights; take adamw, or leave out --shard")
    if kind == "adamw" and all(p.dtype == torch.float32 for p in trained):
        return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=eps, fused=True)
    return LowMemory(groups, {"adamw": adamw, "adafactor": adafactor}[kind], lr, eps)


def optimiser_step(optimiser: torch.optim.Optimizer, model: nn.Module, lr: float, grad_clip: float) -> float:
    """Clip the gradient, take one step at this learning rate, clear the gradient; returns its norm before clipping.

    `grad_clip` is the largest norm that is left as it is; with 0, every gradient is. Raises NotFinite when the
    gradient is not finite; no weight has been changed then.
    """
    most = grad_clip or math.inf
    norm = float(distributed.full_tensor(nn.utils.clip_grad_norm_(model.parameters(), most)))
    if not math.isfinite(norm):
        raise NotFinite("the gradient", [])
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    optimiser.zero_grad()
    return norm


def adamw(g: Tensor, state: State, t: int, eps: float) -> Tensor:
    """1711.05101: m / (sqrt(v) + eps), running means of g and g^2, corrected for their start at 0."""
    b1, b2 = BETAS
    m, v = (state[name] for name in ("exp_avg", "exp_avg_sq"))
    m.lerp_(g, 1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    return (m / (1 - b1**t)).div_((v / (1 - b2**t)).sqrt_().add_(eps))


def adafactor(g: Tensor, state: State, t: int, eps: float) -> Tensor:
    """1804.04235, algorithm 4, without its step size: g / sqrt(v), clipped to root mean square 1.

    v is a running mean of g^2; of a matrix only its row and column means are kept, and v = R C / mean(R).
    """
    decay, square = 1 - t**-0.8, g * g + 1e-30
    if g.dim() < 2:
        v = state["exp_avg_sq"].lerp_(square, 1 - decay)
    else:
        rows = state["rows"].lerp_(square.mean(1), 1 - decay)
        columns = state["columns"].lerp_(square.mean(0), 1 - decay)
        v = rows[:, None] * columns / rows.mean()
    update = g / v.sqrt()
    return update / max(1.0, float(update.square().mean().sqrt()))


def rounded(x: Tensor, draw: torch.Generator) -> Tensor:
    """fp32 to bf16, up or down at random: add a random number of 16 bits, then cut off the last 16 bits."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=draw, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


class LowMemory(torch.optim.Optimizer):
    """An update rule for weights of any dtype: one weight after the other is converted to fp32, changed and rounded."""

    def __init__(self, groups: Any, rule: Callable[[Tensor, State, int, float], Tensor], lr: float, eps: float):
        """`rule`: (gradient, its state, step number, eps) -> what is subtracted, after multiplying by lr."""
        super().__init__(groups, {"lr": lr})
        self.rule, self.eps = rule, eps

    def _begin(self, p: Tensor) -> State:
        if self.rule is adafactor and p.dim() > 1:
            made = {"rows": p.new_zeros(len(p), dtype=torch.float32)}
            made["columns"] = p.new_zeros(p.shape[1], dtype=torch.float32)
        else:
            names = ("exp_avg", "exp_avg_sq")[self.rule is adafactor :]
            made = {name: torch.zeros_like(p.detach(), dtype=torch.float32) for name in names}
        return made | {"step": torch.zeros(())}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                number += 1
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p] = self._begin(p)
                state = self.state[p]
                state["step"] += 1
                t = int(state["step"])
                local: State = {name: distributed.local_tensor(value) for name, value in state.items()}
                weight = distributed.local_tensor(p)
                wide = weight.float() * (1 - group["lr"] * group["weight_decay"])
                wide -= group["lr"] * self.rule(distributed.local_tensor(p.grad).float(), local, t, self.eps)
                weight.copy_(
                    wide
                    if weight.dtype == torch.float32
                    else rounded(wide, generator(t, "rounding", number, weight.device))
                )
