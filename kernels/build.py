"""Compile cpp/ with the system's compiler: python kernels/build.py, which `make setup` runs.

The library's name has a hash of the sources, the flags and the processor, so that a library built for
another machine, or from older source, is not found rather than run.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).with_name("cpp")
FLAGS = "-std=c++17 -O3 -march=native -ffp-contract=fast -fno-math-errno -fopenmp -fPIC -shared".split()
FLAGS += os.environ.get("MPO_KERNELS_FLAGS", "").split()  # more of them: another library (make sanitize)


def library() -> Path:
    """Where the compiled kernels are, or would be, for this source on this processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    texts = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    key = " ".join([*texts, *FLAGS, platform.machine(), processor])
    return SOURCES.parent / "build" / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


def compiler() -> str | None:
    """The system's C++ compiler: $CXX, or the first of c++, g++, clang++."""
    return next(
        (found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))),
        None,
    )


def build(target: Path | None = None) -> Path:
    """Compile to `target` (library() unless given); the file appears whole or not at all.

    Errors: RuntimeError with the compiler's words where there is none or it fails.
    """
    target = target or library()
    found = compiler()
    if found is None:
        raise RuntimeError("no C++ compiler (g++ or clang++) found")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    sources = sorted(map(str, SOURCES.glob("*.cpp")))
    done = subprocess.run([found, *FLAGS, *sources, "-o", str(part)], capture_output=True, text=True)
    if done.returncode:
        part.unlink(missing_ok=True)
        raise RuntimeError(f"{found} failed: {done.stderr.strip()[:2000]}")
    part.replace(target)
    return target


if __name__ == "__main__":
    try:
        if not library().exists():
            build()
    except RuntimeError as e:
        print(f"kernels: {e}; everything works without, more slowly", file=sys.stderr)
