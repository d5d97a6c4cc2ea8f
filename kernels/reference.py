"""The definition of every kernel in plain torch: what a reader reads first.

Logits, softmax and sums are fp32 (or wider) whatever the dtype of hidden states and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.pieces import Pieces


def linear(x: Tensor, weight: Tensor, bf16: bool) -> Tensor:
    """x W^T; with bf16 both are rounded to it first."""
    return F.linear(x.bfloat16().to(x.dtype), weight.bfloat16().to(x.dtype)) if bf16 else F.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, with the statistics in fp32."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, where silu(x) = x / (1 + e^-x)."""
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its angle, the same for all heads."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # (N, 1, d/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _by_piece(x: Tensor, index: Tensor, heads: int) -> Tensor:
    """(N, H_kv, d), at the places (S, T), each head as often as it takes to make `heads`: (S, heads, T, d)."""
    found = x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)  # (S, H_kv, T, d)
    return found.repeat_interleave(heads // found.shape[1], 1)


def attention(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, bf16: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, over the keys that each token sees; with bf16, q and k are rounded to it first."""
    if bf16:
        q, k = q.bfloat16().to(q.dtype), k.bfloat16().to(k.dtype)
    H, at = q.shape[1], pieces.padded
    keys, values = (_by_piece(x, torch.cat((at.before, at.own), 1), H) for x in (k, v))  # (S, H, P + T, d)
    out = F.scaled_dot_product_attention(_by_piece(q, at.own, H), keys, values, attn_mask=pieces.mask(q.dtype))
    return out.transpose(1, 2)[at.real]  # (N, H, d)


class KVCache:
    """Keys and values of B texts that grow by a token a step, for generation; without gradients."""

    def __init__(
        self, layers: int, rows: int, length: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ):
        self.store = torch.zeros(layers, 2, rows, length, heads, dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (B,): tokens stored so far
        self.longest = 0  # no row has more, as the CPU knows without asking the device
        self.filled = 0  # rows that have begun

    def fill(self, layer: int, k: Tensor, v: Tensor, pieces: Pieces) -> None:
        """Store the beginnings of the next rows: keys and values (N, H_kv, d) of S roots."""
        at = pieces.padded
        rows = slice(self.filled, self.filled + len(at.own))
        for store, x in zip(self.store[layer], (k, v), strict=True):
            store[rows, : at.own.shape[1]] = x[at.own].to(store.dtype)

    def begin(self, lengths: Tensor) -> None:
        """Once all layers have stored the beginnings of S rows: they have these lengths (S,)."""
        self.lengths[self.filled : self.filled + len(lengths)] = lengths.to(self.lengths.device)
        self.longest = max(self.longest, int(lengths.max()))
        self.filled += len(lengths)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store one more token of each row, k and v (B, H_kv, d), and attend from it: q (B, H, d) -> (B, H, d)."""
        rows, H = torch.arange(len(q), device=q.device), q.shape[1]
        self.store[layer, 0, rows, self.lengths], self.store[layer, 1, rows, self.lengths] = (
            k.to(self.store.dtype),
            v.to(self.store.dtype),
        )
        longest = self.longest + 1
        visible = torch.arange(longest, device=q.device) <= self.lengths[:, None]  # (B, T)
        keys, values = (
            self.store[layer, :, :, :longest].to(q.dtype).transpose(2, 3).repeat_interleave(H // k.shape[1], 2)
        )
        mask = visible[:, None, None]
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask)[:, :, 0]

    def advance(self) -> None:
        """Once all layers have stored one more token of each row: count it."""
        self.longest += 1
        self.lengths = self.lengths + 1

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order; a row may be taken more than once."""
        self.store, self.lengths = self.store[:, :, rows], self.lengths[rows]


class LayerWeights(NamedTuple):
    """The weights of one layer, by role."""

    attention_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def decoder(
    layers: Sequence[LayerWeights], norm: Tensor, eps: float, cache: KVCache, bf16: bool
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """From one more token of each row, its embedding (B, D) and its angles' cos and sin, to hidden states."""

    def step(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for i, w in enumerate(layers):
            h = rms_norm(x, w.attention_norm, eps)
            q, k, v = (linear(h, p, bf16).view(len(x), -1, 2 * cos.shape[1]) for p in (w.q, w.k, w.v))  # (B, H, d)
            attended = cache.attend(i, rotate(q, cos, sin), rotate(k, cos, sin), v)
            x = x + linear(attended.flatten(1), w.o, bf16)
            h = rms_norm(x, w.mlp_norm, eps)
            x = x + linear(swiglu(linear(h, w.gate, bf16), linear(h, w.up, bf16)), w.down, bf16)
        cache.advance()
        return rms_norm(x, norm, eps)

    return step


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T / temperature  # (N, V)
    return logits.log_softmax(-1)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(target) and H(p) = -sum_v p_v log p_v."""
    logps = _log_softmax(hidden, weight, temperature)  # (N, V)
    logp = logps.gather(-1, targets[:, None]).squeeze(-1)  # (N,)
    with torch.no_grad():  # entropy is a statistic here, not part of any loss
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
    """log p(target), log q(target), KL(p || q) = sum_v p_v (log p_v - log q_v), H(p)."""
    logps = _log_softmax(hidden, weight, temperature)  # (N, V)
    with torch.no_grad():  # the reference stays as it is
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


# --- advantages: (B, R), one column a response token, mask True on real ones ------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries where mask is True; 0 where there are none."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, keep_mean: bool = False, eps: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0 (or to the mean it had) and variance 1 over the mask; zero elsewhere."""
    mean = masked_mean(x, mask)
    centred = (x - mean) * mask
    scaled = centred * torch.rsqrt(masked_mean(centred**2, mask) + eps)
    return (scaled + mean) * mask if keep_mean else scaled


def shape_rewards(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Per-token rewards: -kl_coef * kl, plus the score at the last token.

    Source: 2203.02155, section 3.5. score (B,); kl, an estimate per token, and the result (B, R).
    """
    last = mask.sum(1) - 1
    rewards = -kl_coef * kl * mask
    return rewards.index_put((torch.arange(len(score), device=score.device), last), score, accumulate=True)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (1506.02438, eq. 11) and the returns A + V.

    A_t = sum_k (gamma lam)^k delta_{t+k},  delta_t = r_t + gamma V_{t+1} - V_t; V after the last
    token is 0. Returns two (B, R) tensors, zero where the mask is False.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    running = torch.zeros(len(rewards), dtype=rewards.dtype, device=rewards.device)
    following = torch.zeros_like(running)  # V_{t+1}
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t], following = running, values[:, t]
    return advantages, (advantages + values) * mask


def advantages(
    score: Tensor,
    kl: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shaped rewards, whitened where that is wanted; GAE of them; the same whitened."""
    rewards = shape_rewards(score, kl, mask, kl_coef)
    if whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    found, returns = gae(rewards, values, mask, gamma, lam)
    return found, returns, whiten(found, mask)
