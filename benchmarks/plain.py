"""The workload as people write it in one file of plain torch: python -m benchmarks.plain CASE THREADS

A compact Llama in the style of nanochat: torch's own modules, F.scaled_dot_product_attention, a batch of full rows
padded to one length, logits at every position. No packing, no shared prompts, nothing of this project. NAME-compiled is
the case NAME with the model compiled by torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import turns
from benchmarks import workload as w

IGNORED = -100  # the target of a position that does not count
D, HEAD = w.SHAPE["hidden_size"], w.SHAPE["head_dim"]
EPS = w.SHAPE["rms_norm_eps"]


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without a bias."""
    return nn.Linear(inputs, outputs, bias=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x (B, H, T, d), angles (T, d/2) -> (B, H, T, d)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        q, kv = (w.SHAPE[f"num_{kind}_heads"] * HEAD for kind in ("attention", "key_value"))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = linear(D, q), linear(D, kv), linear(D, kv), linear(q, D)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, HEAD).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, grouped = rotate(q, cos, sin), rotate(k, cos, sin), q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        ffn = w.SHAPE["intermediate_size"]
        self.gate_proj, self.up_proj, self.down_proj = linear(D, ffn), linear(D, ffn), linear(ffn, D)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A layer."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(D, EPS), nn.RMSNorm(D, EPS)
        self.self_attn, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Plain(nn.Module):
    """The language model, with the workload's random weights."""

    cos: Tensor
    sin: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(w.SHAPE["vocab_size"], D), nn.RMSNorm(D, EPS)
        self.layers = nn.ModuleList(Block() for _ in range(w.SHAPE["num_hidden_layers"]))
        self.lm_head = linear(D, w.SHAPE["vocab_size"])
        frequencies = 10000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)  # (d/2,)
        angles = torch.arange(w.SHAPE["max_position_embeddings"])[:, None] * frequencies  # (longest text, d/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        values = {name.removeprefix("model."): torch.from_numpy(value) for name, value in w.weights(seed).items()}
        self.load_state_dict(values)
        if w.SHAPE["tie_word_embeddings"]:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Log-prob of each target, 0 where it is IGNORED. ids (B, T), targets (B, T) -> (B, T)."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        logits = self.lm_head(self.norm(x))  # (B, T, V)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return -losses.view(ids.shape)


def padded(sequences: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Inputs and targets of (prompt, response) rows, (B, T) each: a target is the next token, if a response has it."""
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.full((len(sequences), longest), w.SHAPE["pad_token_id"])
    labels = torch.full((len(sequences), longest), IGNORED)
    for i, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        labels[i, len(prompt) : end] = torch.tensor(response)
    return ids[:, :-1], labels[:, 1:]


def trained(model: Plain, compiled: bool, compute: Callable[[nn.Module], Tensor]) -> Callable[[], float]:
    """A step that minimises `compute(model)` and returns its value."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=w.LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    forward: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]

    def step() -> float:
        loss = compute(forward)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def sft(compiled: bool) -> Callable[[], float]:
    """A step of SFT on the chosen responses."""
    ids, targets = padded([(row["prompt"], row["chosen"]) for row in w.pairs(w.PAIRS)])
    return trained(Plain(0), compiled, lambda model: -model(ids, targets).sum() / (targets != IGNORED).sum())


def dpo(compiled: bool) -> Callable[[], float]:
    """A DPO step, with the reference's log-probs computed in it."""
    rows = w.pairs(w.PAIRS)
    ids, targets = padded([(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows])
    ref = Plain(1).requires_grad_(False)
    compiled_ref: nn.Module = torch.compile(ref) if compiled else ref  # type: ignore[assignment]

    def loss(model: nn.Module) -> Tensor:
        with torch.no_grad():
            ref_logps = compiled_ref(ids, targets).sum(-1)  # (2B,)
        chosen, rejected = (model(ids, targets).sum(-1) - ref_logps).chunk(2)
        return -F.logsigmoid(w.BETA * (chosen - rejected)).mean()

    return trained(Plain(0), compiled, loss)


CASES = {"sft": sft, "dpo": dpo}

if __name__ == "__main__":
    case, (threads,) = turns.arguments(
        "python -m benchmarks.plain CASE THREADS", cases=[*CASES, *(f"{c}-compiled" for c in CASES)]
    )
    torch.set_num_threads(threads)
    turns.serve(CASES[case.removesuffix("-compiled")](case.endswith("-compiled")))
