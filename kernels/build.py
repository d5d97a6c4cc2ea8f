"""Compile the C++ in cpp/ with the system's compiler: python kernels/build.py, which `make setup` runs.

The file name of the library contains a hash of the sources, the flags and the processor. So a library that was built
from older sources, or on another machine, is never loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCES = Path(__file__).with_name("cpp")
FLAGS = "-std=c++17 -O3 -march=native -ffp-contract=fast -fno-math-errno -fopenmp -fPIC -shared".split()
FLAGS += os.environ.get("MPO_KERNELS_FLAGS", "").split()  # `make sanitize` adds some, and so builds another library


def library() -> Path:
    """The path of the compiled kernels for these sources on this processor, whether they have been built or not."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    texts = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    key = " ".join([*texts, *FLAGS, platform.machine(), processor])
    return SOURCES.parent / "compiled" / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


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


if __name__ == "__main__":
    try:
        if not library().exists():
            build()
    except RuntimeError as e:
        print(f"kernels: {e}; everything works without the compiled kernels, but more slowly", file=sys.stderr)
