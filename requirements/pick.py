"""Print what to install for one purpose, with versions and hashes:

    python requirements/pick.py PURPOSE > FILE
    pip install --require-hashes -r FILE

PURPOSE is runtime, figures, tokenizers, hub, site, dev, gpu, parity or oldest. lock.txt has all packages for all
purposes and platforms; `make lock` writes it from direct.txt and pyproject.toml. This script picks those that the
purpose needs, following the "# via" notes of the lock. If pip is set up to find a CPU build of torch, it picks that
build, without the GPU libraries of the ordinary one. The script itself needs nothing but Python.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

LOCK = Path(__file__).with_name("lock.txt")
PROJECT = LOCK.parent.parent / "pyproject.toml"
PURPOSES = {  # purpose -> extras of pyproject.toml
    "runtime": set[str](),
    "figures": {"figures"},
    "tokenizers": {"tokenizers"},
    "hub": {"hub"},
    "site": {"site"},
    "dev": {"dev", "figures"},
    "gpu": {"dev", "figures", "gpu"},
    "parity": {"dev", "figures", "parity"},
}
CPU_BUILD = re.compile(r"^# cpu build: torch==(\S+) (sha256:\w+)$", re.MULTILINE)
GPU_LIBRARIES = ("nvidia-", "cuda-")


def blocks(text: str) -> dict[str, str]:
    """The lines of each package, by name. A package may have several versions, for different platforms."""
    lines: dict[str, str] = {}
    for block in re.split(r"^(?=[A-Za-z0-9][\w.-]*==)", text, flags=re.MULTILINE)[1:]:
        name = block.split("==")[0]
        lines[name] = lines.get(name, "") + block
    return lines


def parents(block: str) -> set[str]:
    """What needs a package: other packages, or an entry of pyproject.toml such as "mpo (extra)"."""
    notes = re.findall(r"^    #(?: via)?\s+(?:via )?([\w. ()-]+?)(?: \(pyproject.toml\))?$", block, re.MULTILINE)
    return {n.strip() for n in notes if n.strip() not in ("", "-c requirements/direct.txt")}


def needed(packages: dict[str, str], direct: set[str]) -> set[str]:
    """The packages of `direct`, and all that these need, directly or indirectly."""
    chosen = set(direct)
    while more := {name for name, block in packages.items() if parents(block) & chosen} - chosen:
        chosen |= more
    return chosen


def direct_requirements(extras: set[str]) -> set[str]:
    """The names of the packages that pyproject.toml requires, with these extras, and setuptools."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    optional = (r for e in extras for r in project["optional-dependencies"][e])
    return {re.split(r"[<>=!~ \[;]", r)[0].lower() for r in (*project["dependencies"], *optional, "setuptools")}


def oldest() -> str:
    """The oldest versions of the runtime that pyproject.toml allows, and what the tests need; without hashes."""
    dependencies = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    pinned = dict(
        re.findall(r"^([\w-]+)==(\S+)$", LOCK.with_name("direct.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    tools = ("pytest", "pytest-xdist", "hypothesis")
    return "\n".join([r.replace(">=", "==") for r in dependencies] + [f"{n}=={pinned[n]}" for n in tools])


def takes_cpu_build(version: str) -> bool:
    """True if pip, as it is set up here, would install a CPU build of this version of torch."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    done = subprocess.run(
        [*command, "--report", "-", f"torch=={version}"], capture_output=True, encoding="utf-8", check=False
    )
    try:
        return str(json.loads(done.stdout)["install"][0]["metadata"]["version"]).endswith("+cpu")
    except (ValueError, LookupError):
        return False


def main() -> None:
    """Print the requirements of the purpose named on the command line."""
    purpose = sys.argv[1] if len(sys.argv) > 1 else "runtime"
    if purpose == "oldest":
        print(oldest())
        return
    if purpose not in PURPOSES:
        sys.exit(f"pick.py: error: {purpose}: expected one of {', '.join(PURPOSES)}, oldest")
    extras = PURPOSES[purpose]
    text = LOCK.read_text(encoding="utf-8")
    packages, cpu, direct = blocks(text), CPU_BUILD.search(text), direct_requirements(extras)
    if cpu and takes_cpu_build(cpu[1]):
        packages["torch"] = f"torch=={cpu[1]} --hash={cpu[2]}\n" + "".join(
            line + "\n" for line in packages["torch"].splitlines() if line.startswith("    #")
        )
        packages = {
            n: b for n, b in packages.items() if not n.startswith(GPU_LIBRARIES) and (n != "triton" or n in direct)
        }
    print("".join(packages[name] for name in sorted(needed(packages, direct))))


if __name__ == "__main__":
    main()
