"""How much of a step's time each compiled function takes: python -m benchmarks.breakdown CASE THREADS

All compiled kernels are called through one function, `call` in kernels/cpu/binding.py, which is timed here. The rest of
a step is torch: embeddings, sums, the optimiser, autograd, Python.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import turns
from benchmarks.ours import CASES
from mpo.kernels.cpu import binding
from mpo.runtime.setup import setup_torch


def timed(spent: Counter[str]) -> Any:
    """A replacement for binding.call that also adds the seconds of each function to `spent`."""
    plain = binding.call

    def call(function: str, *arguments: binding.Argument) -> None:
        began = time.perf_counter()
        plain(function, *arguments)
        spent[function] += time.perf_counter() - began  # type: ignore[assignment]

    return call


def profile(case: str, steps: int = 5) -> dict[str, float]:
    """The seconds that each function takes of one step of this case; what remains is "torch and the rest"."""
    step, spent = CASES[case](), Counter[str]()
    step()
    call = timed(spent)
    plain = binding.call
    for name, module in list(sys.modules.items()):
        if name.startswith("mpo.kernels.cpu") and getattr(module, "call", None) is plain:
            module.call = call  # type: ignore[attr-defined]
    began = time.perf_counter()
    for _ in range(steps):
        step()
    total = time.perf_counter() - began
    of_functions = {name: seconds / steps for name, seconds in spent.most_common()}
    return of_functions | {"torch and the rest": (total - sum(spent.values())) / steps}


if __name__ == "__main__":
    case, (threads,) = turns.arguments("python -m benchmarks.breakdown CASE THREADS", cases=CASES)
    setup_torch(SimpleNamespace(threads=threads))  # type: ignore[arg-type]
    torch.manual_seed(0)
    print(json.dumps(profile(case)))
