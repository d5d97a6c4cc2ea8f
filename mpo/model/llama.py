"""A Llama-style transformer, and its sibling with a scalar head (reward model, critic).

Parameter names are those of Hugging Face's LlamaForCausalLM, so that checkpoint.py need not rename anything.
Sources: Llama (2302.13971), RMSNorm (1910.07467), rotary embeddings (2104.09864),
SwiGLU (2002.05202), grouped-query attention (2305.13245).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpo.kernels import functions as kernels
from mpo.kernels.functions import KVCache, LayerWeights, Packing
from mpo.runtime import distributed

Rope = tuple[Tensor, Tensor]  # cos and sin of the angles of N tokens, (N, d/2) each


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model, in Hugging Face's names."""

    model_type: str = "llama"  # the family (hf_config.py)
    vocab_size: int = 4096
    hidden_size: int = 96  # D
    intermediate_size: int = 256  # of the MLP
    num_hidden_layers: int = 3
    num_attention_heads: int = 4  # H
    num_key_value_heads: int = 2  # H_kv; each is used by H / H_kv query heads
    head_dim: int = 24
    max_position_embeddings: int = 1024
    sliding_window: int | None = None  # how many tokens a token attends to; None: all before it
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] = field(default_factory=dict)  # {} or a llama3 scaling
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1  # None: the family has none, and EOS begins a text
    eos_token_id: int | tuple[int, ...] = 2  # each of several ends a text elsewhere; here the tokenizer's EOS does
    pad_token_id: int | None = 3  # may be None: nothing is padded, and masks come from lengths

    @property
    def longest(self) -> int:
        """The most tokens of a sequence. A sliding window changes nothing as long as the sequence fits into it."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


def _shape(d: int, ffn: int, layers: int, heads: int, kv: int, **more: Any) -> LlamaConfig:
    return replace(
        LlamaConfig(),
        hidden_size=d,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=d // heads,
        **more,
    )


PRESETS = {  # the vocabulary comes from the tokenizer
    "tiny": _shape(96, 256, 3, 4, 2),  # 0.3 M parameters plus the embedding: minutes on a laptop CPU
    "mini": _shape(256, 688, 6, 8, 4),  # 5 M
    "small": _shape(512, 1376, 8, 8, 4),  # 25 M
    "base": _shape(768, 2048, 12, 12, 4, max_position_embeddings=2048),  # 90 M
    "1b": _shape(2048, 5632, 22, 32, 4, max_position_embeddings=2048),  # TinyLlama's shape
    "7b": _shape(
        4096, 11008, 32, 32, 32, max_position_embeddings=4096, tie_word_embeddings=False
    ),  # Llama-2-7B's shape
}


@dataclass(frozen=True)
class Adapters:
    """Which matrices of a model get low-rank adapters (lora.py), and of which size."""

    rank: int  # r
    alpha: float  # r times the scale of B A x
    targets: tuple[str, ...]
    seed: int  # of A's initial values
    base: str  # the folder of the base model


def rotary_frequencies(config: LlamaConfig) -> Tensor:
    """The d/2 angular frequencies of the rotary embedding, with llama3's scaling if the config has it."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies: Tensor = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if not scaling:
        return frequencies
    # llama3: keep short wavelengths, stretch long ones by `factor`, blend in between.
    old = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = old * frequencies / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the statistics in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)"""
        return kernels.rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A linear layer without bias, computed by kernels/."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs)"""
        return kernels.linear(x, self.weight)

    def merged(self) -> Tensor:
        """(outputs, inputs): the matrix that the layer multiplies with; an adapter changes it (lora.AdaptedLinear)."""
        return self.weight


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.config = c
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)

    def forward(self, x: Tensor, rope: Rope, packing: Packing, cache: KVCache | None, layer: int) -> Tensor:
        """x (N, D) -> (N, D); see Trunk.forward."""
        heads = (len(x), -1, self.config.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)  # (N, H, d)
        q, k = kernels.rotate(q, *rope), kernels.rotate(k, *rope)
        if cache is not None:
            cache.fill(layer, k, v, packing)
        return self.o_proj(kernels.attention(q, k, v, packing).flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)"""
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)
        self.recompute = False  # compute activations again in the backward pass instead of keeping them (1604.06174)

    def forward(self, x: Tensor, rope: Rope, packing: Packing, cache: KVCache | None, layer: int) -> Tensor:
        """(N, D) -> (N, D)"""
        inputs = (x, rope, packing, cache, layer)
        if self.recompute and torch.is_grad_enabled():
            again: Tensor = checkpoint(self.compute, *inputs, use_reentrant=False)
            return again
        return self.compute(*inputs)

    def compute(self, x: Tensor, rope: Rope, packing: Packing, cache: KVCache | None, layer: int) -> Tensor:
        """(N, D) -> (N, D)"""
        x = x + self.self_attn(self.input_layernorm(x), rope, packing, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))

    def weights(self) -> LayerWeights:
        """The layer's weights by role, for generation."""
        a, m = self.self_attn, self.mlp
        q, k, v, o = (layer.merged() for layer in (a.q_proj, a.k_proj, a.v_proj, a.o_proj))
        gate, up, down = (layer.merged() for layer in (m.gate_proj, m.up_proj, m.down_proj))
        return LayerWeights(
            self.input_layernorm.weight, q, k, v, o, self.post_attention_layernorm.weight, gate, up, down
        )


class Trunk(nn.Module):
    """Token ids to hidden states: everything but the head."""

    frequencies: Tensor

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.register_buffer("frequencies", rotary_frequencies(c), persistent=False)
        self.compiled = False

    @property
    def blocks(self) -> list[Block]:
        """The layers, by their type."""
        return [block for block in self.layers if isinstance(block, Block)]

    def rope(self, positions: Tensor) -> Rope:
        """Cos and sin of the rotary angles at positions (N,)."""
        angles = positions[:, None].float() * self.frequencies  # (N, d/2)
        return angles.cos(), angles.sin()

    def forward(self, ids: Tensor, packing: Packing, cache: KVCache | None = None) -> Tensor:
        """Hidden states (N, D) of token ids (N,), packed end to end as `packing` says.

        A cache is filled on the way, with texts of one segment each; `decoder` continues from it.
        """
        x, rope = self.embed_tokens(ids), self.rope(packing.positions)  # (N, D)
        if self.compiled:
            packing.mask(x.dtype)  # made here, since torch.compile cannot trace it
        for i, block in enumerate(self.layers):
            x = block(x, rope, packing, cache, i)
        if cache is not None:
            cache.begin(packing.lengths)
        return self.norm(x)

    def decoder(self, cache: KVCache, whole: bool = True) -> Callable[[Tensor], Tensor]:
        """A function from ids (B,), one more token of each text in the cache, to hidden states (B, D); no gradients.

        Without `whole`, sharded layers are gathered when their turn comes, in each step.
        """
        weights = [block.weights() for block in self.blocks] if whole else InTurn(self.blocks)
        step = kernels.decoder(weights, self.norm.weight, self.norm.eps, cache)
        return lambda ids: step(self.embed_tokens(ids), *self.rope(cache.lengths))

    def take_part(self) -> None:
        """Give this process's part of sharded layers to processes that compute with them, and compute nothing."""
        for _ in distributed.in_turn(self.blocks):
            pass


class InTurn(Iterable[LayerWeights]):
    """The weights of layers, each of which is gathered as long as its turn lasts."""

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = blocks

    def __iter__(self) -> Iterator[LayerWeights]:
        for block in distributed.in_turn(self.blocks):
            yield block.weights()


class Llama(nn.Module):
    """The language model: trunk and head. `forward` gives hidden states, logprobs.py applies the head."""

    adapters: Adapters | None = None  # lora.py
    generation_config: dict[str, Any] | None = None  # generation_config.json, kept for the models that are written

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one tensor, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, packing: Packing, cache: KVCache | None = None) -> Tensor:
        """(N,) -> hidden states (N, D); see Trunk.forward."""
        return self.model(ids, packing, cache)

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, V): for tests and for looking at; training never holds this tensor."""
        return self.lm_head(self.model(ids.flatten(), Packing([ids.shape[1]] * len(ids), device=ids.device))).unflatten(
            0, ids.shape
        )

    def kv_cache(self, rows: int, length: int, whole: bool = True) -> KVCache:
        """An empty cache for `rows` texts of at most `length` tokens. `whole`: see Trunk.decoder."""
        c = self.config
        sizes = c.num_hidden_layers, rows, length, c.num_key_value_heads, c.head_dim
        # The compiled kernel's decoder copies the weights of all layers before it begins.
        return kernels.kv_cache(*sizes, self.lm_head.weight, impl=None if whole else "reference")


class ScalarModel(nn.Module):
    """A trunk with a scalar head, which gives one number for each position: reward model and critic."""

    adapters: Adapters | None = None  # lora.py
    generation_config: dict[str, Any] | None = None  # see Llama

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = Linear(config.hidden_size, 1)
        self.register_buffer("score_mean", torch.zeros(()))  # mean and std of the raw scores of
        self.register_buffer("score_std", torch.ones(()))  # SFT-reference responses (train_rm.py)

    score_mean: Tensor
    score_std: Tensor

    def forward(self, ids: Tensor, packing: Packing) -> Tensor:
        """(N,) -> (N,) in fp32; see Trunk.forward."""
        raw = self.score(self.model(ids, packing).float()).squeeze(-1)
        return (raw - self.score_mean) / self.score_std


class ValueHead(nn.Module):
    """A critic that shares the policy's trunk: one number for each hidden state, 0 before training."""

    def __init__(self, width: int):
        super().__init__()
        self.score = Linear(width, 1)
        nn.init.zeros_(self.score.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N,) in fp32."""
        return self.score(hidden.float()).squeeze(-1)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert all parameters of a language model to a dtype; buffers (angles) stay fp32."""
    for p in model.parameters():
        p.data = p.data.to(dtype)


def configure_layers(model: nn.Module, recompute: bool, compiled: bool, backend: str = "inductor") -> None:
    """Set how every layer is computed.

    recompute: activations are computed again in the backward pass, a third more work for less memory. compiled: by
    torch.compile, with one program for all layers and lengths, which is made at the first batch.
    """
    for block in model.modules():
        if isinstance(block, Trunk):
            block.compiled = compiled
        if isinstance(block, Block):
            block.recompute = recompute
            if compiled:
                block.compute = torch.compile(block.compute, dynamic=True, fullgraph=True, backend=backend)  # type: ignore[method-assign]


def initialise(model: Llama | ScalarModel, generator: torch.Generator) -> None:
    """Normal weights of std 0.02, projections into the residual stream scaled by 1/sqrt(2 layers)."""
    depth = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = 0.02 * (depth if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
            drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)  # the same on every device
            with torch.no_grad():
                parameter.copy_(drawn)


def new_score_head(config: LlamaConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """What a scalar model has besides a trunk, before training; the head has std 1/sqrt(D + 1) (2403.17031)."""
    weight = torch.empty(1, config.hidden_size).normal_(0.0, 1 / math.sqrt(config.hidden_size + 1), generator=generator)
    return {"score.weight": weight, "score_mean": torch.zeros(()), "score_std": torch.ones(())}


def scalar_from(model: Llama, generator: torch.Generator) -> ScalarModel:
    """A scalar model on a copy of this model's trunk."""
    scalar = ScalarModel(model.config)
    trunk = {name: t for name, t in model.state_dict().items() if name.startswith("model.")}
    scalar.load_state_dict(trunk | new_score_head(model.config, generator))
    return scalar
