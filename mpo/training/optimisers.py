"""Optimisers: torch's AdamW by default; Muon, in fewer steps from scratch; to save memory, Adafactor and bf16 weights.

A bf16 weight has 8 significant bits. Rounded to the nearest, it would lose every change smaller than 1/512 of it. So
it is rounded up or down at random, with probabilities that make it right on average (2010.06192).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpo.runtime import distributed
from mpo.runtime.errors import InputError
from mpo.runtime.seeding import generator
from mpo.training.guards import NotFinite

BETAS = 0.9, 0.95
MOMENTUM = 0.95  # Muon's
STACK = 2**22  # numbers of the matrices that Muon changes at once
State = dict[str, Tensor]


def learning_rate(step: int, steps: int, peak: float, warmup: float, final: float) -> float:
    """Linear warm-up over a share of the steps, then a line down to `final` * peak (to 0: 2502.15938)."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return peak * (1 - (1 - final) * done)


def make_optimiser(
    model: nn.Module, lr: float, weight_decay: float, eps: float = 1e-8, kind: str = "adamw"
) -> torch.optim.Optimizer:
    """AdamW, Muon or Adafactor for the trained weights of a model, with weight decay on matrices only.

    Raises InputError for Adafactor on sharded weights, whose columns no process has whole, and for Muon on adapters.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained = list(named.values())
    matrices, rest = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if kind == "muon":
        if any("lora_" in name for name in named):
            raise InputError("--optimiser muon: is for whole matrices, not for adapters; take adamw with --lora_rank")
        of_layers = [p for name, p in named.items() if p.dim() == 2 and "layers." in name]
        ids = {id(p) for p in of_layers}
        groups[0]["params"] = [p for p in matrices if id(p) not in ids]
        return Muon(of_layers, groups, lr, weight_decay, eps)
    if kind == "adafactor" and any(distributed.local_tensor(p) is not p for p in trained):
        raise InputError("--optimiser adafactor: does not work on sharded weights; take adamw, or leave out --shard")
    if kind == "adamw" and all(p.dtype == torch.float32 for p in trained):
        return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=eps, fused=True)
    return OneByOne(groups, {"adamw": adamw, "adafactor": adafactor}[kind], lr, eps)


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
        root = state["exp_avg_sq"].lerp_(square, 1 - decay).sqrt()
    else:
        rows = state["rows"].lerp_(square.mean(1), 1 - decay)
        columns = state["columns"].lerp_(square.mean(0), 1 - decay)
        # Not the root of the product, which would be 0 in the row of a token without a gradient.
        root = (rows / rows.mean()).sqrt()[:, None] * columns.sqrt()
    update = g / root
    return update / max(1.0, float(update.square().mean().sqrt()))


def newton_schulz(x: Tensor) -> Tensor:
    """Matrices (..., m, n) -> nearly the nearest orthogonal ones: U V^T of x = U S V^T, with singular values about 1.

    Five steps of an odd polynomial, which brings every singular value between 0.01 and 1 into [0.7, 1.2] (Keller
    Jordan's coefficients, kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # so that no singular value is above 1
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(5):
        square = x @ x.mT  # (..., m, m)
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def rounded(x: Tensor, draw: torch.Generator) -> Tensor:
    """fp32 to bf16, up or down at random: add a random number of 16 bits, then cut off the last 16 bits."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=draw, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


class OneByOne(torch.optim.Optimizer):
    """An update rule for weights of any dtype: one weight after the other is converted to fp32, changed and rounded."""

    def __init__(self, groups: Any, rule: Callable[[Tensor, State, int, float], Tensor], lr: float, eps: float):
        """`rule`: (gradient, its state, step number, eps) -> what is subtracted, after multiplying by lr."""
        super().__init__(groups, {"lr": lr})
        self.rule, self.eps = rule, eps

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        number = 0
        for group in self.param_groups:
            weights = list(enumerate(group["params"], number))
            number += len(weights)
            self.update(group, [(i, p) for i, p in weights if p.grad is not None])

    def update(self, group: dict[str, Any], weights: Sequence[tuple[int, Tensor]]) -> None:
        """Update the weights of a group, each of which has a number."""
        for i, p in weights:
            gradient, state, t = self._begin(p)
            _change(p, self.rule(gradient, state, t, self.eps), group, (t, i))

    def _begin(self, p: Tensor) -> tuple[Tensor, State, int]:
        """This process's part of a weight's gradient, in fp32, and of its state; and the number of the step."""
        if not self.state[p]:
            self.state[p] = self._first_state(p) | {"step": torch.zeros(())}
        self.state[p]["step"] += 1
        state = {name: distributed.local_tensor(value) for name, value in self.state[p].items()}
        return distributed.local_tensor(p.grad).float(), state, int(state["step"])  # type: ignore[arg-type]

    def _first_state(self, p: Tensor) -> State:
        if self.rule is adafactor and p.dim() > 1:
            rows = p.new_zeros(len(p), dtype=torch.float32)
            return {"rows": rows, "columns": p.new_zeros(p.shape[1], dtype=torch.float32)}
        names = ("exp_avg", "exp_avg_sq")[self.rule is adafactor :]
        return {name: torch.zeros_like(p.detach(), dtype=torch.float32) for name in names}


class Muon(OneByOne):
    """Muon for the layers' matrices (kellerjordan.github.io/posts/muon), AdamW for all other weights.

    A matrix takes a step towards the orthogonal matrix that is nearest to its momentum (Nesterov's). Its length is
    0.2 sqrt(max(m, n)), with which the numbers in it are as large as in a step of AdamW (2502.16982, section 2.2). So
    one learning rate serves all weights.
    """

    def __init__(self, matrices: Sequence[Tensor], others: Any, lr: float, weight_decay: float, eps: float):
        self.matrices = set(matrices)
        super().__init__([*others, {"params": list(matrices), "weight_decay": weight_decay}], adamw, lr, eps)

    def update(self, group: dict[str, Any], weights: Sequence[tuple[int, Tensor]]) -> None:
        """Update a group; of its matrices, those of one shape at once, since small products are slow."""
        if not self.matrices.issuperset(p for _, p in weights):
            super().update(group, weights)
            return
        for part in _stacks(weights):
            momenta = list[Tensor]()
            for _, p in part:
                gradient, state, _t = self._begin(p)
                state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
                nesterov = gradient.lerp(state["exp_avg"], MOMENTUM)
                momenta.append(distributed.full_tensor(distributed.part_of(nesterov, p)))
            scale = 0.2 * math.sqrt(max(part[0][1].shape))
            for (i, p), update in zip(part, newton_schulz(torch.stack(momenta)) * scale, strict=True):
                mine = distributed.local_tensor(distributed.distribute_like(update, p))
                _change(p, mine, group, (int(self.state[p]["step"]), i))

    def _first_state(self, p: Tensor) -> State:
        state = super()._first_state(p)
        return {"exp_avg": state["exp_avg"]} if p in self.matrices else state


def _stacks(weights: Sequence[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Numbered matrices, together where their shapes are equal, and at most STACK numbers at a time."""
    by_shape = dict[tuple[int, ...], list[tuple[int, Tensor]]]()
    for i, p in weights:
        by_shape.setdefault(tuple(p.shape), []).append((i, p))
    for shape, same in by_shape.items():
        size = max(1, STACK // math.prod(shape))
        yield from (same[at : at + size] for at in range(0, len(same), size))


def _change(p: Tensor, update: Tensor, group: dict[str, Any], key: tuple[int, int]) -> None:
    """Take lr times an update from this process's part of a weight, which decays before; bf16 is rounded at random."""
    weight = distributed.local_tensor(p)
    wide = weight.float() * (1 - group["lr"] * group["weight_decay"])
    wide.sub_(update, alpha=group["lr"])
    t, number = key
    weight.copy_(
        wide if weight.dtype == torch.float32 else rounded(wide, generator(t, "rounding", number, weight.device))
    )
