"""The memory plan: what a stage will hold in memory, computed from shapes before anything is allocated (--plan true).

All numbers are for the worst case, a microbatch whose rows are as long as the limits allow. Parameters are counted on
models on torch's meta device, which have shapes but no values.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from mpo.config import DPOConfig, EvalConfig, PPOConfig, RMConfig, SFTConfig, SplitConfig, Training
from mpo.data.vocabulary import load_vocabulary
from mpo.kernels.autograd import HEAD_COLUMNS
from mpo.model import lora
from mpo.model.generate import PREFILL
from mpo.model.hf_config import config_from_json
from mpo.model.llama import PRESETS, Adapters, Llama, LlamaConfig, ScalarModel
from mpo.runtime import distributed
from mpo.runtime.errors import InputError
from mpo.runtime.stage import peak_memory_mb
from mpo.training.optimisers import STACK, make_optimiser, optimiser_step

FLOAT = 4  # bytes of an fp32 number
Model = TypeVar("Model", Llama, ScalarModel)
_models: dict[str, Any] = {}


class Line(NamedTuple):
    """One line of the plan: something that is held, and its size."""

    what: str
    bytes: float


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


def adafactor_state(c: LlamaConfig) -> int:
    """Numbers that Adafactor keeps for a language model: a row and a column of each matrix, and each vector."""
    return sum(sum(p.shape) if p.dim() > 1 else p.numel() for p in shapes_of(Llama, c).parameters())


# --- activations ---------------------------------------------------------------------------------


def layer_activations(c: LlamaConfig) -> int:
    """Numbers that the compiled kernels keep for the backward pass, for one token in one layer.

    The residual stream before and after the attention, and both normed; rotated queries and keys, values, the
    attention's output; gate, up and their product.
    """
    heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    return 4 * c.hidden_size + heads + 3 * c.intermediate_size


def plain_layer(c: LlamaConfig, use: Load, held: int) -> float:
    """Bytes that torch's own operations (on GPUs, and in bf16) keep in one layer, for all tokens.

    For each token: what is normed, before and after its product with the weight; the attention's output; gate, its
    silu, up and the product. And as rectangles, segments by the longest: queries, keys, values and output.
    """
    heads = c.num_attention_heads * c.head_dim
    normed = 2 * c.hidden_size * (4 + 2 * held)
    of_token = normed + held * (heads + 4 * c.intermediate_size)
    return use.tokens * of_token + held * use.segments * heads * (2 * use.longest + 2 * (use.parent + use.longest))


# --- what each stage asks for ---------------------------------------------------------------------


def _rows(config: Training, batch: int, processes: int) -> int:
    """Rows of a microbatch in one process."""
    return min(config.microbatch, -(-batch // processes))


def _adapters(config: Training, c: LlamaConfig) -> int:
    return adapter_parameters(c, config.lora_rank, config.lora_targets) if config.lora_rank else 0


def _sft(config: SFTConfig, c: LlamaConfig, processes: int) -> Load:
    model, rows, P, R = parameters(c), _rows(config, config.batch, processes), config.max_prompt, config.max_response
    trained, frozen = (_adapters(config, c), model) if config.lora_rank else (model, 0)
    return Load(trained, frozen, rows * (P + R), rows * R, 2 * rows, parent=P, longest=max(P, R))


def _rm(config: RMConfig, c: LlamaConfig, processes: int) -> Load:
    scalar, rows = parameters(c, scalar=True), _rows(config, config.batch, processes)
    P, R = config.max_prompt, config.max_response
    trained, frozen = (_adapters(config, c), scalar) if config.lora_rank else (scalar, 0)
    return Load(trained, frozen, rows * (P + 2 * R), 0, 3 * rows, parent=P, longest=max(P, R))


def _dpo(config: DPOConfig, c: LlamaConfig, processes: int) -> Load:
    model, rows, P, R = parameters(c), _rows(config, config.batch, processes), config.max_prompt, config.max_response
    trained, frozen = (_adapters(config, c), model) if config.lora_rank else (model, 0)
    return Load(trained, frozen, rows * (P + 2 * R), rows * 2 * R, 3 * rows, parent=P, longest=max(P, R))


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
    )


def _split(config: SplitConfig, c: LlamaConfig, processes: int) -> Load:
    rows, scalars = -(-config.microbatch // processes), len(config.rm.split(","))
    return Load(0, scalars * parameters(c, scalar=True), rows * (config.max_prompt + 2 * config.max_response), 0)


def _eval(config: EvalConfig, c: LlamaConfig, processes: int) -> Load:
    rows, length = -(-config.batch // processes), config.max_prompt + config.max_new
    frozen = 2 * parameters(c) + parameters(c, scalar=True)
    lengths = {"sampled": rows, "length": length, "prompt": config.max_prompt}
    return Load(0, frozen, rows * length, rows * config.max_new, **lengths)


LOADS: dict[type, Callable[[Any, LlamaConfig, int], Load]] = {
    SFTConfig: _sft,
    RMConfig: _rm,
    DPOConfig: _dpo,
    PPOConfig: _ppo,
    SplitConfig: _split,
    EvalConfig: _eval,
}
"""A stage's config class -> (config, shape of the model, processes) -> its load. A new stage is a line here."""


def load_of(config: Any, c: LlamaConfig, processes: int) -> Load:
    """What a stage asks for, by its flags. Raises InputError for a stage without a line in LOADS."""
    kind = next((kind for kind in type(config).__mro__ if kind in LOADS), None)
    if kind is None:
        raise InputError(f"--plan: {type(config).__name__} has no line in LOADS (mpo/tools/memory.py)")
    return LOADS[kind](config, c, processes)


# --- the plan -------------------------------------------------------------------------------------


def lines(
    config: Training | SplitConfig | EvalConfig, c: LlamaConfig, processes: int = 1, base: float = 0.0, cpu: bool = True
) -> list[Line]:
    """All that one process holds at its worst moment. `base`: bytes of the program itself; `cpu`: computed on a CPU."""
    use, D, F, V = load_of(config, c, processes), c.hidden_size, c.intermediate_size, c.vocab_size
    parts = processes if config.shard and processes > 1 else 1
    held = 2 if config.precision == "bf16" else FLOAT
    trained = FLOAT if isinstance(config, Training) and config.lora_rank else held  # bytes; adapters are in fp32
    plan = [Line("the program and torch", base)]
    plan.append(Line("weights", (trained * use.trained + held * use.frozen) / parts))
    if parts > 1:  # two layers, one of which is being gathered, and the rest of each model
        left = 2 * (V * D * (1 if c.tie_word_embeddings else 2))
        plan.append(Line("gathered weights", held * (2 * block_parameters(c) + left)))
    passing = held * use.tokens * (2 * D + 3 * F)  # held while a layer is computed, besides what is kept
    head = 2 * FLOAT * min(HEAD_COLUMNS, V * use.responses) + FLOAT * V * D if use.trained and use.responses else 0.0
    working, learning = head + passing, 0.0
    if isinstance(config, Training):
        gradients = trained * use.trained / parts
        plan.append(Line("optimiser", optimiser_bytes(config, c, use) / parts))
        if processes > 1 and parts == 1:
            plan.append(Line("gradients being averaged", gradients))
        plain, layers = held < FLOAT or not cpu, c.num_hidden_layers
        layer = plain_layer(c, use, held) if plain else FLOAT * use.tokens * layer_activations(c)
        kept = layers * held * use.tokens * D + layer if config.recompute else layers * layer
        activations = use.models * (kept + held * (2 * use.tokens * D + use.responses * D))
        # Gradients appear as activations are freed, but do not fit into the holes, so that both count.
        learning = gradients + activations
    sampling = 0.0
    if use.sampled:
        cache = held * 2 * c.num_hidden_layers * use.sampled * use.length * c.num_key_value_heads * c.head_dim
        copies = held * parameters(c) * ((cpu and held == FLOAT) + (parts > 1))  # packed for the kernels; gathered
        begun = min(use.sampled * use.prompt, max(PREFILL, use.prompt))
        sampling = cache + copies + held * begun * (2 * D + 3 * F)
    if sampling > learning + working:  # sampling and training take turns
        return [*plan, Line("KV cache", cache), Line("sampling", sampling - cache)]
    if isinstance(config, Training):
        plan += [Line("gradients", gradients), Line("activations", activations)]
    return [*plan, Line("head, and what a layer needs for a moment", working)]


def optimiser_bytes(config: Training, c: LlamaConfig, use: Load) -> float:
    """The fp32 moments and, where weights are updated one by one, fp32 copies of the largest weight."""
    adafactor, muon = config.optimiser == "adafactor", config.optimiser == "muon"
    moments, stack = 2.0 * use.trained, 0
    if adafactor:
        moments = use.trained / parameters(c) * adafactor_state(c)
    if muon:  # one moment of a layer's matrices; those that are changed at once are there five times
        moments -= use.trained / parameters(c) * c.num_hidden_layers * block_parameters(c)
        stack = 5 * min(c.num_hidden_layers * c.hidden_size * c.intermediate_size, STACK)
    one_by_one = adafactor or muon or (config.precision == "bf16" and not config.lora_rank)
    copies = 5 * c.hidden_size * max(c.vocab_size, c.intermediate_size)
    return FLOAT * (moments + one_by_one * max(copies, stack))


def model_of(config: Any) -> LlamaConfig:
    """The shape of the model that a stage reads. Raises InputError where it is not known yet."""
    name = getattr(config, "model", "") or getattr(config, "rm", "").split(",")[0]
    if name not in PRESETS:
        return config_from_json(Path(name) / "config.json")
    if not Path(config.tokenizer).is_dir():
        raise InputError(f"--tokenizer {config.tokenizer}: no such folder; the plan needs the vocabulary's size")
    return replace(PRESETS[name], vocab_size=load_vocabulary(Path(config.tokenizer)).size)


def program() -> float:
    """Bytes that the program takes by itself, after a training step, which imports half of torch."""
    nothing = torch.nn.Linear(2, 2)
    optimiser = make_optimiser(nothing, 0.0, 0.0)
    nothing(torch.zeros(1, 2)).sum().backward()
    optimiser_step(optimiser, nothing, 0.0, 1.0)
    return peak_memory_mb() * 2**20


def available() -> float:
    """Bytes of memory that are free on this machine."""
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        return float(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def longest_rows(config: Training | SplitConfig | EvalConfig) -> str:
    """The rows of the worst case, in words: the longest prompt plus the longest response or, of a pair, two of them."""
    of_pair = "2 x " if isinstance(config, (RMConfig, DPOConfig, SplitConfig)) else ""
    return f"rows of {config.max_prompt} + {of_pair}{getattr(config, 'max_new', config.max_response)} tokens"


def show(config: Training | SplitConfig | EvalConfig) -> None:
    """Print the plan of a stage, and a warning if the machine has less memory than that."""
    distributed.start(config.shard)
    processes, here = distributed.world_size(), distributed.local_world_size()
    c = model_of(config)
    plan = lines(config, c, processes, base=program())
    each = "one process" if processes == 1 else f"{processes} processes, each"
    size = f"a model of {parameters(c) / 1e6:,.1f} M parameters, {each}"
    print(f"plan of {Path(config.out).name}, at worst ({longest_rows(config)}): {size}:")
    total = sum(line.bytes for line in plan)
    width = max(len(line.what) for line in plan)
    for line in [*plan, Line("total", total)]:
        print(f"  {line.what:{width}} {line.bytes / 2**20:10,.0f} MB")
    if total * here > available():
        print(
            f"warning: {here} such processes need {total * here / 2**30:,.1f} GB, {available() / 2**30:,.1f} are free; "
            "lower --microbatch, --max_prompt or --max_response; or use --recompute, --lora_rank, --precision, --shard"
        )
