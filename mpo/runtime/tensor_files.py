"""Named tensors in a folder of safetensors files, written and read by any number of processes.

Several processes use torch.distributed.checkpoint in its safetensors format, which has no pickled metadata, and each
writes its part. A single process writes the same format itself, in one file.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpo.runtime import distributed
from mpo.runtime.errors import RunError


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into an empty folder; each process writes its part. Raises RunError where any of them fails."""
    if distributed.world_size() == 1:
        save_file(
            {name: t.cpu() for name, t in tensors.items()}, folder / "shard-00001-model-00001-of-00001.safetensors"
        )
        return
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with warnings.catch_warnings():  # torch 2.9 warns of its own code
            warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
            save(dict(tensors), storage_writer=writer)
    except CheckpointException as e:
        rank, (error, _) = next(iter(e.failures.items()))
        raise RunError(f"{folder}: cannot be written by process {rank} ({error})") from None


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in such a folder, by name. Raises SafetensorError or OSError for a damaged file."""
    whole: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            offsets = json.loads((f.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in f.keys():  # noqa: SIM118
                shape = f.get_slice(name).get_shape()
                ends = (
                    [n + at for n, at in zip(shape, offsets[name]["saved_offsets"], strict=True)] if offsets else shape
                )
                whole[name] = tuple(max(pair) for pair in zip(ends, whole.get(name, ends), strict=True))
    return whole


@torch.no_grad()
def read(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill these tensors, which may be sharded, with those of the same names."""
    files = list(folder.glob("*.safetensors"))
    if distributed.world_size() == 1 and len(files) == 1:
        saved = load_file(files[0])
        for name, tensor in into.items():
            tensor.copy_(saved[name])
        return
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    load(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=distributed.world_size() == 1)
