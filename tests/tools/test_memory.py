"""The memory plan: what it counts against real models, and its totals against measured peaks."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from benchmarks.plans import MODELS, SIZES, WEIGHTS, measure, needed, write_inputs
from mpo.config import DPOConfig, PPOConfig, SFTConfig, SplitConfig
from mpo.kernels import functions as kernels
from mpo.kernels.functions import Packing
from mpo.model.llama import PRESETS, Adapters, Llama, ScalarModel, cast_weights
from mpo.model.lora import TARGETS, attach
from mpo.runtime import allocator, cgroups
from mpo.tools import memory
from mpo.tools.memory import Way, choose_way, lines
from mpo.tools.memory_loads import (
    Load,
    adafactor_state,
    adapted_inputs,
    adapter_parameters,
    layer_activations,
    load_of,
    parameters,
    plain_layer,
)
from mpo.training.optimisers import make_optimiser
from tests.conftest import small_config, small_model
from tests.support.scripts import run_script


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_counts_the_parameters_of_models_and_adapters(tied, family):
    c = small_config(tie_word_embeddings=tied, model_type=family)
    assert parameters(c) == sum(p.numel() for p in Llama(c).parameters())
    assert parameters(c, scalar=True) == sum(p.numel() for p in ScalarModel(c).parameters())
    model = Llama(c)
    for targets in (TARGETS, ("q_proj", "down_proj")):
        attach(model := Llama(c), Adapters(3, 1.0, targets, 1, ""))
        actual = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
        assert adapter_parameters(c, 3, ",".join(targets)) == actual


FAMILIES = [
    {},
    {"model_type": "qwen2"},
    {"model_type": "qwen3"},
    {"model_type": "gemma3_text", "hidden_act": "gelu_pytorch_tanh"},
]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_plan_counts_the_numbers_that_a_compiled_layer_keeps_for_a_token(family):
    """Counts the storages that autograd saves, each of them once, and leaves out those of the weights."""
    counts = {}
    for layers in (2, 3):
        model, n = small_model(num_hidden_layers=layers, **family), 50
        known = {p.data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def keep(t, kept=kept, known=known):
            if t.is_floating_point() and t.untyped_storage().data_ptr() not in known:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
            return t

        ids = torch.randint(0, 61, (n,))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            hidden = model(ids, Packing([30, 20]))
        counts[layers] = sum(kept.values()) / n
        assert hidden.requires_grad
    per_layer = counts[3] - counts[2]
    assert per_layer == pytest.approx(layer_activations(model.config), rel=0.1)  # the layer also keeps a few statistics


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 2)])
def test_the_plan_counts_the_bytes_that_a_layer_in_plain_torch_keeps(dtype, rank, family, monkeypatch):
    monkeypatch.setattr(kernels, "default", "reference")
    kept = {}
    for layers in (2, 3):
        model = small_model(num_hidden_layers=layers, **family)
        packing = Packing([30, 20, 20], [-1, 0, 0])
        cast_weights(model, dtype)
        if rank:
            attach(model, Adapters(rank, 1.0, TARGETS, 0, ""))
        known, sizes = {p.data_ptr() for p in model.parameters()}, {}

        def keep(t, sizes=sizes, known=known):
            if t.is_floating_point() and t.untyped_storage().data_ptr() not in known:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            hidden = model(torch.randint(0, 61, (70,)), packing)
        kept[layers] = sum(sizes.values())
        assert hidden.dtype == dtype
    use = Load(0, 0, 70, 40, segments=3, parent=30, longest=30)
    adapted = adapted_inputs(model.config, ",".join(TARGETS)) if rank else 0
    assert kept[3] - kept[2] == pytest.approx(plain_layer(model.config, use, dtype.itemsize, adapted), rel=0.1)


def test_the_plan_counts_the_numbers_that_adafactor_keeps():
    for tied in (True, False):
        model = Llama(small_config(tie_word_embeddings=tied))
        optimiser = make_optimiser(model, 0.1, 0.0, kind="adafactor")
        model.logits(torch.arange(9)[None]).sum().backward()
        optimiser.step()
        kept = sum(v.numel() for state in optimiser.state.values() for name, v in state.items() if name != "step")
        assert adafactor_state(model.config) == kept


FRUGAL = ("--precision", "bf16", "--optimiser", "adafactor")


@pytest.mark.parametrize(
    ("size", "stage", "more"),
    [
        ("mini", "ppo", ()),
        ("small", "dpo", ()),
        ("small", "sft", ()),
        ("mini", "sft", FRUGAL),
        ("small", "dpo", ("--recompute", "true")),
        ("small", "dpo", ("--lora_rank", "8")),
        ("mini", "ppo", ("--recompute", "true", "--lora_rank", "8")),
    ],
)
def test_the_plan_is_within_15_percent_of_the_measured_peak(tmp_path, size, stage, more):
    write_inputs(tmp_path, size)
    planned, peak = measure(tmp_path, stage, SIZES[size], *more)
    assert planned == pytest.approx(peak, rel=0.15)


def total(config, c, processes=1):
    return sum(line.bytes for line in lines(config, c, processes))


def test_flags_that_save_memory_lower_the_total_of_the_plan():
    c = small_config(num_hidden_layers=20, vocab_size=5000)
    flags = {"out": "", "data": "", "model": "", "microbatch": 32}
    whole = total(DPOConfig(**flags), c)
    assert total(DPOConfig(**flags, recompute=True), c) < whole
    assert total(DPOConfig(**flags | {"microbatch": 8}), c) < whole
    wide = small_config(num_hidden_layers=20, hidden_size=96, intermediate_size=256, head_dim=24)
    totals = {
        (precision, optimiser): total(DPOConfig(**flags, precision=precision, optimiser=optimiser), wide)
        for precision in ("fp32", "bf16")
        for optimiser in ("adamw", "adafactor")
    }
    for one in ("fp32", "bf16"):
        assert totals[one, "adafactor"] < totals[one, "adamw"]
    for one in ("adamw", "adafactor"):
        assert totals["bf16", one] < totals["fp32", one]
    assert total(DPOConfig(**flags, lora_rank=2), c) < whole
    assert total(DPOConfig(**flags), c, 2) < whole  # each process has a smaller share of the batch
    assert total(DPOConfig(**flags, shard=True), c, 4) < total(DPOConfig(**flags), c, 4)
    models = {"out": "", "prompts": "", "model": "", "ref": "", "rm": "", "microbatch": 16}
    assert total(PPOConfig(**models, shared_critic=True), c) < total(PPOConfig(**models), c)
    assert total(SFTConfig(out="", data="", tokenizer="", microbatch=32), c) < whole


def sampling_of(c, batch, parts=4, **more):
    """A PPO stage's flags and load, with the bytes of a row's cache on a GPU and of the policy, in bf16."""
    flags = {
        "out": "",
        "prompts": "",
        "model": "",
        "ref": "",
        "rm": "",
        "max_prompt": 20,
        "max_new": 12,
        "microbatch": 16,
        **more,
    }
    config = PPOConfig(**flags, batch=batch, shard=True, precision="bf16")
    store = Llama(c).bfloat16().kv_cache(1, 32, whole=False).store
    repeated = store[0].nbytes * c.num_attention_heads // c.num_key_value_heads  # of one layer, for all its queries
    return config, load_of(config, c, parts), store.nbytes + repeated, 2 * parameters(c)


def test_a_policy_that_does_not_fit_is_gathered_layer_by_layer_with_as_many_rows_as_fit():
    c = small_config(num_hidden_layers=20, vocab_size=50_000)
    config, use, row, policy = sampling_of(c, batch=64)
    begun = 2 * (2 * c.hidden_size + 3 * c.intermediate_size)  # for each token of the prompts
    all_rows = 16 * (row + 20 * begun)  # 16 rows in each of 4 processes, with prompts of 20 tokens

    def way(room, parts=4):
        return choose_way(config, c, use, parts, False, room)

    assert way(policy + all_rows) == Way(True, 16)
    assert way(policy + all_rows - 1) == Way(True, 8)  # two passes; gathering in turn would take as long as eight
    assert way(policy - 1) == Way(False, 16)
    assert way(all_rows - 1) == Way(False, 8)
    assert way(3 * (row + 20 * begun)) == Way(False, 3)  # six passes of at most three rows
    assert way(policy + 2 * (row + 20 * begun)) == Way(True, 2)  # eight passes take as long as one in turn
    assert way(policy + row + 20 * begun) == Way(False, 16)  # 16 passes over one row would take longer
    assert way(0) == Way(False, 1)
    # A single process has the whole policy anyway.
    assert choose_way(config, c, use, 1, False, row + 20 * begun) == Way(True, 1)
    assert choose_way(config, c, use, 1, False, math.inf) == Way(True, 16)


def test_every_size_up_to_70_b_fits_on_some_number_of_gpus():
    for name in ("SmolLM2-135M", "Llama-3-70B"):
        for kind in WEIGHTS.values():
            assert re.fullmatch(r"\d+ \(\d+\)\*?", needed(MODELS[name], "ppo", **kind))
    assert needed(MODELS["Llama-3-70B"], "ppo").endswith("*")
    assert not needed(MODELS["SmolLM2-135M"], "ppo").endswith("*")


def test_the_plan_samples_as_the_stage_will_whatever_the_program_itself_takes(monkeypatch):
    """A GPU's plan counts no bytes for the program, a CPU's plan those that were measured."""
    c = small_config()
    config, _, row, _ = sampling_of(c, batch=4096, parts=1, microbatch=1)
    held = sum(line.bytes for line in memory.always(config, c, 1, memory.PROGRAM))
    capacity = held + 2000 * row / memory.SHARE
    monkeypatch.setattr(memory, "capacity_of_device", lambda: capacity)
    rows = memory.way_to_sample(config, c).rows
    assert 1 < rows < 4096
    for base in (0.0, 1.5e9):
        planned = {line.what for line in lines(config, c, 1, base, True, capacity)}
        assert f"KV cache ({rows:,} rows at once)" in planned


def test_all_processes_sample_in_the_way_that_the_smallest_device_allows(monkeypatch):
    c = small_config()
    config = sampling_of(c, batch=8)[0]
    monkeypatch.setattr(memory, "capacity_of_device", lambda: 1e12)
    assert memory.way_to_sample(config, c) == Way(True, 8)
    monkeypatch.setattr(memory.distributed, "all_max", lambda values: [max(values[0], -1e6)])  # another one has 1 MB
    assert memory.way_to_sample(config, c) == Way(True, 1)


def test_the_plan_says_how_to_avoid_that_glibc_loses_memory(hh_run, tmp_path, monkeypatch):
    flags = ("--data", hh_run / "split" / "pairs.jsonl", "--model", hh_run / "sft", "--out", tmp_path / "out")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    loses = "GLIBC_TUNABLES=glibc.malloc.tcache_count=0" in run_script("train_dpo.py", *flags, "--plan", "true").stdout
    assert loses == allocator.loses_memory()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    assert "GLIBC_TUNABLES" not in run_script("train_dpo.py", *flags, "--plan", "true").stdout


def test_gradients_and_all_activations_are_there_at_once_only_if_a_step_has_several_microbatches():
    c = small_config(num_hidden_layers=20)
    flags = {"out": "", "data": "", "model": ""}
    for config, activations in (
        (DPOConfig(**flags, microbatch=8, batch=8), True),
        (DPOConfig(**flags, microbatch=1, batch=1, max_prompt=2, max_response=2), False),
    ):
        held = {line.what: line.bytes for line in lines(config, c)}
        assert ("activations" in held, "gradients" in held) == (activations, not activations)
    held = {line.what: line.bytes for line in lines(DPOConfig(**flags, microbatch=8, batch=16), c)}
    assert held["gradients"] == 4 * parameters(c)
    assert "activations" in held


def test_half_of_the_gradients_or_of_the_activations_is_lost_to_holes_unless_freed_memory_goes_back():
    c = small_config(num_hidden_layers=20)

    def holes(cpu=True, **more):
        config = SFTConfig(out="", data="", tokenizer="", microbatch=8, batch=8, **more)
        return [line.bytes for line in lines(config, c, cpu=cpu) if line.what.startswith("holes")]

    assert holes() == [2 * parameters(c)]  # gradients are the smaller ones; half of 4 bytes each
    assert holes(lora_rank=2) == [2 * adapter_parameters(c, 2, ",".join(TARGETS))]
    assert holes(recompute=True) == holes(cpu=False) == []


def test_the_flag_plan_prints_the_plan_and_writes_nothing(hh_run, tmp_path):
    flags = ("--data", hh_run / "split" / "pairs.jsonl", "--model", hh_run / "sft", "--out", tmp_path / "out")
    done = run_script("train_dpo.py", *flags, "--plan", "true")
    assert "activations" in done.stdout
    assert "warning" not in done.stdout
    assert not (tmp_path / "out").exists()
    done = run_script("train_dpo.py", *flags, "--plan", "true", *("--max_prompt", 10**8, "--batch", 32))
    assert "warning: 1 such processes need" in done.stdout
    done = run_script(
        "train_sft.py", "--data", hh_run / "data", "--tokenizer", tmp_path, "--out", "x", "--plan", "true", expect=2
    )
    assert "tokenizer.model: no such file" in done.stderr


def test_a_microbatch_of_0_is_the_most_rows_that_divide_a_step_and_fit():
    c = replace(PRESETS["small"], vocab_size=32000)
    config = DPOConfig(out="", data="", model="", batch=24, max_prompt=448, max_response=224)
    sizes = [memory.microbatch_within(config, c, 1, cpu=True, capacity=gigabytes * 1e9) for gigabytes in (2, 6, 12, 96)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1, 24)
    assert 1 < sizes[1] < 24
    for size, gigabytes in zip(sizes[1:], (6, 12, 96), strict=True):
        larger = min([n for n in (1, 2, 3, 4, 6, 8, 12, 24) if n > size], default=24)
        plans = [sum(line.bytes for line in lines(replace(config, microbatch=n), c)) + 1e9 for n in (size, larger)]
        assert plans[0] <= gigabytes * 1e9 / 2  # half of the memory
        assert size == 24 or plans[1] > gigabytes * 1e9 / 2


def test_a_microbatch_of_0_is_divided_among_processes():
    c = small_config()
    flags = {"out": "", "rm": "", "data": "", "model": ""}
    sgd = DPOConfig(**{k: v for k, v in flags.items() if k != "rm"}, batch=32)
    ppo = PPOConfig(**{k: v for k, v in flags.items() if k != "data"}, prompts="", ref="", minibatch=64)
    split = SplitConfig(**{k: v for k, v in flags.items() if k != "model"})
    for processes, expected in ((1, (32, 16, 64)), (2, (16, 16, 64)), (4, (8, 16, 64))):
        chosen = [memory.microbatch_within(x, c, processes, cpu=True, capacity=1e12) for x in (sgd, ppo, split)]
        assert tuple(chosen) == expected


def test_a_microbatch_that_was_given_is_kept():
    config = SFTConfig(out="", data="", tokenizer="", batch=8, microbatch=2)
    assert memory.with_microbatch(config, small_config()) is config
    assert memory.with_microbatch(replace(config, microbatch=0), small_config()).microbatch == 8


def test_the_limit_of_a_container_counts_as_the_memory_of_the_machine(monkeypatch):
    whole = memory.memory_of_machine()
    monkeypatch.setattr(cgroups, "memory_limit", lambda: whole / 4)
    assert memory.memory_of_machine() == memory.capacity_of_device() == whole / 4
    assert memory.available() <= whole / 4
