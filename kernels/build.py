"""Compile the C++ in cpp/ with the system's compiler: python kernels/build.py, which `make setup` runs.

In an installed package, the kernels are compiled when they are first needed, or before that by `mpo kernels`. The
folder of the package may be read-only, so they go into the user's cache.

The file name of the library contains a hash of the sources, the flags and the processor. So a library that was built
from older sources, or on another machine, is never loaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

SOURCES = Path(__file__).with_name("cpp")
INSTALLED = (Path(__file__).resolve().parents[1] / "__init__.py").exists()  # in mpo/, not at the top of a checkout
FLAGS = "-std=c++17 -O3 -march=native -ffp-contract=fast -fno-math-errno -fopenmp -fPIC -shared".split()
FLAGS += os.environ.get("MPO_KERNELS_FLAGS", "").split()  # `make sanitize` adds some, and so builds another library


def folder() -> Path:
    """Where compiled kernels are kept: beside the sources or, of an installed package, in the user's cache.

    Raises RuntimeError for a user without a home.
    """
    if not INSTALLED:
        return SOURCES.parent / "compiled"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpo" / "kernels"


def library() -> Path:
    """The path of the compiled kernels for these sources on this processor, whether they have been built or not."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    texts = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    key = " ".join([*texts, *FLAGS, platform.machine(), processor])
    return folder() / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


def compiler() -> str | None:
    """The path of the C++ compiler: the first that exists of $CXX, c++, g++ and clang++; None without any."""
    return next(
        (path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))),
        None,
    )


def triton_lacks() -> str:
    """What keeps Triton from running here, as a message; "" if nothing does.

    Triton compiles its kernels itself, but needs a C compiler ($CC, gcc or clang) and Python's headers for the code
    that starts them. Many images for GPUs have neither. Its interpreter needs neither.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if not any(shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang") if name):
        return "Triton needs a C compiler (gcc or clang; or set CC)"
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        return f"Triton needs Python's headers, and {headers} has no Python.h (install python3-dev)"
    return ""


def build(target: Path | None = None) -> Path:
    """Compile the library to `target` (by default library()) and return its path.

    The file is renamed into place once it is complete, so that no other process loads half of it.

    Raises RuntimeError without a compiler, or with the compiler's message where it fails.
    """
    target = target or library()
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler (g++ or clang++) found")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    sources = sorted(map(str, SOURCES.glob("*.cpp")))
    done = subprocess.run(
        [cxx, *FLAGS, *sources, "-o", str(part)], capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        part.unlink(missing_ok=True)
        raise RuntimeError(f"{cxx} failed: {done.stderr.strip()[:2000]}")
    part.replace(target)
    return target


def build_once() -> str:
    """Compile the library, unless it is there; returns "" or, in one line, why that was not possible.

    Of several processes one compiles, and the others wait. What a compiler has refused is not tried again.
    """
    try:
        target = library()
        refused = target.with_suffix(".refused")
        if target.exists():
            return ""
        if compiler() is None:
            return "no C++ compiler (g++ or clang++) found"
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / ".lock").open("wb") as lock:
            with suppress(OSError):  # a file system without locks: then each process compiles a file of its own
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists() and not refused.exists():
                print(f"kernels: compiling them for this processor, once, into {target.parent}", file=sys.stderr)
                try:
                    build(target)
                except RuntimeError as e:
                    refused.write_text(f"{e}\n", encoding="utf-8")
        if refused.exists():
            return f"{refused}: the C++ could not be compiled; `mpo kernels` tries again"
    except (OSError, RuntimeError) as e:
        return " ".join(str(e).split())
    return ""


if __name__ == "__main__":
    try:
        if not library().exists():
            library().with_suffix(".refused").unlink(missing_ok=True)
            build()
        if INSTALLED:
            print(f"kernels: {library()}")
    except (OSError, RuntimeError) as e:
        print(f"kernels: {e}; everything works without the compiled kernels, but more slowly", file=sys.stderr)
