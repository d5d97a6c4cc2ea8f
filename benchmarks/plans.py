"""python -m benchmarks.plans [plans] [measured]: writes the two tables of docs/memory.md.

One has the memory plans of real models. The other compares plans with measured peaks: it runs every stage that trains,
for two steps or more, on random models and on rows as long as the limits allow.
"""

from __future__ import annotations

import json
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpo.config import DPOConfig, PPOConfig, RMConfig, SFTConfig, Training
from mpo.data.rows import Row, write_rows
from mpo.data.tokenizer import Tokenizer, train_tokenizer
from mpo.model.checkpoint import save_model
from mpo.model.llama import PRESETS, Llama, LlamaConfig, initialise, scalar_from
from mpo.runtime.allocator import environment
from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_between
from mpo.runtime.seeding import generator
from mpo.tools.memory import PROGRAM, lines, way_within
from mpo.tools.memory_loads import parameters
from mpo.world.build import build

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "memory.md"
PROMPT, RESPONSE = 100, 60  # tokens of every row
SIZES = {"mini": 8, "small": 8, "base": 4}  # preset -> microbatch
GB80 = 80e9


def text_of(tokenizer: Tokenizer, tokens: int, draw: random.Random) -> str:
    """A random text of exactly this many tokens."""
    text = ""
    while (have := len(tokenizer.vocabulary.encode(text))) != tokens:
        text = text + " " + draw.choice("abcdefgh") if have < tokens else ""
    return text


def write_inputs(folder: Path, size: str) -> None:
    """Write a random model and reward model of a preset, and rows as long as the limits allow."""
    rows = build("hh", seed=3, train=200, test=4)["train"]
    tokenizer = train_tokenizer((t for r in rows for t in (r.prompt, r.chosen)), 500, seed=1)
    draw = random.Random(1)
    for split, count in (("train", 24), ("test", 4)):
        texts = ([text_of(tokenizer, n - 1, draw) for n in (PROMPT, RESPONSE, RESPONSE)] for _ in range(count))
        full = [Row(f"{split}-{i}", p, chosen=c, rejected=r) for i, (p, c, r) in enumerate(texts)]
        write_rows(folder / "data" / f"{split}.jsonl", full)
    tokenizer.save(folder / "tokenizer")
    model = Llama(replace(PRESETS[size], vocab_size=tokenizer.size, eos_token_id=tokenizer.eos))
    initialise(model, generator(1, "init"))
    for name, made in (("model", model), ("rm", scalar_from(model, generator(1, "head")))):
        save_model(folder / name, made)
        tokenizer.save(folder / name)


def command(folder: Path, stage: str, microbatch: int) -> list[str]:
    """The command that runs a stage on these inputs."""
    data, model = ["--data", f"{folder}/data"], ["--model", f"{folder}/model"]
    flags = {
        "sft": ["train_sft.py", *data, "--tokenizer", f"{folder}/tokenizer", *model, "--epochs", "1"],
        "rm": ["train_rm.py", *data, *model, "--epochs", "1"],
        "dpo": ["train_dpo.py", "--data", f"{folder}/data/train.jsonl", *model, "--steps", "2"],
        "ppo": [
            *("train_ppo.py", "--prompts", f"{folder}/data/train.jsonl", *model, "--ref", f"{folder}/model"),
            *("--rm", f"{folder}/rm", "--iterations", "1", "--critic_warmup", "0"),
            *("--max_new", str(RESPONSE), "--epochs", "1"),
        ],
    }[stage]
    sizes = ["--batch", "16", "--minibatch", str(microbatch)] if stage == "ppo" else ["--batch", str(microbatch)]
    limits = ["--max_prompt", str(PROMPT), "--max_response", str(RESPONSE), "--threads", "1"]
    out = ["--out", f"{folder}/{stage}", "--overwrite", "true", "--microbatch", str(microbatch)]
    return [sys.executable, *flags, *sizes, *limits, *out]


def measure(folder: Path, stage: str, microbatch: int, *more: str) -> tuple[float, float]:
    """The memory that a stage plans, and its measured peak, in MB."""
    asked = [*command(folder, stage, microbatch), *more]
    how: dict[str, Any] = {
        "cwd": ROOT,
        "env": environment(),
        "capture_output": True,
        "encoding": "utf-8",
        "check": True,
    }
    said = subprocess.run([*asked, "--plan", "true"], **how).stdout
    planned = float(re.findall(r"total +([\d,]+) MB", said)[0].replace(",", ""))
    shutil.rmtree(folder / stage, ignore_errors=True)  # a finished stage would not be run again
    subprocess.run(asked, **how)
    manifest: dict[str, Any] = json.loads((folder / stage / "manifest.json").read_text(encoding="utf-8"))
    return planned, manifest["peak_memory_mb"]


def machine() -> str:
    """What measured: the processor, the C library and the build of torch."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else "")
    instructions = torch.backends.cpu.get_cpu_capability()
    library = " ".join(platform.libc_ver()) or "another C library"
    return (
        f"Machine: {names[0] if names else platform.machine()} ({instructions}), {library}, torch {torch.__version__}."
    )


def measured_table() -> Iterator[str]:
    """The rows for every stage at every size; at one size also with each flag that saves memory."""
    yield f"{machine()}\n"
    yield "| model | stage | planned, MB | measured, MB | planned / measured |\n|---|---|---|---|---|"
    for size, microbatch in SIZES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_inputs(folder, size)
            cases: list[tuple[str, tuple[str, ...]]] = [(stage, ()) for stage in STAGES]
            if size == "small":
                frugal = ("--precision", "bf16"), ("--optimiser", "adafactor")
                single = ("--recompute", "true"), ("--lora_rank", "8")
                savers = *single, single[0] + single[1], *frugal, frugal[0] + frugal[1], frugal[0] + single[1]
                cases += [(s, m) for s in ("dpo", "ppo") for m in savers]
            millions = parameters(replace(PRESETS[size], vocab_size=500)) / 1e6
            for stage, more in cases:
                planned, peak = measure(folder, stage, microbatch, *more)
                what = f"{size} ({millions:.0f} M)", " ".join((stage, *more))
                yield f"| {what[0]} | {what[1]} | {planned:,.0f} | {peak:,.0f} | {planned / peak:.2f} |"
                print(f"{what[0]} {what[1]}: planned {planned:,.0f} MB, measured {peak:,.0f} MB", file=sys.stderr)


def real(d: int, ffn: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool) -> LlamaConfig:
    """The shape of a published model. `d`: width, `kv`: heads of keys, `tied`: the embedding is also the head."""
    shape: dict[str, Any] = {
        "hidden_size": d,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    more: dict[str, Any] = {"num_key_value_heads": kv, "head_dim": d // heads, "vocab_size": vocabulary}
    return replace(LlamaConfig(), **shape, **more, tie_word_embeddings=tied)


MODELS = {
    "SmolLM2-135M": real(576, 1536, 30, 9, 3, 49152, True),
    "SmolLM2-360M": real(960, 2560, 32, 15, 5, 49152, True),
    "Qwen2.5-0.5B": real(896, 4864, 24, 14, 2, 151936, True),
    "TinyLlama-1.1B": real(2048, 5632, 22, 32, 4, 32000, False),
    "SmolLM2-1.7B": real(2048, 8192, 24, 32, 32, 49152, True),
    "Qwen2.5-7B": real(3584, 18944, 28, 28, 4, 152064, False),
    "Llama-2-7B": real(4096, 11008, 32, 32, 32, 32000, False),
    "Llama-3-8B": real(4096, 14336, 32, 32, 8, 128256, False),
    "Llama-2-13B": real(5120, 13824, 40, 40, 40, 32000, False),
    "Llama-3-70B": real(8192, 28672, 80, 64, 8, 128256, False),
}
LIMITS: dict[str, Any] = {"out": "", "max_prompt": 512, "max_response": 256, "recompute": True, "shard": True}
LIMITS |= {"batch": 1024, "microbatch": 4}
STAGES: dict[str, tuple[type[Training], dict[str, Any]]] = {
    "sft": (SFTConfig, {"data": "", "tokenizer": ""}),
    "rm": (RMConfig, {"data": "", "model": ""}),
    "dpo": (DPOConfig, {"data": "", "model": ""}),
    "ppo": (PPOConfig, {"prompts": "", "model": "", "ref": "", "rm": "", "minibatch": 1024, "max_new": 256}),
}


WEIGHTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16, LoRA": {"precision": "bf16", "lora_rank": 16},
}


def needed(c: LlamaConfig, stage: str, **more: Any) -> str:
    """The smallest number of 80 GB GPUs (a power of two) that a stage fits on, and the GB that each of them uses.

    With a star where the policy is sampled with one layer gathered after the other.
    """
    kind, flags = STAGES[stage]
    config = kind(**LIMITS, **flags, **more)
    for processes in (2**i for i in range(11)):
        place = PROGRAM, False, GB80  # not on a CPU
        total = sum(line.bytes for line in lines(config, c, processes, *place))
        if total <= GB80:
            in_turn = isinstance(config, PPOConfig) and not way_within(config, c, processes, *place).whole
            return f"{processes} ({total / 1e9:,.0f})" + "*" * in_turn
    return "-"


def plan_table() -> Iterator[str]:
    """The rows for every model: all weights trained in fp32, all in bf16, and adapters on weights in bf16."""
    yield f"| model | parameters | weights | {' | '.join(STAGES)} |"
    yield "|---" * (3 + len(STAGES)) + "|"
    for name, c in MODELS.items():
        for kind, more in WEIGHTS.items():
            cells = [needed(c, stage, **more) for stage in STAGES]
            yield f"| {name} | {parameters(c) / 1e9:,.2f} B | {kind} | {' | '.join(cells)} |"


def main(argv: list[str]) -> None:
    """Compute the tables that are named on the command line, by default both, and write them to the page."""
    tables = {"plans": plan_table, "measured": measured_table}
    if unknown := set(argv) - tables.keys():
        raise InputError(f"{min(unknown)}: expected {' or '.join(tables)}")
    for mark, table in tables.items():
        if mark in (argv or tables):
            write_between(PAGE, f"<!-- {mark} -->\n", f"<!-- end of {mark} -->", "\n".join(table()) + "\n")


if __name__ == "__main__":
    run_plain(main)
