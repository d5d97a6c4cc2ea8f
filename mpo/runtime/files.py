"""Files that appear complete or not at all, strict JSON, and hashes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mpo.runtime import distributed
from mpo.runtime.errors import InputError, RunError

LARGEST_JSON = 64 << 20  # bytes: no index or manifest is larger


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` at the end, so that a reader sees the old file or the new one.

    Raises RunError where it cannot be written; `path` is then as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)  # so that the name, too, is on the disk
    except (OSError, SafetensorError) as e:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({_reason(e)}); nothing was overwritten") from None


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a folder, which all processes fill together. A folder that is already there stays as it is.

    Raises RunError where it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        distributed.from_main(lambda: _make_empty(partial))
        yield partial
        distributed.from_main(lambda: _publish(partial, path))
    except (OSError, SafetensorError) as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"{path}: cannot be written ({_reason(e)}); nothing was overwritten") from None


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(partial: Path, path: Path) -> None:
    """Give a finished folder its name, once all of it is on the disk."""
    for file in (*partial.iterdir(), partial):
        sync(file)
    if path.exists():
        shutil.rmtree(partial)
    else:
        partial.replace(path)
    sync(path.parent)


def _reason(e: Exception) -> object:
    return (isinstance(e, OSError) and e.strerror) or e


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; of several processes, only the main one does."""
    if not distributed.is_main():
        return
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline, atomically. Raises RunError for NaN, which JSON does not have."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise RunError(f"{path}: not written, since one of its numbers is not finite") from None
    write_text(path, text + "\n")


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what a page has between two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    write_text(page, f"{before}{begin}{text}{rest[rest.index(end) :]}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that transformers and peft open; of several processes, only the main one does."""
    if distributed.is_main():
        with atomic_file(path) as partial:
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, partial, {"format": "pt"})


def finite(value: Any) -> Any:
    """The same value with None in place of every number that is not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Read JSON. Raises InputError, which names the file and what is wrong with it."""
    if path.exists() and not (path.is_file() and path.stat().st_size <= LARGEST_JSON):
        raise InputError(f"{path}: not a file of at most {LARGEST_JSON >> 20} MiB")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; has the stage that writes it finished?") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not valid JSON ({e})") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
