"""Several processes on one job, on torch's own engine: the one place that knows of them.

Every process reads the same flags and rows and makes the same random choices. Of each batch it computes its own share,
and what comes out is put together, so that everything before and behind is the same in all of them, and in one alone.
A model that learns is replicated (DDP: gradients are averaged) or sharded (FSDP2: so are its weights and moments).
One process passes through every function here as if it were not there, and does not import the engine (a second).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpo import device
from mpo.errors import Ending, InputError

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
PATIENCE = timedelta(minutes=30)  # with another process, before it is taken for dead

_store: Any = None  # what all processes can write to, besides their collectives
_sharded = False


def start(sharded: bool) -> None:
    """Join the processes that torchrun started (RANK, WORLD_SIZE ... in the environment); alone without it.

    `sharded`: models are sharded (FSDP2), not replicated (DDP). Only the first process prints.
    """
    global _store, _sharded
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        tries = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _store = PrefixStore(f"mpo/{tries}", store)
        group = PrefixStore(f"group/{tries}", store)
        backend = "cpu:gloo,cuda:nccl" if device.here().type == "cuda" else "gloo"
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=PATIENCE)
        if rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    _sharded = sharded and count() > 1


def end() -> None:
    """End this process with success, at once, if it is one of several.

    Not by way of the interpreter's own end: gloo's threads let go of a collective's tensors a moment after it is done,
    and one that asks for the interpreter while that is torn down aborts the process, now and then on a busy machine
    ("terminate called without an active exception").
    """
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(0)


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(count())))


def first() -> bool:
    """True in the one that writes files and speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def may_speak_last() -> bool:
    """True for one process: the one that says why the job ended, rather the first one where all know."""
    if not first():
        time.sleep(0.5)  # it has more to say, such as the end of its progress bar
    if _store is None:  # not joined yet: the flags are wrong, for all of them
        return os.environ.get("RANK", "0") == "0"
    try:
        return int(_store.add("endings", 1)) == 1
    except (RuntimeError, ValueError):  # whoever kept the store is gone
        return True


def lost_another(error: RuntimeError) -> bool:
    """Whether an error says that another process cannot be reached any more."""
    return count() > 1 and (isinstance(error, dist.DistBackendError) or "onnection" in str(error))


# --- rows: shared out and put together ----------------------------------------------------------


def share(rows: int) -> list[int]:
    """Which of a batch's rows are this process's: as many in each, the last one again where they don't come out."""
    each = -(-rows // count())
    begin = each * dist.get_rank() if dist.is_initialized() else 0
    return [min(i, rows - 1) for i in range(begin, begin + each)]


def exact_share(rows: int, names: str) -> list[int]:
    """The same where every row must count once. Errors: InputError where they don't come out."""
    if rows % count():
        raise InputError(f"{names}: {rows} is not a multiple of the {count()} processes")
    return share(rows)


def gather(values: Tensor, rows: int) -> Tensor:
    """From each process's values of its share (k, ...) to those of all rows (rows, ...), everywhere; no gradients."""
    if count() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(count())]
    dist.all_gather(parts, values.detach().contiguous())
    return torch.cat(parts)[:rows]


def every(one: T) -> list[T]:
    """The object of each process, everywhere; for small ones."""
    if count() == 1:
        return [one]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, one)
    return found


def sums(values: Mapping[str, float]) -> dict[str, float]:
    """Each number summed over the processes."""
    if count() == 1:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


def most(values: Sequence[float]) -> list[float]:
    """The largest of each number over the processes: what one of them has seen, all know."""
    if count() == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def from_first(make: Callable[[], T]) -> T:
    """make(), called in the first process alone; its result, or the Ending or OSError it raises, everywhere."""
    if count() == 1:
        return make()
    box: list[Any] = [None, None]
    if first():
        try:
            box[0] = make()
        except (Ending, OSError) as e:
            box[1] = e
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result


# --- models ---------------------------------------------------------------------------------------


def _parts(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 gathers one at a time; none where the model is whole."""
    if not _sharded:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def shard(model: M) -> M:
    """Each process keeps its part of every weight, where that is wanted: block by block, and what is left."""
    blocks = getattr(getattr(model, "model", None), "layers", ())
    if _sharded and blocks and not _parts(model):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.here().type, (count(),))
        heads = [model.score] if hasattr(model, "score") else []  # in fp32 whatever the rest is; a group has one dtype
        for part in [*blocks, *heads]:
            fully_shard(part, mesh=mesh)
        # The head is used behind the model's forward pass (logprobs.py), so it stays gathered until the backward pass.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def learns(model: nn.Module) -> None:
    """From now on a model's gradients are averaged over the processes. Called before its optimiser is made."""
    settle(model)
    if count() > 1 and not _parts(shard(model)):
        from torch.distributed._composable.replicate import replicate

        replicate(model)


def synchronise(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass averages gradients: of all microbatches only the last one needs to."""
    if count() > 1 and not _parts(model):
        model.set_requires_gradient_sync(now)  # type: ignore[operator]


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Within it every process has all weights, gathered once: for generation, which uses them token after token."""
    parts = _parts(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def settle(model: nn.Module) -> None:
    """Give back what a forward pass without a backward pass has left gathered: parameters are what is kept here."""
    for part in _parts(model):
        part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. Every process must ask, in the same order."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process keeps of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, which every process has, what this process keeps where `like` is sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
