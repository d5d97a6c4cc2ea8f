"""The kernels of the head on GPUs (programs.py). ../autograd.py makes them differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from . import programs

BM, BV, BK = 16, 64, 32  # rows and columns of a tile of logits, and how much of D is multiplied at a time
PROGRAMS = 512  # enough to keep a large GPU busy


def _blocks(count: int, size: int) -> int:
    """How many blocks of this size hold `count` things."""
    return -(-count // size)


def _sweep(sides: tuple[Tensor, ...], targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The sums of the online softmax over the whole vocabulary (6, N), and the logits of the targets (2, N).

    `sides` is hidden, weight and, for a comparison, ref_hidden, ref_weight. What the sums are is said in
    programs.sweep, which computes them for parts of the vocabulary; here the parts are merged.
    """
    hidden, weight, *reference = sides
    (N, D), V, ref = hidden.shape, len(weight), bool(reference)
    ref_hidden, ref_weight = reference or (hidden, weight)
    part = _blocks(_blocks(V, max(1, PROGRAMS // _blocks(max(N, 1), BM))), BV) * BV
    parts = _blocks(V, part)
    sums = torch.zeros(6, parts, N, device=hidden.device)
    picked = torch.zeros(2, N, device=hidden.device)
    if N:
        sizes = N, V, D, ref_hidden.shape[1], 1 / temperature, part
        pointers = hidden, weight, ref_hidden, ref_weight, targets, sums, picked
        programs.sweep[_blocks(N, BM), parts](*pointers, *sizes, REF=ref, BM=BM, BV=BV, BK=BK)
    m, s, b, rm, rs, d = sums
    top, rtop = m.max(0).values, rm.max(0).values
    up, rup = top - m, rtop - rm
    scale = torch.exp(-up)
    merged = top, (scale * s).sum(0), (scale * (b - up * s)).sum(0), rtop, (torch.exp(-rup) * rs).sum(0)
    return torch.stack((*merged, (scale * (d - (up - rup) * s)).sum(0))), picked


def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """See cpu/head.py."""
    (m, s, b, *_), (picked, _) = _sweep((hidden, weight), targets, temperature)
    return picked - m - s.log(), s.log() - b / s, m + s.log()


def comparison(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, ...]:
    """See cpu/head.py."""
    sides = hidden, weight, ref_hidden, ref_weight
    (m, s, b, rm, rs, d), (picked, ref_picked) = _sweep(sides, targets, temperature)
    log_s, ref_log_s = s.log(), rs.log()
    of_tokens = picked - m - log_s, ref_picked - rm - ref_log_s
    return *of_tokens, d / s - log_s + ref_log_s, log_s - b / s, m + log_s, rm + ref_log_s


def gradient_in_logits(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    temperature: float,
    *statistics: Tensor | None,
) -> Tensor:
    """See cpu/head.py."""
    (N, D), V, ref = hidden.shape, len(weight), ref_hidden is not None
    lse, ref_lse, of_p, of_log = (x if x is not None else hidden for x in statistics)
    rh, rw = (ref_hidden, ref_weight) if ref_hidden is not None and ref_weight is not None else (hidden, weight)
    out = torch.empty(N, V, device=hidden.device)
    pointers = hidden, weight, rh, rw, lse, ref_lse, of_p, of_log, out
    grid = _blocks(N, BM), _blocks(V, BV)
    programs.gradient[grid](*pointers, N, V, D, rh.shape[1], 1 / temperature, REF=ref, BM=BM, BV=BV, BK=BK)
    return out


def matmul(a: Tensor, b: Tensor, bf16: bool) -> Tensor:
    """a (M, K) times b (K, N) -> (M, N), by torch's own product, which is at the limit of what a GPU can do.

    With `bf16`, a and b are rounded to bf16 first, and products are still summed in fp32.
    """
    if not bf16:
        return a @ b
    if a.is_cuda:
        return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
    return a.bfloat16().float() @ b.bfloat16().float()  # in the tests, which run in Triton's interpreter


def sample_tokens(hidden: Tensor, weight: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See reference.py. First a panel of the vocabulary is drawn, then a token of it, as in cpp/sampling.cpp."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    (N, D), V = hidden.shape, len(weight)
    maxima, totals = torch.empty(2, N, _blocks(V, BV), device=hidden.device)
    tokens, picked = torch.zeros(N, dtype=torch.long, device=hidden.device), torch.zeros(N, device=hidden.device)
    if not N:
        return tokens, picked
    inverse, sizes = 1 / temperature, {"BM": BM, "BV": BV, "BK": BK}
    programs.panels[_blocks(N, BM), _blocks(V, BV)](hidden, weight, maxima, totals, N, V, D, inverse, **sizes)
    top = maxima.max(1).values
    mass = (totals * torch.exp(maxima - top[:, None])).double().cumsum(1)  # (N, panels)
    goal = uniform.double() * mass[:, -1]
    chosen = torch.searchsorted(mass, goal[:, None], right=True).clamp(max=mass.shape[1] - 1)
    before = torch.where(chosen > 0, mass.gather(1, (chosen - 1).clamp(min=0)), 0).squeeze(1)
    left = (goal - before).float()
    programs.pick[N,](hidden, weight, chosen, top, left, tokens, picked, N, V, D, inverse, **sizes)
    return tokens, (picked - top - mass[:, -1].log().float()).clamp(max=0)
