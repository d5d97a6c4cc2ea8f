"""One part of `make gpu-check`, in a process of its own: python -m benchmarks.gpu_worker TASK [REPEATS]

It prints a line "RESULT {...}" for each case as soon as it is measured, so that nothing is lost when the process is
stopped. A case that fails is such a line, too, with "error", and the others go on. The workload, with the device, is in
MPO_BENCH (workload.py).
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import heads, ours, plans
from benchmarks import workload as w
from benchmarks.run import hold, python_of
from experiments.grid import ROOT
from mpo.kernels.build import triton_lacks
from mpo.runtime import device
from mpo.runtime.cores import cores
from mpo.runtime.flags import parse
from mpo.runtime.setup import use_bf16
from mpo.tools import memory

Row = dict[str, Any]
Cases = Iterator[tuple[str, Callable[[], Row]]]
PRECISIONS = ("", "-bf16")  # what is added to the name of a case
LONGEST = 10.0  # seconds for the repeats of one case
TINY = w.SIZES["width"] < 256  # a rehearsal


def emit(rows: Mapping[str, Row]) -> None:
    """Hand results to benchmarks/gpu.py."""
    print("RESULT " + json.dumps(rows), flush=True)


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:300]


def start(bf16: bool = False, deterministic: bool = False) -> None:
    """Set device and precision, as setup_torch does for a stage."""
    device.start(w.DEVICE, deterministic=deterministic, rounded=bf16)
    use_bf16(bf16)


def timed(step: Callable[[], object], repeats: int) -> Row:
    """Take a step again and again.

    Returns {"first", "seconds", "all", "mib"}: how long the first step took, which prepares things; the median of the
    others, and each of them; and by how many MiB the peak of a GPU's memory exceeds what was held before.
    """
    on_gpu = w.DEVICE == "cuda"
    held = torch.cuda.memory_allocated() if on_gpu else 0
    times = list[float]()
    while len(times) <= repeats and sum(times[1:]) < LONGEST:
        if on_gpu and len(times) == 1:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step()
        device.synchronise()
        times.append(time.perf_counter() - began)
    mib = (torch.cuda.max_memory_allocated() - held) / 2**20 if on_gpu else None
    return {"first": times[0], "seconds": statistics.median(times[1:]), "all": times[1:], "mib": mib}


# --- the tasks: each yields names of cases, and a function that measures the case ------------------


def probe() -> None:
    """Print what this machine is; the device is None where torch reaches no GPU."""
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    about: Row = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton, "device": None}
    about["lacks"] = triton_lacks()
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        about |= {"device": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "mib": gpu.total_memory // 2**20}
    emit({"about": about})


def steps(names: tuple[str, ...], repeats: int, deterministic: bool = False) -> Cases:
    """Steps of the benchmark (ours.py)."""
    for name in names:
        for precision in PRECISIONS:

            def measure(name: str = name, precision: str = precision) -> Row:
                start(bool(precision), deterministic)
                return timed(ours.CASES[name](), repeats)

            yield name + precision, measure


def digest() -> str:
    """A hash of the weights after three steps of DPO."""
    policy = ours.model(0)
    step = ours.dpo(cached=True, policy=policy)
    for _ in range(3):
        step()
    everything = b"".join(p.detach().cpu().numpy().tobytes() for p in policy.parameters())
    return hashlib.sha256(everything).hexdigest()


def same_bytes(deterministic: bool) -> Cases:
    """Whether three steps of DPO end with the same bytes each time."""

    def measure() -> Row:
        start(deterministic=deterministic)
        return {"same": len({digest() for _ in range(3)}) == 1}

    yield "same bytes", measure


def head(repeats: int) -> Cases:
    """Ways from hidden states to log-probs (heads.py), forward alone and with gradients."""
    N, V, D = (64, 512, 32) if TINY else (4096, 32000, 1024)
    for way in ("ours", "plain", "product", "ours-backward", "plain-backward", "ours-pair", "plain-pair"):
        for precision, dtype in zip(PRECISIONS, (torch.float32, torch.bfloat16), strict=True):

            def measure(way: str = way, dtype: torch.dtype = dtype) -> Row:
                start()
                return timed(heads.step(way, N, V, D, w.DEVICE, dtype), repeats)

            yield f"{way}{precision}", measure


def plan() -> Cases:
    """The memory plan of stages against the measured peak, each on a random model and on rows of full length."""
    size, microbatch = ("tiny", 4) if TINY else ("small", 16)
    frugal = ("--precision", "bf16", "--optimiser", "adafactor")
    savers = ((), ("--recompute", "true"), ("--lora_rank", "8"), frugal)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plans.write_inputs(folder, size)
        for more in savers[:1] if TINY else savers:
            for stage in plans.STAGES if not more else ("dpo", "ppo"):

                def measure(stage: str = stage, more: tuple[str, ...] = more) -> Row:
                    script, *flags = plans.command(folder, stage, microbatch)[1:]
                    out = str(folder / "made" / stage)  # of two flags of a name the later one counts
                    config: Any = parse(plans.STAGES[stage][0], [*flags, "--device", w.DEVICE, "--out", out, *more])
                    on_cpu = w.DEVICE == "cpu"
                    place: dict[str, Any] = {"cpu": on_cpu, "capacity": memory.capacity_of_device()}
                    place["base"] = memory.program() if on_cpu else 0.0
                    lines = memory.lines(config, memory.model_of(config), **place)
                    importlib.import_module(script.removesuffix(".py")).main(config)
                    manifest = json.loads(Path(out, "manifest.json").read_text(encoding="utf-8"))
                    measured = manifest["peak_memory_mb" if on_cpu else "peak_device_memory_mb"]
                    return {"planned": sum(line.bytes for line in lines) / 2**20, "measured": measured}

                yield " ".join((stage, *more)), measure


def peer_python(environment: str, module: str) -> str:
    """The interpreter of a peer: of its environment in .peers/, or this one if it has the module; "" for none."""
    if (ROOT / ".peers" / environment / ".done").exists():
        return python_of(environment)
    return sys.executable if environment == "now" and importlib.util.find_spec(module) else ""


PEERS = {
    "sft": ("now", "trl"),
    "dpo": ("now", "trl"),
    "reward": ("now", "trl"),
    "generate": ("now", "transformers"),
    "ppo": ("ppo", "trl"),
}
"""A case of peers.py -> its environment in .peers/, and the module that it needs."""


def peers(repeats: int) -> Cases:
    """The same workload by trl and transformers (peers.py)."""
    for name, (environment, module) in PEERS.items():
        for precision in PRECISIONS:

            def measure(case: str = name + precision, at: str = environment, module: str = module) -> Row:
                if not (python := peer_python(at, module)):
                    return {"skipped": f"{module} is not installed (.peers/{at})"}
                sizes = {"MPO_BENCH": os.environ.get("MPO_BENCH", "{}")}
                return hold({"peer": [python, "benchmarks/peers.py", case]}, repeats, cores(), sizes)["peer"]

            yield name + precision, measure


TASKS: dict[str, Callable[[int], Cases]] = {
    "speed": lambda repeats: steps(("sft", "dpo-best", "dpo", "reward", "generate", "ppo"), repeats),
    "ordinary bytes": lambda repeats: same_bytes(False),
    "deterministic": lambda repeats: steps(("dpo-best", "reward", "generate", "ppo"), repeats, True),
    "deterministic bytes": lambda repeats: same_bytes(True),
    "compile": lambda repeats: steps(("ppo",) if TINY else ("dpo-best", "reward", "ppo"), repeats),
    "head": head,
    "plan": lambda repeats: plan(),
    "peers": peers,
}


def run(cases: Cases) -> list[str]:
    """Measure every case, and hand over its result; returns what failed, in words."""
    failed = list[str]()
    for name, measure in cases:
        try:
            row = measure()
        except Exception as e:  # whatever it is, the other cases still have minutes of a GPU to use
            row = {"error": first_line(e)}
            failed.append(f"{name}: {row['error']}")
        emit({name: row})
        gc.collect()
        if w.DEVICE == "cuda":
            torch.cuda.empty_cache()
    return failed


def main(argv: list[str]) -> None:
    """Run the tasks that are named, joined by "+"."""
    if argv == ["probe"]:
        return probe()
    torch.manual_seed(0)
    failed = [line for task in argv[0].split("+") for line in run(TASKS[task](int(argv[1])))]
    if failed:
        sys.exit(f"{len(failed)} cases failed: {failed[0]}")
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
