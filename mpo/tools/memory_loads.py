"""What a stage asks of memory, counted from shapes: parameters, activations, rows. memory.py makes a plan of it.

Parameters are counted on models on torch's meta device, which have shapes but no values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch

from mpo.config import DPOConfig, EvalConfig, PPOConfig, RMConfig, ScoreConfig, SFTConfig, SplitConfig, Training
from mpo.model import lora
from mpo.model.llama import Adapters, Llama, LlamaConfig, ScalarModel
from mpo.runtime.errors import InputError

FLOAT = 4  # bytes of an fp32 number
Model = TypeVar("Model", Llama, ScalarModel)
_models: dict[str, Any] = {}


class Load(NamedTuple):
    """How a stage uses models: what is trained, what is only read, and what one pass computes."""

    trained: float  # parameters
    frozen: float  # parameters
    tokens: int  # of a microbatch: N
    responses: int  # response tokens among them: M
    segments: int = 0  # of the packed microbatch, where something is trained: S
    models: int = 1  # whose activations are held at the same time
    sampled: int = 0  # rows that are sampled at a time
    length: int = 0  # largest length of such a row
    prompt: int = 0  # largest length of its prompt
    parent: int = 0  # the longest parent of a segment: P
    longest: int = 0  # the longest segment: T
    heads: int = 0  # matrices (V, D), embeddings, heads and their gradients, that are gathered at the same time


# --- counts ---------------------------------------------------------------------------------------


def shapes_of(kind: type[Model], c: LlamaConfig) -> Model:
    """A model on the meta device: shapes without values. Made once for each config."""
    key = f"{kind.__name__} {c}"
    if key not in _models:
        with torch.device("meta"):
            _models[key] = kind(c)
    model: Model = _models[key]
    return model


def parameters(c: LlamaConfig, scalar: bool = False) -> int:
    """Parameters of a language model, or of a reward model."""
    model = shapes_of(ScalarModel, c) if scalar else shapes_of(Llama, c)
    return sum(p.numel() for p in model.parameters())


def block_parameters(c: LlamaConfig) -> int:
    """Parameters of one layer."""
    return sum(p.numel() for p in shapes_of(Llama, c).model.layers[0].parameters())


def adapter_parameters(c: LlamaConfig, rank: int, targets: str) -> int:
    """Parameters of all adapters of a model."""
    with torch.device("meta"):
        layer = Llama(replace(c, num_hidden_layers=1))
        lora.attach(layer, Adapters(rank, 1.0, tuple(t.strip() for t in targets.split(",")), 0, ""))
    of_layer = sum(p.numel() for name, p in layer.named_parameters() if ".lora_" in name)
    return c.num_hidden_layers * of_layer


def adapted_inputs(c: LlamaConfig, targets: str) -> int:
    """Numbers that the adapters of one layer read, for one token."""
    with torch.device("meta"):
        layer = Llama(replace(c, num_hidden_layers=1))
        lora.attach(layer, Adapters(1, 1.0, tuple(t.strip() for t in targets.split(",")), 0, ""))
    return sum(adapted.in_features for adapted in lora.adapted(layer).values())


def matrices(c: LlamaConfig) -> int:
    """How many matrices (V, D) a language model has: one that is embedding and head, or two."""
    return 1 if c.tie_word_embeddings else 2


def adafactor_state(c: LlamaConfig) -> int:
    """Numbers that Adafactor keeps for a language model: a row and a column of each matrix, and each vector."""
    return sum(sum(p.shape) if p.dim() > 1 else p.numel() for p in shapes_of(Llama, c).parameters())


# --- activations ---------------------------------------------------------------------------------


def layer_activations(c: LlamaConfig) -> int:
    """Numbers that the compiled kernels keep for the backward pass, for one token in one layer.

    The residual stream before and after the attention, and both normed; rotated queries and keys, values, the
    attention's output; gate, up and their product. In other families than Llama also: what the two further norms read;
    queries and keys before their norm; the activation's result.
    """
    queries_and_keys = (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    more = c.family.four_norms * 2 * c.hidden_size + c.family.qk_norm * queries_and_keys
    more += (c.hidden_act != "silu") * c.intermediate_size
    return 4 * c.hidden_size + 2 * queries_and_keys + 3 * c.intermediate_size + more


def plain_layer(c: LlamaConfig, use: Load, held: int, adapted: int = 0) -> float:
    """Bytes that torch's own operations (on GPUs, and in bf16) keep in one layer, for all tokens.

    For each token: what is normed, before and after its product with the weight; the attention's output; gate, its
    silu, up and the product. And as rectangles, segments by the longest: queries, keys, values and output.

    `adapted`: numbers of a token that the adapters of bf16 weights read. Each adapter keeps its own in fp32, and what
    only the gradients of the weights need, which are fixed, is not kept.
    """
    heads = c.num_attention_heads * c.head_dim
    of_number = 8 + held if c.family.one_plus else 4 + 2 * held  # Gemma multiplies by the weight in fp32
    of_number = 4 if adapted else of_number
    normed = (4 if c.family.four_norms else 2) * c.hidden_size * of_number
    normed += c.family.qk_norm * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim * of_number
    of_token = normed + held * (heads + 4 * c.intermediate_size)
    if adapted:
        of_token += FLOAT * adapted - held * (heads + c.intermediate_size)
    return use.tokens * of_token + held * use.segments * heads * (2 * use.longest + 2 * (use.parent + use.longest))


# --- what each stage asks for ---------------------------------------------------------------------


def _rows(config: Training, batch: int, processes: int) -> int:
    """Rows of a microbatch in one process."""
    assert config.microbatch, "0 stands for what fits: with_microbatch"
    return min(config.microbatch, -(-batch // processes))


def _heads(config: Training, trained: int, frozen: int = 0) -> int:
    """Matrices (V, D) of all models that are gathered at the same time; those that are trained have gradients, too."""
    return max(trained + frozen, trained if config.lora_rank else 2 * trained)


def _adapters(config: Training, c: LlamaConfig) -> int:
    return adapter_parameters(c, config.lora_rank, config.lora_targets) if config.lora_rank else 0


def _shape(config: Training, trained: int) -> dict[str, int]:
    P, R = config.max_prompt, config.max_response
    return {"parent": P, "longest": max(P, R), "heads": _heads(config, trained)}


def _sft(config: SFTConfig, c: LlamaConfig, processes: int) -> Load:
    model, rows, P, R = parameters(c), _rows(config, config.batch, processes), config.max_prompt, config.max_response
    trained, frozen = (_adapters(config, c), model) if config.lora_rank else (model, 0)
    return Load(trained, frozen, rows * (P + R), rows * R, 2 * rows, **_shape(config, matrices(c)))


def _rm(config: RMConfig, c: LlamaConfig, processes: int) -> Load:
    scalar, rows = parameters(c, scalar=True), _rows(config, config.batch, processes)
    P, R = config.max_prompt, config.max_response
    trained, frozen = (_adapters(config, c), scalar) if config.lora_rank else (scalar, 0)
    return Load(trained, frozen, rows * (P + 2 * R), 0, 3 * rows, **_shape(config, 1))


def _dpo(config: DPOConfig, c: LlamaConfig, processes: int) -> Load:
    model, rows, P, R = parameters(c), _rows(config, config.batch, processes), config.max_prompt, config.max_response
    trained, frozen = (_adapters(config, c), model) if config.lora_rank else (model, 0)
    return Load(trained, frozen, rows * (P + 2 * R), rows * 2 * R, 3 * rows, **_shape(config, matrices(c)))


def _ppo(config: PPOConfig, c: LlamaConfig, processes: int) -> Load:
    model, scalar = parameters(c), parameters(c, scalar=True)
    own = config.advantage == "gae" and not config.shared_critic  # a critic with a trunk of its own
    P, length, rows = config.max_prompt, config.max_prompt + config.max_new, _rows(config, config.minibatch, processes)
    bases = 2 if own and config.shard else 1  # two models cannot share sharded weights
    trained = (1 + own) * _adapters(config, c) if config.lora_rank else model + own * scalar
    frozen = (bases * model if config.lora_rank else model) + scalar  # policy's base or reference, and reward model
    return Load(
        trained,
        frozen,
        tokens=rows * length,
        responses=rows * config.max_new,
        segments=2 * rows,
        models=1 + own,
        sampled=-(-config.batch // processes),
        length=length,
        prompt=P,
        parent=P,
        longest=max(P, config.max_new),
        heads=_heads(config, matrices(c) + own, (0 if config.lora_rank else matrices(c)) + 1),
    )


def _split(config: SplitConfig | ScoreConfig, c: LlamaConfig, processes: int) -> Load:
    rows, scalars = -(-config.microbatch // processes), len(config.rm.split(","))
    tokens = rows * (config.max_prompt + 2 * config.max_response)
    return Load(0, scalars * parameters(c, scalar=True), tokens, 0, heads=scalars)


def _eval(config: EvalConfig, c: LlamaConfig, processes: int) -> Load:
    rows, length = -(-config.batch // processes), config.max_prompt + config.max_new
    frozen = 2 * parameters(c) + parameters(c, scalar=True)
    lengths = {"sampled": rows, "length": length, "prompt": config.max_prompt, "heads": 2 * matrices(c) + 1}
    return Load(0, frozen, rows * length, rows * config.max_new, **lengths)


LOADS: dict[type, Callable[[Any, LlamaConfig, int], Load]] = {
    SFTConfig: _sft,
    RMConfig: _rm,
    DPOConfig: _dpo,
    PPOConfig: _ppo,
    SplitConfig: _split,
    ScoreConfig: _split,
    EvalConfig: _eval,
}
"""A stage's config class -> (config, shape of the model, processes) -> its load. A new stage is a line here."""


def load_of(config: Any, c: LlamaConfig, processes: int) -> Load:
    """What a stage asks for, by its flags. Raises InputError for a stage without a line in LOADS."""
    kind = next((kind for kind in type(config).__mro__ if kind in LOADS), None)
    if kind is None:
        raise InputError(f"--plan: {type(config).__name__} has no line in LOADS (mpo/tools/memory_loads.py)")
    return LOADS[kind](config, c, processes)
