"""A pretended second device, which shows that no stage mixes tensors on a GPU with tensors on the CPU:

    python -m tests.support.pretend RUN WORK [DEVICE]

A tensor on the device "pretend" wraps a tensor on the CPU, and the CPU does the computing. As on a GPU, an operation on
tensors of both devices raises an error, unless the one on the CPU has no dimensions. Runs every stage on the CPU and on
the other device, with the data and models of the finished run RUN, and writes WORK/<stage>-cpu and WORK/<stage>-other.
One stage is also killed there after a save, and goes on from it: WORK/<stage>-killed. DEVICE names a real device
instead of the pretended one.
"""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import library
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import eval as evaluate
import split_data
from mpo.config import EvalConfig, SplitConfig
from mpo.runtime.saves import Saves
from tests.support import crashes

NAME = "pretend"
MOVES = (
    "aten::_to_copy",
    "aten::copy_",
    "aten::_local_scalar_dense",
)  # operations that copy from one device to another


class Pretend(torch.Tensor):
    """A tensor on the pretended device. Its numbers are in `raw`, a tensor on the CPU."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Pretend:
        """Wrap a tensor on the CPU."""
        about = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        wrapper = torch.Tensor._make_wrapper_subclass(cls, raw.size(), device=torch.device(NAME, 0), **about)
        wrapper.raw = raw
        return wrapper

    def tolist(self) -> Any:
        """The numbers as a list, which torch cannot make from a wrapper."""
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute with the wrapped tensors."""
        return compute(func, *args, **(kwargs or {}))


def compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Do an operation of torch on the wrapped tensors. Raises RuntimeError for tensors of two devices."""
    name = func.name().split(".")[0]
    flat, spec = pytree.tree_flatten((args, kwargs))
    pretended = [x for x in flat if isinstance(x, Pretend)]
    others = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, Pretend) and x.dim()]
    if pretended and others and name not in MOVES:
        raise RuntimeError(f"{name}: tensors on two devices, {[tuple(x.shape) for x in others]} on the CPU")
    target = kwargs.get("device")
    wrap = bool(pretended) if target is None else torch.device(target).type == NAME
    cpu = [x.raw if isinstance(x, Pretend) else torch.device("cpu") if isinstance(x, torch.device) else x for x in flat]
    raw_args, raw_kwargs = pytree.tree_unflatten(cpu, spec)
    out = func(*raw_args, **raw_kwargs)
    if name.endswith("_") and isinstance(args[0], torch.Tensor):  # in place
        return args[0]
    return pytree.tree_map(lambda x: Pretend(x) if isinstance(x, torch.Tensor) else x, out) if wrap else out


LIBRARIES: list[library.Library] = []  # kept alive here, since torch forgets what they register once they are freed


def install() -> None:
    """Register the device with torch."""
    _setup_privateuseone_for_python_backend(NAME)
    everything, aten = library.Library("_", "IMPL"), library.Library("aten", "IMPL")
    everything.fallback(compute, "PrivateUse1")
    for op in (torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step):
        aten.impl(
            op, partial(compute, op), "PrivateUse1"
        )  # torch's own resizes an empty tensor; a wrapper cannot be resized
    LIBRARIES.extend((everything, aten))


# Stages that train, all of them keys of crashes.STAGES, and stages that do not.
TRAINING = ("sft", "rm", "dpo-lora", "ppo", "ppo-shared", "ppo-lora")
OTHERS = {
    "split": (split_data, SplitConfig, "--data {run}/data --rm {run}/rm"),
    "eval": (
        evaluate,
        EvalConfig,
        "--data {run}/data --rm {run}/rm --policies sft={run}/sft,mpo={run}/mpo --prompts 8 --max_new 12",
    ),
}


KILLED = "ppo"  # it has two models and random numbers of its own


def run(stage: str, base: Path, out: Path, device: str, expect: int = 0, before: Any = None) -> None:
    """Run a stage on a device. Ends the program if the stage does not end as expected."""
    short = crashes.SHORTEST.get(stage.split("-")[0], "").split()
    if (status := crashes.wait(crashes.start(stage, base, out, *short, "--device", device, before=before))) != expect:
        sys.exit(f"{out.name} ended with {status}: {out.with_suffix('.log').read_text()[-3000:]}")


def main() -> None:
    """Run every stage on both devices."""
    base, work, *named = sys.argv[1:]
    other = named[0] if named else NAME
    torch.set_num_threads(1)
    if other == NAME:
        install()
    crashes.STAGES.update(OTHERS)
    for stage in (*TRAINING, *OTHERS):
        for device, name in (("cpu", "cpu"), (other, "other")):
            run(stage, Path(base), Path(work, f"{stage}-{name}"), device)
    killed = Path(work, f"{KILLED}-killed")
    after_a_save = crashes.die_at_call(Saves, "write", 1, after=True)
    run(KILLED, Path(base), killed, other, -signal.SIGKILL, after_a_save)
    run(KILLED, Path(base), killed, other)


if __name__ == "__main__":
    main()
