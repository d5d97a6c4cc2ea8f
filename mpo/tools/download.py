"""Download the official HH-RLHF files: make data/hh-rlhf, or python -m mpo.tools.download FOLDER

These are the two base parts of the data set, from Anthropic's own repository at a fixed commit. A file gets its name
only after its hash has been checked. A download that was broken off continues where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mpo.runtime.entry import one_argument, run_plain
from mpo.runtime.errors import InputError

COMMIT = "354e5c3cb8960630860dd5774a6ac2a58313bf4d"
LARGE = f"https://media.githubusercontent.com/media/anthropics/hh-rlhf/{COMMIT}/"
PLAIN = f"https://raw.githubusercontent.com/anthropics/hh-rlhf/{COMMIT}/"
MIRROR = "MPO_HH_URL"  # environment variable: another address that has the same files


@dataclass(frozen=True)
class File:
    """A file to download: where it is, its size if that is published, and a hash of one of two kinds.

    "sha256" is the SHA-256 of the content, as in the repository's pointers to large files. "git" is the repository's
    own blob id, sha1("blob <size>\\0" + content), which covers the size, too.
    """

    path: str
    base: str
    kind: str
    digest: str
    size: int | None = None


FILES = (
    File(
        "helpful-base/train.jsonl.gz",
        LARGE,
        "sha256",
        "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
        16200131,
    ),
    File(
        "helpful-base/test.jsonl.gz",
        LARGE,
        "sha256",
        "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
        875191,
    ),
    File("harmless-base/train.jsonl.gz", PLAIN, "git", "df7c90b1bbd6093bda9c996e8aab9a46fa557dcf"),
    File("harmless-base/test.jsonl.gz", PLAIN, "git", "a616e6a27660ded23c5ce0e585a3e4cf0d761f0e", 742801),
)


def check(file: File, content: Path) -> str:
    """What is wrong with the content of a downloaded file; "" if it is the official one."""
    size = content.stat().st_size
    if file.size is not None and size != file.size:
        return f"{size} bytes instead of {file.size}"
    digest = hashlib.sha256() if file.kind == "sha256" else hashlib.sha1(b"blob %d\0" % size)
    with content.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return "" if digest.hexdigest() == file.digest else f"{file.kind} hash {digest.hexdigest()} is not the official one"


def fetch(file: File, folder: Path, base: str) -> None:
    """Download one file from the address `base`, unless the folder has it already. Continues an earlier download.

    Raises InputError where the network cannot be reached, saying what to do, where the content is wrong, and where
    another file has the same name.
    """
    target = folder / file.path
    if target.exists():
        if wrong := check(file, target):
            raise InputError(f"{target}: is not the official file ({wrong}); move it to another place first")
        return
    partial = target.with_name(target.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    have = partial.stat().st_size if partial.exists() else 0
    shown = re.sub(r"//[^/@]*@", "//", base) + file.path  # without a mirror's password
    request = urllib.request.Request(base + file.path, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            resumed = reply.status == 206  # otherwise the server ignored Range and sends the complete file
            rest = int(reply.headers.get("Content-Length") or 0)
            start = have if resumed else 0
            bar = tqdm(desc=file.path, total=start + rest or None, initial=start, unit="B", unit_scale=True)
            with partial.open("ab" if resumed else "wb") as out, bar:
                while block := reply.read(1 << 16):
                    out.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as e:
        if e.code != 416:  # 416: there is nothing left to send, the file is complete
            raise InputError(f"{shown}: the server answered {e.code} {e.reason}") from None
    except OSError as e:
        reason = getattr(e, "reason", None) or e
        raise InputError(
            f"{shown}: no connection ({reason}). Run the same command again to resume; without a "
            f"network, copy the official files to {folder}/<subset>/, or use the built-in world: make hh DATA=builtin"
        ) from None
    if wrong := check(file, partial):
        partial.unlink()
        raise InputError(f"{target}: {wrong}; the download was deleted, run the same command again")
    partial.replace(target)


def main(argv: list[str]) -> None:
    """Download every file into the folder argv[0]. Raises InputError (`fetch`)."""
    folder = Path(one_argument(argv, "python -m mpo.tools.download FOLDER"))
    for file in FILES:
        fetch(file, folder, os.environ.get(MIRROR) or file.base)
    print(f"{folder}: has the {len(FILES)} official files; sizes and hashes are right")


if __name__ == "__main__":
    run_plain(main)
