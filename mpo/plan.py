"""What a stage will hold in memory, from shapes alone, before anything of its size is allocated: --plan true.

All numbers are for the worst case, a microbatch whose rows are as long as the limits allow.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpo import parallel
from mpo.checkpoint import config_from_json
from mpo.config import DPOConfig, EvalConfig, PPOConfig, RMConfig, SFTConfig, SplitConfig, Training
from mpo.errors import InputError
from mpo.model import PRESETS, LlamaConfig
from mpo.optimisers import make_optimiser, optimiser_step
from mpo.sampling import PREFILL
from mpo.stage import peak_memory_mb
from mpo.vocabulary import load_vocabulary

FLOAT = 4  # bytes
COLUMNS = 2**21  # gradients of logits that kernels/head.py holds at a time, twice


class Line(NamedTuple):
    """Something that is held, and its size."""

    what: str
    bytes: float


class Load(NamedTuple):
    """How a stage uses models: what learns, what only looks, and what one pass sees."""

    learning: float  # parameters
    frozen: float
    tokens: int  # of a microbatch: N
    responses: int  # of these, response tokens: M
    pieces: int = 0  # that they make up (kernels/pieces.py), where something learns: S
    models: int = 1  # whose activations are held at once
    sampled: int = 0  # rows that are sampled at a time
    length: int = 0  # of each of them, at most
    prompt: int = 0
    past: int = 0  # the longest parent of a piece: P
    longest: int = 0  # the longest piece: T


def block_parameters(c: LlamaConfig) -> int:
    """Of one layer."""
    attention = 2 * c.hidden_size * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    return attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size


def parameters(c: LlamaConfig, scalar: bool = False) -> int:
    """Of a language model, or of a reward model."""
    head = c.hidden_size if scalar else 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    return c.vocab_size * c.hidden_size + c.num_hidden_layers * block_parameters(c) + c.hidden_size + head


def adapter_parameters(c: LlamaConfig, rank: int, targets: str) -> int:
    """Of all adapters of a model."""
    q, kv, D, F = (
        c.num_attention_heads * c.head_dim,
        c.num_key_value_heads * c.head_dim,
        c.hidden_size,
        c.intermediate_size,
    )
    sides = {"q_proj": D + q, "k_proj": D + kv, "v_proj": D + kv, "o_proj": q + D}
    sides |= {"gate_proj": D + F, "up_proj": D + F, "down_proj": F + D}
    return c.num_hidden_layers * rank * sum(sides[t.strip()] for t in targets.split(",") if t.strip() in sides)


def layer_activations(c: LlamaConfig) -> int:
    """Numbers that one layer keeps of a token for the backward pass.

    The stream before and behind the attention and both normed, rotated queries and keys, values, the attention's
    output; gate, up and their product.
    """
    heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    return 4 * c.hidden_size + heads + 3 * c.intermediate_size


def plain_layer(c: LlamaConfig, use: Load, held: int) -> float:
    """The same of all tokens, in bytes, where torch's own operations compute (on GPUs, and in bf16).

    Of each token: what is normed, before and behind its product with the weight; the attention's output; gate, its
    silu, up and the product. And as rectangles, pieces by their longest: queries, keys, values and output.
    """
    heads = c.num_attention_heads * c.head_dim
    normed = 2 * c.hidden_size * (4 + 2 * held)
    of_token = normed + held * (heads + 4 * c.intermediate_size)
    return use.tokens * of_token + held * use.pieces * heads * (2 * use.longest + 2 * (use.past + use.longest))


def adafactor_state(c: LlamaConfig) -> int:
    """Numbers that Adafactor keeps of a language model: rows and columns of each matrix, and its vectors."""
    q, kv = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
    layer = 2 * (c.hidden_size + q) + 2 * (c.hidden_size + kv) + 3 * (c.hidden_size + c.intermediate_size)
    heads = (1 if c.tie_word_embeddings else 2) * (c.vocab_size + c.hidden_size)
    return c.num_hidden_layers * (layer + 2 * c.hidden_size) + c.hidden_size + heads


def load_of(config: Training | SplitConfig | EvalConfig, c: LlamaConfig, processes: int) -> Load:
    """What a stage asks for, by its flags."""
    lm, scalar = parameters(c), parameters(c, scalar=True)
    P, R = config.max_prompt, config.max_response
    share = -(-config.batch // processes)  # of the rows of a step
    rows = min(config.microbatch, share) if isinstance(config, Training) else 0
    lora = isinstance(config, Training) and config.lora_rank
    adapters = adapter_parameters(c, config.lora_rank, config.lora_targets) if isinstance(config, Training) else 0
    if isinstance(config, SFTConfig):
        learns = adapters if lora else lm
        heard = rows * (P + R if config.loss_on == "all" else R)
        return Load(learns, lm if lora else 0, rows * (P + R), heard, 2 * rows, past=P, longest=max(P, R))
    if isinstance(config, RMConfig):
        learns, frozen = (adapters, scalar) if lora else (scalar, 0)
        return Load(learns, frozen, rows * (P + 2 * R), 0, 3 * rows, past=P, longest=max(P, R))
    if isinstance(config, DPOConfig):
        learns, frozen = (adapters, lm) if lora else (lm, 0)
        return Load(learns, frozen, rows * (P + 2 * R), rows * 2 * R, 3 * rows, past=P, longest=max(P, R))
    if isinstance(config, PPOConfig):
        own = config.advantage == "gae" and not config.shared_critic
        length, step = P + config.max_new, -(-config.minibatch // processes)
        rows = min(config.microbatch, step)
        bases = 2 if own and config.shard else 1  # two models cannot share sharded weights
        learns = (1 + own) * adapters if lora else lm + own * scalar
        frozen = (bases * lm if lora else lm) + scalar  # policy (and reference), reward model
        sizes = rows * length, rows * config.max_new, 2 * rows, 1 + own, share, length, P
        return Load(learns, frozen, *sizes, past=P, longest=max(P, config.max_new))
    if isinstance(config, SplitConfig):
        return Load(0, len(config.rm.split(",")) * scalar, share * (P + 2 * R), 0)
    assert isinstance(config, EvalConfig)
    length = P + config.max_new
    return Load(0, 2 * lm + scalar, share * length, share * config.max_new, sampled=share, length=length, prompt=P)


def lines(
    config: Training | SplitConfig | EvalConfig, c: LlamaConfig, processes: int = 1, base: float = 0.0, cpu: bool = True
) -> list[Line]:
    """All that one process holds at the worst moment. `base`: bytes of the program itself."""
    use, D, F, V = load_of(config, c, processes), c.hidden_size, c.intermediate_size, c.vocab_size
    parts = processes if config.shard and processes > 1 else 1
    held = 2 if config.dtype == "bfloat16" else FLOAT
    learnt = FLOAT if isinstance(config, Training) and config.lora_rank else held  # adapters are in fp32
    found = [Line("the program and torch", base)]
    found.append(Line("weights", (learnt * use.learning + held * use.frozen) / parts))
    if parts > 1:  # two blocks, one of which is on its way, and what is left of each model
        left = 2 * (V * D * (1 if c.tie_word_embeddings else 2))
        found.append(Line("gathered weights", held * (2 * block_parameters(c) + left)))
    passing = held * use.tokens * (2 * D + 3 * F)  # what a layer's pass holds besides what it keeps
    head = 2 * FLOAT * min(COLUMNS, V * use.responses) + FLOAT * V * D if use.learning and use.responses else 0.0
    working, learning = head + passing, 0.0
    if isinstance(config, Training):
        gradients = learnt * use.learning / parts
        found.append(Line("optimiser", optimiser_bytes(config, c, use) / parts))
        if processes > 1 and parts == 1:
            found.append(Line("gradients on their way", gradients))
        plain, layers = held < FLOAT or not cpu, c.num_hidden_layers
        layer = plain_layer(c, use, held) if plain else FLOAT * use.tokens * layer_activations(c)
        kept = layers * held * use.tokens * D + layer if config.recompute else layers * layer
        activations = use.models * (kept + held * (2 * use.tokens * D + use.responses * D))
        # Gradients come as activations go, but they do not fit into the holes: both count.
        learning = gradients + activations
    sampling = 0.0
    if use.sampled:
        cache = held * 2 * c.num_hidden_layers * use.sampled * use.length * c.num_key_value_heads * c.head_dim
        copies = held * parameters(c) * ((cpu and held == FLOAT) + (parts > 1))  # rearranged; gathered
        begun = min(use.sampled * use.prompt, max(PREFILL, use.prompt))
        sampling = cache + copies + held * begun * (2 * D + 3 * F)
    if sampling > learning + working:  # they take turns
        return [*found, Line("KV cache", cache), Line("sampling", sampling - cache)]
    if isinstance(config, Training):
        found += [Line("gradients", gradients), Line("activations", activations)]
    return [*found, Line("head, passing layers", working)]


def optimiser_bytes(config: Training, c: LlamaConfig, use: Load) -> float:
    """Moments, which are in fp32, and where weights are changed one by one, the copies of the largest."""
    adafactor = config.optimiser == "adafactor"
    moments = 2.0 * use.learning
    if adafactor:
        moments = use.learning / parameters(c) * adafactor_state(c)
    one_by_one = adafactor or (config.dtype == "bfloat16" and not config.lora_rank)
    return FLOAT * (moments + one_by_one * 5 * c.hidden_size * max(c.vocab_size, c.intermediate_size))


def model_of(config: Any) -> LlamaConfig:
    """The shape of the model that a stage reads. Errors: InputError where nothing tells it yet."""
    name = getattr(config, "model", "") or getattr(config, "rm", "").split(",")[0]
    if name not in PRESETS:
        return config_from_json(Path(name) / "config.json")
    if not Path(config.tokenizer).is_dir():
        raise InputError(f"--tokenizer {config.tokenizer}: no such folder; the plan needs the vocabulary's size")
    return replace(PRESETS[name], vocab_size=load_vocabulary(Path(config.tokenizer)).size)


def program() -> float:
    """Bytes that this program takes with a model of no size, once it has taken a step (which imports half of torch)."""
    nothing = torch.nn.Linear(2, 2)
    optimiser = make_optimiser(nothing, 0.0, 0.0)
    nothing(torch.zeros(1, 2)).sum().backward()
    optimiser_step(optimiser, nothing, 0.0, 1.0)
    return peak_memory_mb() * 2**20


def available() -> float:
    """Bytes of memory that are free on this machine."""
    try:
        found = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return float(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def show(config: Training | SplitConfig | EvalConfig) -> None:
    """Print the plan of a stage, and a warning where the machine has not as much."""
    parallel.start(config.shard)
    processes, here = parallel.count(), parallel.here()
    c = model_of(config)
    found = lines(config, c, processes, base=program())
    size = f"a model of {parameters(c) / 1e6:,.1f} M parameters, {processes} processes; each:"
    print(f"plan of {Path(config.out).name}: {size}")
    for line in found:
        print(f"  {line.what:24} {line.bytes / 2**20:12,.0f} MB")
    total = sum(line.bytes for line in found)
    print(f"  {'total':24} {total / 2**20:12,.0f} MB")
    if total * here > available():
        print(
            f"warning: {here} such processes need {total * here / 2**30:,.1f} GB, {available() / 2**30:,.1f} are free; "
            "lower --microbatch, --max_prompt or --max_response, or take --recompute, --lora_rank, --dtype or --shard"
        )
