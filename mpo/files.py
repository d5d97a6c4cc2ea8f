"""Files that appear whole or not at all, JSON that is JSON, hashes."""

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

from mpo import parallel
from mpo.errors import InputError, RunError

LARGEST_JSON = 64 << 20  # bytes: no index or manifest is larger


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write so that a reader sees the old file or the new one, never a part: it becomes `path` at the end.

    Errors: RunError where it cannot be written; then `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)  # the name, too, is on the disk
    except (OSError, SafetensorError) as e:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({_reason(e)}); nothing was overwritten") from None


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder of files, which all processes fill together; one that is there already stays as it is.

    Errors: RunError where it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        parallel.from_first(lambda: _empty_folder(partial))
        yield partial
        parallel.from_first(lambda: _name_folder(partial, path))
    except (OSError, SafetensorError) as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"{path}: cannot be written ({_reason(e)}); nothing was overwritten") from None


def _empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _name_folder(partial: Path, path: Path) -> None:
    """Once all of it is on the disk."""
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
    """Write a file, whole or not at all; of several processes the first one does."""
    if not parallel.first():
        return
    with whole(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline, whole or not at all; NaN is refused (RunError)."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise RunError(f"{path}: not written, since one of its numbers is not finite") from None
    write_text(path, text + "\n")


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Put `text` in the place of what a page has between two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    write_text(page, f"{before}{begin}{text}{rest[rest.index(end) :]}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that transformers and peft open; of several processes the first one does."""
    if parallel.first():
        with whole(path) as partial:
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, partial, {"format": "pt"})


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Read JSON, or end in one line that names the file and what is wrong with it."""
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
