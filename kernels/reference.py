"""The definition of every kernel, in plain torch. Read this first; functions.py explains the arguments.

At the head, logits, softmax and sums are fp32 or wider, whatever the dtype of the hidden states and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import Packing


def linear(x: Tensor, weight: Tensor, bf16: bool) -> Tensor:
    """x W^T. With `bf16`, both operands are rounded to bf16 first."""
    return F.linear(x.bfloat16().to(x.dtype), weight.bfloat16().to(x.dtype)) if bf16 else F.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight. The norm is computed in fp32."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, where silu(x) = x / (1 + e^-x)."""
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + d/2]) by an angle of its own. All heads have the same angles."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # (N, 1, d/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _by_segment(x: Tensor, index: Tensor, heads: int) -> Tensor:
    """The tokens of x (N, H_kv, d) at the positions `index` (S, T), with heads repeated up to `heads`.

    Returns (S, heads, T, d).
    """
    gathered = x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)  # (S, H_kv, T, d)
    return gathered.repeat_interleave(heads // gathered.shape[1], 1)


def attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, bf16: bool, window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys that each token sees. With `bf16`, q and k are rounded to bf16 first."""
    if bf16:
        q, k = q.bfloat16().to(q.dtype), k.bfloat16().to(k.dtype)
    H, at = q.shape[1], packing.padded
    visible = torch.cat((at.parent_index, at.own_index), 1)  # (S, P + T)
    keys, values = (_by_segment(x, visible, H) for x in (k, v))  # (S, H, P + T, d)
    mask = packing.mask(q.dtype, window)
    out = F.scaled_dot_product_attention(_by_segment(q, at.own_index, H), keys, values, attn_mask=mask)
    return out.transpose(1, 2)[at.token_mask]  # (N, H, d)


class LayerWeights(NamedTuple):
    """The weights of one layer. cpp/decode.cpp reads them in this order; cpu/generation.py checks their number."""

    attention_norm: Tensor  # (D,)
    q: Tensor  # (H d, D)
    k: Tensor  # (H_kv d, D)
    v: Tensor  # (H_kv d, D)
    o: Tensor  # (D, H d)
    mlp_norm: Tensor  # (D,)
    gate: Tensor  # (F, D)
    up: Tensor  # (F, D)
    down: Tensor  # (D, F)
    q_bias: Tensor | None = None  # (H d,)
    k_bias: Tensor | None = None  # (H_kv d,)
    v_bias: Tensor | None = None  # (H_kv d,)
    q_norm: Tensor | None = None  # (d,): an RMSNorm of each head, before it is rotated
    k_norm: Tensor | None = None  # (d,)


class KVCache:
    """Keys and values of B texts, each of which grows by one token a step. For generation; no gradients.

    First every layer fills the cache with the beginnings of some texts, and `begin` counts them; this is repeated
    until all texts have begun. Then, in each step, every layer attends from one more token of each text, and
    `advance` counts it.
    """

    def __init__(
        self, layers: int, rows: int, length: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ):
        self.store = torch.zeros(layers, 2, rows, length, heads, dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (B,): tokens stored so far
        self.longest = 0  # no row has more tokens; kept as an int, since reading `lengths` would wait for the device
        self.filled = 0  # rows whose texts have begun
        self.room = length  # the most tokens of a text

    def fill(self, layer: int, k: Tensor, v: Tensor, packing: Packing) -> None:
        """Store the beginnings of the next S texts, which are the roots of `packing`: keys and values (N, H_kv, d)."""
        at = packing.padded
        rows = slice(self.filled, self.filled + len(at.own_index))
        for store, x in zip(self.store[layer], (k, v), strict=True):
            store[rows, : at.own_index.shape[1]] = x[at.own_index].to(store.dtype)

    def begin(self, lengths: Tensor) -> None:
        """Record the lengths (S,) of the texts that all layers have just stored."""
        self.lengths[self.filled : self.filled + len(lengths)] = lengths.to(self.lengths.device)
        self.longest = max(self.longest, int(lengths.max()))
        self.filled += len(lengths)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Store one more token of each text, k and v (B, H_kv, d), and attend from it: q (B, H, d) -> (B, H, d).

        With a window, it attends to itself and the window - 1 tokens before it.
        """
        rows, H = torch.arange(len(q), device=q.device), q.shape[1]
        self.store[layer, 0, rows, self.lengths], self.store[layer, 1, rows, self.lengths] = (
            k.to(self.store.dtype),
            v.to(self.store.dtype),
        )
        longest = self.longest + 1
        at = torch.arange(longest, device=q.device)
        visible = at <= self.lengths[:, None]  # (B, T)
        if window is not None:
            visible &= at > self.lengths[:, None] - window
        keys, values = (
            self.store[layer, :, :, :longest].to(q.dtype).transpose(2, 3).repeat_interleave(H // k.shape[1], 2)
        )
        mask = visible[:, None, None]
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask)[:, :, 0]

    def advance(self) -> None:
        """Count the token of each text that all layers have just stored."""
        self.longest += 1
        self.lengths = self.lengths + 1

    def take(self, rows: Tensor) -> None:
        """Continue with these rows only, in this order. A row may occur more than once."""
        if len(rows) > self.store.shape[2]:
            self.store = self.store[:, :, rows]
        else:  # layer by layer, so that never two caches exist
            for store in self.store:
                store[:, : len(rows)] = store[:, rows]
            self.store = self.store[:, :, : len(rows)]
        self.lengths = self.lengths[rows]

    def decoder(
        self, layers: Sequence[LayerWeights], norm: Tensor, eps: float, bf16: bool
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A function of embeddings (B, D), cos and sin (B, d/2) -> hidden states (B, D), for one token of each text."""

        def step(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            for i, w in enumerate(layers):
                h = rms_norm(x, w.attention_norm, eps)
                projections = ((w.q, w.q_bias, w.q_norm), (w.k, w.k_bias, w.k_norm), (w.v, w.v_bias, None))
                q, k, v = (_heads(linear(h, p, bf16), b, n, eps, 2 * cos.shape[1]) for p, b, n in projections)
                attended = self.attend(i, rotate(q, cos, sin), rotate(k, cos, sin), v)
                x = x + linear(attended.flatten(1), w.o, bf16)
                h = rms_norm(x, w.mlp_norm, eps)
                x = x + linear(swiglu(linear(h, w.gate, bf16), linear(h, w.up, bf16)), w.down, bf16)
            self.advance()
            return rms_norm(x, norm, eps)

        return step


def _heads(x: Tensor, bias: Tensor | None, weight: Tensor | None, eps: float, d: int) -> Tensor:
    """A projection (B, H d), with its bias if it has one, as heads (B, H, d), normed if there is a norm."""
    heads = (x if bias is None else x + bias).view(len(x), -1, d)
    return heads if weight is None else rms_norm(heads, weight, eps)


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """The log-probs of all tokens, (N, V)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T / temperature  # (N, V)
    return logits.log_softmax(-1)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(target), and the entropy H(p) = -sum_v p_v log p_v."""
    logps = _log_softmax(hidden, weight, temperature)  # (N, V)
    logp = logps.gather(-1, targets[:, None]).squeeze(-1)  # (N,)
    with torch.no_grad():  # no loss uses the entropy
        entropy = -(logps.exp() * logps).sum(-1)
    return logp, entropy


def policy_reference(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p(target), log q(target), KL(p || q) = sum_v p_v (log p_v - log q_v), and the entropy H(p).

    p is the policy's distribution, q the reference's.
    """
    logps = _log_softmax(hidden, weight, temperature)  # (N, V)
    with torch.no_grad():  # the reference is not trained
        ref_logps = _log_softmax(ref_hidden, ref_weight, temperature)  # (N, V)
    p = logps.exp()
    kl = (p * (logps - ref_logps)).sum(-1)
    with torch.no_grad():
        entropy = -(p * logps).sum(-1)
    pick = targets[:, None]
    return logps.gather(-1, pick).squeeze(-1), ref_logps.gather(-1, pick).squeeze(-1), kl, entropy


def sample_tokens(hidden: Tensor, weight: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative probability exceeds `uniform`."""
    logps = _log_softmax(hidden, weight, temperature)  # (N, V)
    cdf = logps.exp().cumsum(-1)  # (N, V), fp32: its last entry is 1 up to rounding
    total = cdf[:, -1:]
    tokens = torch.searchsorted(cdf, uniform[:, None].float() * total, right=True)  # (N, 1)
    tokens = tokens.clamp(max=logps.shape[-1] - 1)
    return tokens.squeeze(-1), logps.gather(-1, tokens).squeeze(-1)
