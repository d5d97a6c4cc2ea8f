"""What a stage will hold in memory, from shapes alone, before anything of its size is allocated: --plan true.

All numbers are for the worst case, a microbatch whose rows are as long as the limits allow, and for fp32 weights.
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
from mpo.stage import peak_memory_mb
from mpo.training import adamw, optimiser_step
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
    models: int = 1  # whose activations are held at once
    sampled: int = 0  # rows that are sampled at a time
    length: int = 0  # of each of them, at most
    prompt: int = 0


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
        return Load(learns, lm if lora else 0, rows * (P + R), rows * (P + R if config.loss_on == "all" else R))
    if isinstance(config, RMConfig):
        return Load(adapters if lora else scalar, scalar if lora else 0, rows * (P + 2 * R), 0)
    if isinstance(config, DPOConfig):
        return Load(adapters if lora else lm, lm if lora else 0, rows * (P + 2 * R), rows * 2 * R)
    if isinstance(config, PPOConfig):
        own = config.advantage == "gae" and not config.shared_critic
        length, step = P + config.max_new, -(-config.minibatch // processes)
        rows = min(config.microbatch, step)
        bases = 2 if own and config.shard else 1  # two models cannot share sharded weights
        learns = (1 + own) * adapters if lora else lm + own * scalar
        frozen = (bases * lm if lora else lm) + scalar  # policy (and reference), reward model
        return Load(learns, frozen, rows * length, rows * config.max_new, 1 + own, share, length, P)
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
    found = [Line("the program and torch", base)]
    found.append(Line("weights", FLOAT * (use.learning + use.frozen) / parts))
    if parts > 1:  # two blocks, one of which is on its way, and what is left of each model
        left = 2 * (V * D * (1 if c.tie_word_embeddings else 2))
        found.append(Line("gathered weights", FLOAT * (2 * block_parameters(c) + left)))
    passing = FLOAT * use.tokens * (2 * D + 3 * F)  # what a layer's pass holds besides what it keeps
    head = 2 * FLOAT * min(COLUMNS, V * use.responses) + FLOAT * V * D if use.learning and use.responses else 0.0
    working, learning = head + passing, 0.0
    if isinstance(config, Training):
        gradients = FLOAT * use.learning / parts
        found.append(Line("optimiser", 2 * gradients))
        if processes > 1 and parts == 1:
            found.append(Line("gradients on their way", gradients))
        layer, layers = layer_activations(c), c.num_hidden_layers
        kept = layers * D + layer if config.recompute else layers * layer
        activations = FLOAT * use.models * (use.tokens * (kept + 2 * D) + use.responses * D)
        # Gradients come as activations go, but they do not fit into the holes: both count.
        learning = gradients + activations
    sampling = 0.0
    if use.sampled:
        cache = FLOAT * 2 * c.num_hidden_layers * use.sampled * use.length * c.num_key_value_heads * c.head_dim
        copies = FLOAT * parameters(c) * (cpu + (parts > 1))  # rearranged for the processor; gathered
        sampling = cache + copies + FLOAT * use.sampled * use.prompt * (2 * D + 3 * F)
    if sampling > learning + working:  # they take turns
        return [*found, Line("KV cache", cache), Line("sampling", sampling - cache)]
    if isinstance(config, Training):
        found += [Line("gradients", gradients), Line("activations", activations)]
    return [*found, Line("head, passing layers", working)]


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
    optimiser = adamw(nothing, 0.0, 0.0)
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
            "lower --microbatch, --max_prompt or --max_response, or take --recompute, --lora_rank or --shard"
        )
