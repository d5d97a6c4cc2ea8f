"""What to install here, with hashes:

    python requirements/pick.py PURPOSE > FILE
    pip install --require-hashes -r FILE

lock.txt has everything for every platform, written by `make lock` from direct.txt and pyproject.toml. This picks the
packages that one purpose needs, by the lock's own "# via" notes. Where pip is set up to find a CPU build of torch, that
build is taken, without the GPU libraries that the ordinary one asks for. Nothing but Python is needed to run it.
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
PURPOSES = {  # extras of pyproject.toml
    "runtime": set[str](),
    "figures": {"figures"},
    "dev": {"dev", "figures"},
    "gpu": {"dev", "figures", "gpu"},
    "parity": {"dev", "figures", "parity"},
}
CPU_BUILD = re.compile(r"^# cpu build: torch==(\S+) (sha256:\w+)$", re.MULTILINE)
GPU_LIBRARIES = ("nvidia-", "cuda-")


def blocks(text: str) -> dict[str, str]:
    """Each package's lines, by name: of all its versions, where platforms have different ones."""
    found: dict[str, str] = {}
    for block in re.split(r"^(?=[A-Za-z0-9][\w.-]*==)", text, flags=re.MULTILINE)[1:]:
        name = block.split("==")[0]
        found[name] = found.get(name, "") + block
    return found


def parents(block: str) -> set[str]:
    """What a package is in the lock for: packages, or pyproject.toml's "mpo (extra)"."""
    notes = re.findall(r"^    #(?: via)?\s+(?:via )?([\w. ()-]+?)(?: \(pyproject.toml\))?$", block, re.MULTILINE)
    return {n.strip() for n in notes if n.strip() not in ("", "-c requirements/direct.txt")}


def needed(packages: dict[str, str], direct: set[str]) -> set[str]:
    """`direct` and all that they ask for, by the notes of who asks."""
    chosen = set(direct)
    while more := {name for name, block in packages.items() if parents(block) & chosen} - chosen:
        chosen |= more
    return chosen


def direct_requirements(extras: set[str]) -> set[str]:
    """The names that pyproject.toml asks for."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e]), "setuptools"]
    return {re.split(r"[<>=!~ \[;]", r)[0].lower() for r in asked}


def oldest() -> str:
    """The runtime's oldest versions that pyproject.toml allows, and what the tests need; without hashes."""
    asked = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    pinned = dict(
        re.findall(r"^([\w-]+)==(\S+)$", LOCK.with_name("direct.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    tools = ("pytest", "pytest-xdist", "hypothesis")
    return "\n".join([r.replace(">=", "==") for r in asked] + [f"{n}=={pinned[n]}" for n in tools])


def takes_cpu_build(version: str) -> bool:
    """Whether pip, as it is set up here, would install a CPU build of torch."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    done = subprocess.run([*command, "--report", "-", f"torch=={version}"], capture_output=True, text=True, check=False)
    try:
        return str(json.loads(done.stdout)["install"][0]["metadata"]["version"]).endswith("+cpu")
    except (ValueError, LookupError):
        return False


def main() -> None:
    """Print the requirements of a purpose."""
    purpose = sys.argv[1] if len(sys.argv) > 1 else "runtime"
    if purpose == "oldest":
        print(oldest())
        return
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
