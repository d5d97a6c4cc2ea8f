"""The memory plan: what a stage will hold in memory, computed from shapes before anything is allocated (--plan true).

All numbers are for the worst case, a microbatch whose rows are as long as the limits allow. What a stage asks for is
counted in memory_loads.py.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from mpo.config import DPOConfig, EvalConfig, PPOConfig, RMConfig, ScoreConfig, SplitConfig, Training
from mpo.data.vocabulary import load_vocabulary
from mpo.kernels.autograd import HEAD_COLUMNS
from mpo.model.generate import PREFILL
from mpo.model.hf_config import config_from_json
from mpo.model.llama import PRESETS, LlamaConfig
from mpo.runtime import allocator, cgroups, device, distributed
from mpo.runtime.errors import InputError
from mpo.runtime.stage import peak_memory_mb
from mpo.tools.memory_loads import (
    FLOAT,
    Load,
    adafactor_state,
    adapted_inputs,
    block_parameters,
    layer_activations,
    load_of,
    matrices,
    parameters,
    plain_layer,
)
from mpo.training.optimisers import STACK, make_optimiser, optimiser_step

Flags = TypeVar("Flags", bound=Training | SplitConfig | ScoreConfig | EvalConfig)

SHARE = 0.9  # of the memory that the plan leaves for sampling: so much is used, since no plan is exact
PROGRAM = 1e9  # bytes that the program is taken to need when a way to sample is chosen; the same in every run
HOLES = 0.5  # of the memory of freed activations that gradients could use, as large as either: measured, 0.2 to 1.0
IN_TURN = 8  # how often all layers are read from memory in the time that it takes to gather them from other processes


class Line(NamedTuple):
    """One line of the plan: something that is held, and its size."""

    what: str
    bytes: float


class Way(NamedTuple):
    """How a stage samples (`Sampling`)."""

    whole: bool  # a sharded policy is gathered all at once, not one layer after the other
    rows: int  # at a time, in each process


# --- sampling -------------------------------------------------------------------------------------


def sampling_bytes(config: Any, c: LlamaConfig, use: Load, parts: int, cpu: bool, way: Way) -> tuple[float, float]:
    """What sampling holds in this way, besides what the stage holds all the time: the KV cache, and the rest.

    `parts`: processes among which the weights are divided.
    """
    held, D, F = bytes_of_weight(config), c.hidden_size, c.intermediate_size
    compiled = cpu and held == FLOAT and way.whole
    of_token = (FLOAT if config.precision == "fp32" else 2) * 2 * c.num_key_value_heads * c.head_dim  # in one layer
    cache = c.num_hidden_layers * way.rows * use.length * of_token
    if not compiled:  # keys and values of one layer, once for each head of queries
        cache += way.rows * use.length * of_token * c.num_attention_heads // c.num_key_value_heads
    adapted = way.whole and bool(getattr(config, "lora_rank", 0))
    merged = held * c.num_hidden_layers * block_parameters(c) if adapted else 0  # base and adapters as one matrix
    copies = held * parameters(c) * (compiled + (way.whole and parts > 1))  # packed for the kernels; gathered
    begun = min(way.rows * use.prompt, max(PREFILL, use.prompt))
    return cache, merged + copies + held * begun * (2 * D + 3 * F)


def choose_way(config: Any, c: LlamaConfig, use: Load, parts: int, cpu: bool, room: float) -> Way:
    """The fastest way to sample in `room` bytes. Every pass over the rows reads, or gathers, all layers for each token.

    Where nothing fits, the way that takes least.
    """
    ways = []
    for whole in (True, False) if parts > 1 else (True,):

        def needed(rows: int, whole: bool = whole) -> float:
            return sum(sampling_bytes(config, c, use, parts, cpu, Way(whole, rows)))

        if most := bisect.bisect_right(range(1, use.sampled + 1), room, key=needed):
            passes = -(-use.sampled // most)
            ways.append((passes * (1 if whole else IN_TURN), Way(whole, -(-use.sampled // passes))))
    return min(ways, key=lambda priced: priced[0])[1] if ways else Way(parts == 1, 1)


def way_within(config: Any, c: LlamaConfig, processes: int, base: float, cpu: bool, capacity: float) -> Way:
    """The way to sample on devices with this capacity in bytes; see `lines`."""
    use, held = load_of(config, c, processes), total(always(config, c, processes, base))
    return choose_way(config, c, use, parts_of(config, processes), cpu, SHARE * (capacity - held))


def way_to_sample(config: PPOConfig | EvalConfig, c: LlamaConfig) -> Way:
    """How this stage samples a policy of this shape. It depends on flags, processes and devices, not on what is free.

    So a stage that is run again samples in the same way. All processes get the same answer.
    """
    cpu, capacity = device.current().type == "cpu", -distributed.all_max([-capacity_of_device()])[0]
    return way_within(config, c, distributed.world_size(), PROGRAM, cpu, capacity)


# --- microbatches ---------------------------------------------------------------------------------

AT_MOST = {PPOConfig: 16, SplitConfig: 64}  # rows of a microbatch that is chosen here; 32 in the other stages
OF_CPU = 0.5  # of a machine's memory is planned for; other programs need some, too


def step_rows(config: Any) -> int:
    """Rows of an optimiser step, of which a microbatch is a part; of the split, the pairs scored at once at most."""
    if isinstance(config, PPOConfig):
        return config.minibatch
    return config.batch if isinstance(config, Training) else AT_MOST[SplitConfig]


def microbatch_within(config: Any, c: LlamaConfig, processes: int, cpu: bool, capacity: float) -> int:
    """The most rows that divide a process's rows of a step and whose plan fits in `capacity` bytes; at least 1.

    The split's microbatch is that of all processes together.
    """
    rows, most, together = step_rows(config) // processes, AT_MOST.get(type(config), 32), 1
    if isinstance(config, SplitConfig):
        together = processes
    room = (OF_CPU if cpu else SHARE) * capacity
    for size in (n for n in range(min(rows, most), 1, -1) if rows % n == 0):
        if total(lines(replace(config, microbatch=size * together), c, processes, PROGRAM, cpu, capacity)) <= room:
            return size * together
    return together


def with_microbatch(config: Flags, c: LlamaConfig) -> Flags:
    """The flags, with a microbatch in place of 0.

    Like `way_to_sample`, it depends on flags, processes and devices, not on what is free, so that a stage that is run
    again computes the same. All processes get the same answer.
    """
    if getattr(config, "microbatch", 1):  # not all stages have microbatches
        return config
    cpu, capacity = device.current().type == "cpu", -distributed.all_max([-capacity_of_device()])[0]
    chosen: dict[str, Any] = {"microbatch": microbatch_within(config, c, distributed.world_size(), cpu, capacity)}
    return replace(config, **chosen)


# --- the plan -------------------------------------------------------------------------------------


def bytes_of_weight(config: Any) -> int:
    """Bytes of a weight that is no adapter."""
    return 2 if config.precision == "bf16" else FLOAT


def parts_of(config: Any, processes: int) -> int:
    """The number of processes among which every weight is divided."""
    return processes if config.shard else 1


def always(config: Any, c: LlamaConfig, processes: int, base: float) -> list[Line]:
    """What one process holds all the time. `base`: bytes of the program itself."""
    use, parts, held = load_of(config, c, processes), parts_of(config, processes), bytes_of_weight(config)
    trained = FLOAT if getattr(config, "lora_rank", 0) else held  # bytes; adapters are in fp32
    plan = [Line("the program and torch", base)]
    plan.append(Line("weights", (trained * use.trained + held * use.frozen) / parts))
    if parts > 1:  # two layers, one of which is being gathered, and what is outside the layers
        left = (use.heads or matrices(c)) * c.vocab_size * c.hidden_size
        plan.append(Line("gathered weights", held * (2 * block_parameters(c) + left)))
    if isinstance(config, Training):
        plan.append(Line("optimiser", optimiser_bytes(config, c, use) / parts))
        if processes > 1 and parts == 1:
            plan.append(Line("gradients being averaged", trained * use.trained))
    return plan


def learning(config: Training, c: LlamaConfig, processes: int, use: Load, cpu: bool) -> list[Line]:
    """What one process holds besides that when it computes gradients.

    Layer by layer, gradients appear as activations are freed. So one of the two ends of the backward pass is its worst
    moment: when no layer has a gradient yet, or when only one layer's activations are left. But in any microbatch after
    the first one of a step, the gradients of those before are there all the time.
    """
    held, layers, D = bytes_of_weight(config), c.num_hidden_layers, c.hidden_size
    weight = FLOAT if config.lora_rank else held  # bytes; adapters are in fp32
    gradients = Line("gradients", weight * use.trained / parts_of(config, processes))
    layer: float = FLOAT * use.tokens * layer_activations(c)
    if held < FLOAT or not cpu:
        adapted = config.lora_rank and held < FLOAT
        layer = plain_layer(c, use, held, adapted_inputs(c, config.lora_targets) if adapted else 0)
    kept = layers * held * use.tokens * D + layer if config.recompute else layers * layer
    outside = held * (2 * use.tokens * D + use.responses * D)  # of the layers
    everything = Line("activations", use.models * (kept + outside))
    step = config.minibatch if isinstance(config, PPOConfig) else config.batch
    if step > config.microbatch * processes:
        return [gradients, everything]
    one = Line("activations of one layer", use.models * (layer + outside))
    worst = max([everything], [gradients, one], key=total)
    if cpu and not config.recompute:  # with it, freed memory goes back to the system (runtime/allocator.py)
        worst.append(Line("holes that no gradient fits into", HOLES * min(gradients.bytes, everything.bytes)))
    return worst


def total(plan: Sequence[Line]) -> float:
    """Bytes of all lines."""
    return sum(line.bytes for line in plan)


def lines(
    config: Training | SplitConfig | ScoreConfig | EvalConfig,
    c: LlamaConfig,
    processes: int = 1,
    base: float = 0.0,
    cpu: bool = True,
    capacity: float = math.inf,
) -> list[Line]:
    """All that one process holds at its worst moment.

    Args:
        config: the flags of the stage.
        c: the shape of its model.
        processes: how many there are.
        base: bytes of the program itself.
        cpu: whether it is computed on a CPU.
        capacity: bytes of memory of this process's device, which decide how the stage samples.
    """
    use, parts, V = load_of(config, c, processes), parts_of(config, processes), c.vocab_size
    plan = always(config, c, processes, base)
    passing = (
        bytes_of_weight(config) * use.tokens * (2 * c.hidden_size + 3 * c.intermediate_size)
    )  # besides what is kept
    head = 2 * FLOAT * min(HEAD_COLUMNS, V * use.responses) + FLOAT * V * c.hidden_size
    working = passing + (head if use.trained and use.responses else 0.0)
    taught = learning(config, c, processes, use, cpu) if isinstance(config, Training) else []
    taught.append(Line("head, and what a layer needs for a moment", working))
    if not use.sampled:
        return plan + taught
    way = way_within(config, c, processes, PROGRAM, cpu, capacity)  # as way_to_sample chooses it
    cache, rest = sampling_bytes(config, c, use, parts, cpu, way)
    at_once = f"KV cache ({way.rows:,} rows at once)"
    sampling = [
        Line(at_once, cache),
        Line("sampling" if way.whole else "sampling, one layer gathered after the other", rest),
    ]
    return plan + max(sampling, taught, key=total)  # they take turns


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


def memory_of_machine() -> float:
    """Bytes of memory that the CPU's processes have together: the machine's, or less if their container has a limit."""
    return min(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), cgroups.memory_limit())


def available() -> float:
    """Bytes of memory that are free on this process's device."""
    if device.current().type == "cuda":
        return float(torch.cuda.mem_get_info(device.current())[0])
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        return min(float(meminfo["MemAvailable"].split()[0]) * 1024, memory_of_machine())
    except (OSError, KeyError, ValueError):
        return memory_of_machine()


def capacity_of_device() -> float:
    """Bytes of memory that this process's device has, or its share of them where several processes use the CPU."""
    if device.current().type == "cuda":
        return float(torch.cuda.get_device_properties(device.current()).total_memory)
    return memory_of_machine() / distributed.local_world_size()


def longest_rows(config: Training | SplitConfig | ScoreConfig | EvalConfig) -> str:
    """The rows of the worst case, in words: the longest prompt plus the longest response or, of a pair, two of them."""
    of_pair = "2 x " if isinstance(config, (RMConfig, DPOConfig, SplitConfig, ScoreConfig)) else ""
    return f"rows of {config.max_prompt} + {of_pair}{getattr(config, 'max_new', config.max_response)} tokens"


def show(config: Training | SplitConfig | ScoreConfig | EvalConfig) -> None:
    """Print the plan of a stage, and a warning if the machine has less memory than that."""
    device.start(config.device)
    distributed.start(config.shard)
    on_cpu = device.current().type == "cpu"
    processes, here = distributed.world_size(), distributed.local_world_size() if on_cpu else 1  # each has its own GPU
    c = model_of(config)
    config = with_microbatch(config, c)
    base, capacity = program() if on_cpu else 0.0, capacity_of_device()
    plan = lines(config, c, processes, base, on_cpu, capacity)
    each = "one process" if processes == 1 else f"{processes} processes, each"
    size = f"a model of {parameters(c) / 1e6:,.1f} M parameters, {each}"
    rows = f"{config.microbatch} at once, " if hasattr(config, "microbatch") else ""
    print(f"plan of {Path(config.out).name}, at worst ({rows}{longest_rows(config)}): {size}:")
    needed = total(plan)
    width = max(len(line.what) for line in plan)
    for line in [*plan, Line("total", needed)]:
        print(f"  {line.what:{width}} {line.bytes / 2**20:10,.0f} MB")
    if needed * here > (free := available()):
        print(
            f"warning: {here} such processes need {needed * here / 2**30:,.1f} GB, {free / 2**30:,.1f} are free; "
            "lower --microbatch, --max_prompt or --max_response; or use --recompute, --lora_rank, --precision, --shard"
        )
    if device.current().type == "cpu" and allocator.loses_memory():
        print(
            "note: started like this, a stage takes up to a quarter more, since this version of glibc loses memory "
            f"between tensors; with {allocator.VARIABLE}={allocator.WITHOUT_CACHE}, which make sets, it does not"
        )
