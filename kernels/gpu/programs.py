"""The Triton programs for NVIDIA GPUs. They also run in Triton's interpreter, on any processor.

As in cpp/head.h, logits are computed tile by tile, and each tile is used up where it appears. In `sweep`, one program
takes BM rows and one part of the vocabulary, with an online softmax of its own; head.py merges the parts.

Arguments that all programs share: h (N, D) hidden states, w (V, D) the head, rh (N, RD) and rw (V, RD) those of the
reference, `inverse` 1 / temperature. A tile has BM rows and BV columns; BK of D are multiplied at a time.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

NEVER = tl.constexpr(-1e30)  # the logit of a column beyond the vocabulary
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the interpreter cannot multiply bf16


@triton.jit
def logits(h, w, rows, columns, N, V, D, inverse, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """A tile of logits (BM, BV): these rows of h times these rows of w, transposed, over the temperature."""
    total = tl.zeros((BM, BV), tl.float32)
    for first in range(0, D, BK):
        k = first + tl.arange(0, BK)
        a = tl.load(h + rows[:, None] * D + k[None, :], mask=(rows[:, None] < N) & (k[None, :] < D), other=0.0)
        b = tl.load(w + columns[None, :] * D + k[:, None], mask=(columns[None, :] < V) & (k[:, None] < D), other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    return tl.where(columns[None, :] < V, total * inverse, NEVER)


@triton.jit
def sweep(
    h, w, rh, rw, targets, sums, picked, N, V, D, RD, inverse, part,
    REF: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Online softmax over one part of the vocabulary.

    Writes to sums (6, parts, N), for the policy's logits z the maximum m and
        s = sum e^(z - m), b = sum e^(z - m) (z - m),
    and for the reference's logits r the maximum rm and
        rs = sum e^(r - rm), d = sum e^(z - m) ((z - m) - (r - rm));
    to picked (2, N), the logits of the targets under both.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    real = rows < N
    target = tl.load(targets + rows, mask=real, other=-1)
    zero = tl.zeros((BM,), tl.float32)
    m, s, b, rm, rs, d = zero + NEVER, zero, zero, zero + NEVER, zero, zero
    start = tl.program_id(1) * part
    for first in range(start, tl.minimum(start + part, V), BV):
        columns = first + tl.arange(0, BV)
        z = logits(h, w, rows, columns, N, V, D, inverse, BM, BV, BK)
        top = tl.maximum(m, tl.max(z, 1))
        up, x = top - m, z - top[:, None]
        e, scale = tl.exp(x), tl.exp(m - top)
        b = scale * (b - up * s) + tl.sum(e * x, 1)
        hit = columns[None, :] == target[:, None]
        here = real & (target >= first) & (target < first + BV)
        tl.store(picked + rows, tl.sum(tl.where(hit, z, 0.0), 1), mask=here)
        if REF:
            r = logits(rh, rw, rows, columns, N, V, RD, inverse, BM, BV, BK)
            rtop = tl.maximum(rm, tl.max(r, 1))
            rup, y = rtop - rm, r - rtop[:, None]
            d = scale * (d - (up - rup) * s) + tl.sum(e * (x - y), 1)
            rs = tl.exp(rm - rtop) * rs + tl.sum(tl.exp(y), 1)
            rm = rtop
            tl.store(picked + N + rows, tl.sum(tl.where(hit, r, 0.0), 1), mask=here)
        s = scale * s + tl.sum(e, 1)
        m = top
    at = sums + tl.program_id(1) * N + rows
    each = tl.num_programs(1) * N
    tl.store(at, m, mask=real)
    tl.store(at + each, s, mask=real)
    tl.store(at + 2 * each, b, mask=real)
    if REF:
        tl.store(at + 3 * each, rm, mask=real)
        tl.store(at + 4 * each, rs, mask=real)
        tl.store(at + 5 * each, d, mask=real)


@triton.jit
def gradient(
    h, w, rh, rw, lse, ref_lse, of_p, of_log, out, N, V, D, RD, inverse,
    REF: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of out (N, V), the gradient in h w^T: p_v (of_p + of_log log(p_v / q_v)) / temperature."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    real = rows < N
    z = logits(h, w, rows, columns, N, V, D, inverse, BM, BV, BK)
    logp = z - tl.load(lse + rows, mask=real, other=0.0)[:, None]
    factor = tl.load(of_p + rows, mask=real, other=0.0)[:, None]
    if REF:
        r = logits(rh, rw, rows, columns, N, V, RD, inverse, BM, BV, BK)
        log_ratio = logp - (r - tl.load(ref_lse + rows, mask=real, other=0.0)[:, None])
        factor += tl.load(of_log + rows, mask=real, other=0.0)[:, None] * log_ratio
    value = tl.exp(logp) * factor * inverse
    tl.store(out + rows[:, None] * V + columns[None, :], value, mask=real[:, None] & (columns[None, :] < V))


@triton.jit
def panels(h, w, maxima, totals, N, V, D, inverse, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """The maximum of the logits z in each panel of BV columns, and the sum of e^(z - maximum); (N, panels) each."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    z = logits(h, w, rows, columns, N, V, D, inverse, BM, BV, BK)
    m = tl.max(z, 1)
    at = rows * tl.num_programs(1) + tl.program_id(1)
    tl.store(maxima + at, m, mask=rows < N)
    tl.store(totals + at, tl.sum(tl.exp(z - m[:, None]), 1), mask=rows < N)


@triton.jit
def pick(
    h, w, chosen, top, goal, tokens, picked, N, V, D, inverse,
    BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Pick a token from row n's chosen panel: the first at which the sum of e^(z - top) exceeds `goal`.

    `top` is the maximum of the row's logits z; `goal` is what the panels before this one have left of it.
    """
    row = tl.program_id(0)
    columns = tl.load(chosen + row) * BV + tl.arange(0, BV)
    rows = row + tl.zeros((BM,), tl.int32)  # a product needs BM rows, so this row is repeated
    z = tl.max(logits(h, w, rows, columns, N, V, D, inverse, BM, BV, BK), 0)
    e = tl.exp(z - tl.load(top + row))
    above = (tl.cumsum(e, 0) > tl.load(goal + row)) & (e > 0)
    first = tl.min(tl.where(above, columns, V), 0)
    last = tl.max(tl.where(e > 0, columns, 0), 0)  # taken where rounding keeps the sum below the goal
    token = tl.where(first < V, first, last)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(picked + row, tl.sum(tl.where(columns == token, z, 0.0), 0))
