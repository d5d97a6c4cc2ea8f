"""Several processes working on one stage, through torch.distributed: the seam between it and the rest of the project.

Every process reads the same flags and rows and makes the same random choices. Each computes its share of a batch's
rows, and the results are gathered at once, so that all processes hold the same values as one process alone would.
A model that learns is replicated (DDP averages its gradients) or sharded (FSDP2 splits its weights and moments, too).

In a single process every function here does nothing, and torch's distributed machinery is not imported (it costs a
second).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpo.runtime import device
from mpo.runtime.errors import Ending, InputError

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
TIMEOUT = timedelta(minutes=30)  # without an answer for so long, another process counts as dead

_store: Any = None  # a key-value store that all processes can write to
_sharded = False


def start(sharded: bool) -> None:
    """Join the processes that torchrun started (RANK, WORLD_SIZE ... in the environment), if it did.

    `sharded`: shard models (FSDP2) instead of replicating them (DDP). Only the main process prints from now on.
    Raises InputError where the environment has only a part of what torchrun sets.
    """
    global _store, _sharded
    processes = os.environ.get("WORLD_SIZE") or "1"
    if processes != "1" and not dist.is_initialized():
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        try:
            store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        except ValueError as e:
            raise InputError(f"WORLD_SIZE={processes}: not set by torchrun ({e}); unset it for one process") from None
        tries = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _store = PrefixStore(f"mpo/{tries}", store)
        group = PrefixStore(f"group/{tries}", store)
        backend = "cpu:gloo,cuda:nccl" if device.current().type == "cuda" else "gloo"
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=TIMEOUT)
        if rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
    _sharded = sharded and world_size() > 1


def leave() -> None:
    """End this process with success, at once, if it is one of several and all have come this far.

    A process that left earlier would break the connections of one that is still joining or in its last collective.
    It does not leave through the interpreter's shutdown: gloo's threads release the tensors of a collective a moment
    after it is done, and one that needs the interpreter while it is being torn down aborts the process. That was seen
    now and then on a busy machine ("terminate called without an active exception").
    """
    if dist.is_initialized():
        sys.stdout.flush()
        all_max([0])
        os._exit(0)


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def is_main() -> bool:
    """True in the process that writes files and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def has_the_last_word() -> bool:
    """True in the one process that says why the job ended; the main process, unless it no longer can."""
    if not is_main():
        time.sleep(0.5)  # let the main process go first: it also has to finish its progress bar
    if _store is None:  # not joined yet, so the flags are wrong for all of them
        return os.environ.get("RANK", "0") == "0"
    try:
        return int(_store.add("endings", 1)) == 1
    except (RuntimeError, ValueError):  # the process that kept the store is gone
        return True


def lost_a_peer(error: RuntimeError) -> bool:
    """Whether this error means that another process can no longer be reached. It may come while this one joins."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and (isinstance(error, dist.DistBackendError) or "onnection" in str(error))


# --- rows: divided among the processes, results gathered -----------------------------------------


def local_rows(rows: int) -> list[int]:
    """The rows of a batch that this process computes. All get equally many; the last row is repeated to fill up."""
    each = -(-rows // world_size())
    begin = each * dist.get_rank() if dist.is_initialized() else 0
    return [min(i, rows - 1) for i in range(begin, begin + each)]


def exact_local_rows(rows: int, names: str) -> list[int]:
    """The same where every row must count exactly once. Raises InputError where the rows do not divide."""
    if rows % world_size():
        raise InputError(f"{names}: {rows} is not a multiple of the {world_size()} processes")
    return local_rows(rows)


def all_gather(values: Tensor, rows: int) -> Tensor:
    """Each process's values of its `local_rows` (k, ...) -> those of all rows (rows, ...), everywhere; no gradients."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.detach().contiguous())
    return torch.cat(parts)[:rows]


def all_gather_object(one: T) -> list[T]:
    """The object of every process, in all of them; for small objects."""
    if world_size() == 1:
        return [one]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, one)
    return objects


def all_sum(values: Mapping[str, float]) -> dict[str, float]:
    """Each number summed over the processes."""
    if world_size() == 1:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


def all_max(values: Sequence[float]) -> list[float]:
    """The largest of each number over the processes, so that what one of them saw is known to all."""
    if world_size() == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def from_main(make: Callable[[], T]) -> T:
    """Call make() in the main process only; its result, or the Ending or OSError it raises, reaches all processes."""
    if world_size() == 1:
        return make()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = make()
        except (Ending, OSError) as e:
            box[1] = e
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result


# --- models: replicated or sharded ---------------------------------------------------------------


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules whose weights FSDP2 gathers together; none where the model is not sharded."""
    if not _sharded:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def shard(model: M) -> M:
    """With sharding on, keep only this process's part of each weight: layer by layer, then what is left."""
    layers = getattr(getattr(model, "model", None), "layers", ())
    if _sharded and layers and not _fsdp_modules(model):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.current().type, (world_size(),))
        heads = [model.score] if hasattr(model, "score") else []  # always fp32, and a group may have only one dtype
        for part in [*layers, *heads]:
            fully_shard(part, mesh=mesh)
        # The language head is used after the model's forward pass (logprobs.py), so it stays gathered until backward.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def wrap(model: nn.Module) -> None:
    """Average this model's gradients over the processes from now on. To be called before its optimiser is made."""
    reshard(model)
    if world_size() > 1 and not _fsdp_modules(shard(model)):
        from torch.distributed._composable.replicate import replicate

        replicate(model)


def synchronise_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass averages gradients. Of all microbatches only the last one needs to."""
    if world_size() > 1 and not _fsdp_modules(model):
        model.set_requires_gradient_sync(now)  # type: ignore[operator]


@contextmanager
def unsharded(model: nn.Module, layers: bool = True) -> Iterator[None]:
    """Within this context every process holds all weights, gathered once: generation needs them at every token.

    Without `layers`, it holds those outside the layers, and each layer's only when its turn comes (`in_turn`).
    """
    parts = [part for part in _fsdp_modules(model) if layers or part is model]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def in_turn(layers: Iterable[M]) -> Iterator[M]:
    """The layers of a model, each gathered when its turn comes and only until the next one's.

    Every process must go through them equally often, since each gives its part.
    """
    for layer in layers:
        parts = _fsdp_modules(layer)
        for part in parts:
            part.unshard()
        yield layer
        for part in parts:
            part.reshard()


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward pass without a backward pass left gathered."""
    for part in _fsdp_modules(model):
        part.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. Every process must ask, in the same order."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def part_of(local: Tensor, like: Tensor) -> Tensor:
    """The sharded tensor that has this process's part `local`, where `like` is sharded; otherwise `local` itself."""
    if not hasattr(like, "full_tensor"):
        return local
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a full tensor, which every process has, where `like` is sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
