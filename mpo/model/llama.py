"""A Llama-style transformer, and its sibling with a scalar head (reward model, critic).

`Block` is a layer of Llama. Other families replace small parts of it, as families.py says in a line for each: a bias, a
norm, an activation, the positions. In a Llama, such a part is None or does nothing.

Parameter names are those of Hugging Face's models, so that checkpoint.py need not rename anything.
Sources: Llama (2302.13971), RMSNorm (1910.07467), rotary embeddings (2104.09864),
SwiGLU (2002.05202), grouped-query attention (2305.13245).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpo.kernels import functions as kernels
from mpo.kernels.functions import KVCache, LayerWeights, Packing
from mpo.model.families import ATTENTION, FAMILIES, Family
from mpo.runtime import distributed

Rope = tuple[Tensor, Tensor]  # cos and sin of the angles of N tokens, (N, d/2) each


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model, in Hugging Face's names."""

    model_type: str = "llama"  # the family (families.py)
    vocab_size: int = 4096
    hidden_size: int = 96  # D
    intermediate_size: int = 256  # of the MLP
    num_hidden_layers: int = 3
    num_attention_heads: int = 4  # H
    num_key_value_heads: int = 2  # H_kv; each is used by H / H_kv query heads
    head_dim: int = 24
    hidden_act: str = "silu"  # of the MLP: a name in ACTIVATIONS
    attention_bias: bool = False  # a bias in all projections of the attention
    mlp_bias: bool = False
    query_pre_attn_scalar: float | None = None  # attention scores are divided by its square root; None: by head_dim's
    max_position_embeddings: int = 1024
    sliding_window: int | None = None  # how many tokens a token attends to, itself among them; None: all before it
    layer_types: tuple[str, ...] = ()  # "sliding_attention" layers have the window, "full_attention" not; (): all have
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] = field(default_factory=dict)  # {}, a linear scaling (factor), or one of llama3
    rope_local_base_freq: float | None = None  # theta of the sliding layers, which are not scaled; None: as all others
    no_rope_layers: tuple[int, ...] = ()  # 0 for a layer without positions; (): all layers have them
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1  # None: the family has none, and EOS begins a text
    eos_token_id: int | tuple[int, ...] = 2  # each of several ends a text elsewhere; here the tokenizer's EOS does
    pad_token_id: int | None = 3  # may be None: nothing is padded, and masks come from lengths

    @property
    def family(self) -> Family:
        """In what its layers differ from Llama's."""
        return FAMILIES[self.model_type]

    def has_bias(self, projection: str) -> bool:
        """Whether this projection ("q_proj", ...) has a bias."""
        return projection in self.family.biases or (self.attention_bias if projection in ATTENTION else self.mlp_bias)

    def window(self, layer: int) -> int | None:
        """How many tokens a token attends to in this layer; None: all before it."""
        slides = not self.layer_types or self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides else None

    @property
    def positions(self) -> list[str]:
        """The kinds of positions that its layers have, each a row of `rotary_frequencies`: rope, local or none."""
        return sorted({self.positions_of(layer) for layer in range(self.num_hidden_layers)})

    def positions_of(self, layer: int) -> str:
        """The kind of positions of one layer."""
        if self.no_rope_layers and not self.no_rope_layers[layer]:
            return "none"
        return "local" if self.rope_local_base_freq and self.window(layer) else "rope"


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
    """The angular frequencies of the rotary embedding, for each kind of positions in the model: (kinds, d/2)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    of_kind: dict[str, Callable[[], Tensor]] = {
        "rope": lambda: _scaled(1.0 / config.rope_theta**exponents, config.rope_scaling),
        "local": lambda: 1.0 / (config.rope_local_base_freq or config.rope_theta) ** exponents,
        "none": lambda: torch.zeros_like(exponents),  # a rotation by 0
    }
    return torch.stack([of_kind[kind]() for kind in config.positions])


def _scaled(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Frequencies (d/2,) for texts longer than those that a model was first trained on."""
    if not scaling:
        return frequencies
    if "low_freq_factor" not in scaling:  # linear: stretch all wavelengths (2306.15595)
        return frequencies / scaling["factor"]
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
        """(..., D) -> (..., D)"""
        return kernels.rms_norm(x, self.weight, self.eps)


class OnePlusRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight), in fp32, since 1 + weight would lose most of a weight's digits in bf16. Gemma's."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        return kernels.rms_norm(x.float(), 1 + self.weight.float(), self.eps).to(x.dtype)


def norm(c: LlamaConfig, width: int) -> RMSNorm:
    """The family's kind of norm."""
    return (OnePlusRMSNorm if c.family.one_plus else RMSNorm)(width, c.rms_norm_eps)


class Linear(nn.Linear):
    """A linear layer, computed by kernels/. In a Llama none has a bias."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs)"""
        y = kernels.linear(x, self.weight)
        return y if self.bias is None else y + self.bias

    def merged(self) -> Tensor:
        """(outputs, inputs): the matrix that the layer multiplies with; an adapter changes it (lora.AdaptedLinear)."""
        return self.weight


def pick(x: Tensor, wanted: Tensor | None) -> Tensor:
    """The rows (M, ...) of x (N, ...) that are wanted; without such a list, all."""
    return x if wanted is None else x.index_select(0, wanted)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__()
        self.config, self.window = c, c.window(layer)
        heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, heads, c.has_bias("q_proj"))
        self.k_proj = Linear(c.hidden_size, kv_heads, c.has_bias("k_proj"))
        self.v_proj = Linear(c.hidden_size, kv_heads, c.has_bias("v_proj"))
        self.o_proj = Linear(heads, c.hidden_size, c.has_bias("o_proj"))
        self.q_norm = norm(c, c.head_dim) if c.family.qk_norm else nn.Identity()
        self.k_norm = norm(c, c.head_dim) if c.family.qk_norm else nn.Identity()
        # Scores are divided by the square root of head_dim; what they are to be divided by besides that.
        self.divisor = math.sqrt((c.query_pre_attn_scalar or c.head_dim) / c.head_dim)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        packing: Packing | None,
        cache: KVCache | None,
        layer: int,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """x (N, D) -> (N, D); see Block.forward."""
        heads = (len(x), -1, self.config.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)  # (N, H, d)
        q, k = kernels.rotate(self.q_norm(q), *rope), kernels.rotate(self.k_norm(k), *rope)
        q = q if self.divisor == 1 else q / self.divisor
        if cache is not None and packing is not None:
            cache.fill(layer, k, v, packing)
        if packing is not None:
            attended = kernels.attention(q, k, v, packing, self.window)
        else:
            assert cache is not None
            attended = cache.attend(layer, q, k, v, self.window)
        return self.o_proj(pick(attended.flatten(1), wanted))


def gelu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, with the approximation of gelu that uses tanh."""
    return F.gelu(gate, approximate="tanh") * up


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"silu": kernels.swiglu, "gelu_pytorch_tanh": gelu_gate}


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, c.has_bias("gate_proj"))
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, c.has_bias("up_proj"))
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.has_bias("down_proj"))
        self.gated = ACTIVATIONS[c.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)"""
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = norm(c, c.hidden_size)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = norm(c, c.hidden_size)
        self.mlp = MLP(c)
        self.recompute = False  # compute activations again in the backward pass instead of keeping them (1604.06174)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        packing: Packing | None,
        cache: KVCache | None,
        layer: int,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """(N, D) -> (N, D), for N tokens of packed texts or, without a packing, one more of each text in the cache.

        With `wanted`, positions (M,), only their outputs are computed: (M, D).
        """
        inputs = (x, rope, packing, cache, layer, wanted)
        if cache is not None:  # never compiled: torch.compile cannot trace the compiled kernels' cache
            return type(self).compute(self, *inputs)
        if self.recompute and torch.is_grad_enabled():
            again: Tensor = checkpoint(self.compute, *inputs, use_reentrant=False, preserve_rng_state=False)
            return again
        return self.compute(*inputs)

    def compute(
        self,
        x: Tensor,
        rope: Rope,
        packing: Packing | None,
        cache: KVCache | None,
        layer: int,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """See forward."""
        x = pick(x, wanted) + self.self_attn(self.input_layernorm(x), rope, packing, cache, layer, wanted)
        return x + self.mlp(self.post_attention_layernorm(x))

    def weights(self) -> LayerWeights:
        """The layer's weights by role, for the kernel that generates."""
        a, m = self.self_attn, self.mlp
        q, k, v, o = (layer.merged() for layer in (a.q_proj, a.k_proj, a.v_proj, a.o_proj))
        gate, up, down = (layer.merged() for layer in (m.gate_proj, m.up_proj, m.down_proj))
        biases = (layer.bias for layer in (a.q_proj, a.k_proj, a.v_proj))
        norms = (getattr(norm, "weight", None) for norm in (a.q_norm, a.k_norm))
        own = self.input_layernorm.weight, q, k, v, o, self.post_attention_layernorm.weight, gate, up, down
        return LayerWeights(*own, *biases, *norms)


class FourNormBlock(Block):
    """A layer of Gemma 3: x + norm(attention(norm(x))), then x + norm(mlp(norm(x))).

    Its post_attention_layernorm is where the name says; in a Llama, the norm before the MLP has that name.
    """

    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__(c, layer)
        self.pre_feedforward_layernorm = norm(c, c.hidden_size)
        self.post_feedforward_layernorm = norm(c, c.hidden_size)

    def compute(
        self,
        x: Tensor,
        rope: Rope,
        packing: Packing | None,
        cache: KVCache | None,
        layer: int,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """See Block.forward."""
        attended = self.self_attn(self.input_layernorm(x), rope, packing, cache, layer, wanted)
        x = pick(x, wanted) + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Trunk(nn.Module):
    """Token ids to hidden states: everything but the head."""

    frequencies: Tensor

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        kind = FourNormBlock if c.family.four_norms else Block
        self.layers = nn.ModuleList(kind(c, i) for i in range(c.num_hidden_layers))
        self.norm = norm(c, c.hidden_size)
        self.register_buffer("frequencies", rotary_frequencies(c), persistent=False)
        self.positions = [c.positions.index(c.positions_of(i)) for i in range(c.num_hidden_layers)]
        self.compiled = False

    @property
    def blocks(self) -> list[Block]:
        """The layers, by their type."""
        return [block for block in self.layers if isinstance(block, Block)]

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (N,) -> (N, D)."""
        x: Tensor = self.embed_tokens(ids)
        if not self.config.family.scaled_embeddings:
            return x
        # The factor is rounded to the dtype of the weights, as it was when these models were trained.
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)

    def ropes(self, positions: Tensor) -> list[Rope]:
        """Cos and sin of the rotary angles at positions (N,), for each layer."""
        of_kind = [positions[:, None].float() * frequencies for frequencies in self.frequencies]  # (N, d/2) each
        rotations = [(angles.cos(), angles.sin()) for angles in of_kind]
        return [rotations[kind] for kind in self.positions]

    def forward(
        self, ids: Tensor, packing: Packing, cache: KVCache | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """Hidden states (N, D) of token ids (N,), packed end to end as `packing` says.

        With `wanted`, positions (M,), only their hidden states (M, D): the last layer need not compute the others.
        A cache is filled on the way, with texts of one segment each; `decoder` continues from it.
        """
        x, ropes = self.embed(ids), self.ropes(packing.positions)  # (N, D)
        if self.compiled:
            for block in self.blocks:  # masks are made here, since torch.compile cannot trace it
                packing.mask(x.dtype, packing.hiding(block.self_attn.window))
        for i, (layer, rope) in enumerate(zip(self.layers, ropes, strict=True)):
            x = layer(x, rope, packing, cache, i, wanted if i == len(self.layers) - 1 else None)
        if cache is not None:
            cache.begin(packing.lengths)
        return self.norm(x)

    def decoder(self, cache: KVCache, whole: bool = True) -> Callable[[Tensor], Tensor]:
        """A function from ids (B,), one more token of each text in the cache, to hidden states (B, D); no gradients.

        Without `whole`, sharded layers are gathered when their turn comes, in each step.
        """
        if whole and self.has_kernel(cache.room):
            weights = [block.weights() for block in self.blocks]
            all_layers = kernels.decoder(weights, self.norm.weight, self.norm.eps, cache)
            return lambda ids: all_layers(self.embed(ids), *self.ropes(cache.lengths)[0])

        def step(ids: Tensor) -> Tensor:
            x, blocks = self.embed(ids), self.blocks if whole else distributed.in_turn(self.blocks)
            for i, (block, rope) in enumerate(zip(blocks, self.ropes(cache.lengths), strict=True)):
                compute = type(block).compute  # never torch.compile's, since the cache grows at each step
                x = compute(block, x, rope, None, cache, i)
            cache.advance()
            return self.norm(x)

        return step

    def has_kernel(self, room: int) -> bool:
        """Whether `kernels.decoder` computes this model for texts of up to `room` tokens.

        It knows biases of q, k and v and norms of q and k, but only one kind of positions, and no window.
        """
        c = self.config
        as_llama = not (c.family.four_norms or c.family.one_plus or c.query_pre_attn_scalar) and c.hidden_act == "silu"
        no_bias = not any(map(c.has_bias, ("o_proj", "gate_proj", "up_proj", "down_proj")))
        all_seen = all((c.window(i) or room) >= room for i in range(c.num_hidden_layers))
        return as_llama and no_bias and all_seen and len(c.positions) == 1

    def take_part(self) -> None:
        """Give this process's part of sharded layers to processes that compute with them, and compute nothing."""
        for _ in distributed.in_turn(self.blocks):
            pass


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

    def forward(
        self, ids: Tensor, packing: Packing, cache: KVCache | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """(N,) -> hidden states (N, D), or (M, D); see Trunk.forward."""
        return self.model(ids, packing, cache, wanted)

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, V): for tests and for looking at; training never holds this tensor."""
        return self.lm_head(self.model(ids.flatten(), Packing([ids.shape[1]] * len(ids), device=ids.device))).unflatten(
            0, ids.shape
        )

    def kv_cache(self, rows: int, length: int, whole: bool = True) -> KVCache:
        """An empty cache for `rows` texts of at most `length` tokens. `whole`: see Trunk.decoder."""
        c = self.config
        sizes = c.num_hidden_layers, rows, length, c.num_key_value_heads, c.head_dim
        # The compiled kernel copies the weights of all layers before it begins.
        impl = None if whole and self.model.has_kernel(length) else "reference"
        return kernels.kv_cache(*sizes, self.lm_head.weight, impl=impl)


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

    def forward(self, ids: Tensor, packing: Packing, wanted: Tensor | None = None) -> Tensor:
        """(N,) -> (N,), or (M,), in fp32; see Trunk.forward."""
        raw = self.score(self.model(ids, packing, None, wanted).float()).squeeze(-1)
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
    """Normal weights of std 0.02, projections into the residual stream scaled by 1/sqrt(2 layers); biases of 0."""
    depth = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = 0.02 * (depth if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
            drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)  # the same on every device
            with torch.no_grad():
                parameter.copy_(drawn)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)


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
