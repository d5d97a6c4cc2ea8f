"""make verify RUN=...: hash every artefact of a run again, and follow each from the data to the last model.

A stage is *damaged* where a file is not what its manifest says, *stale* where an input is no longer what it was made
from, or is stale itself, *unfinished* without a manifest. The exit status is 1 unless all is well.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import sha256
from mpo.runtime.stage import SAVES, hash_tree, read_manifest
from mpo.runtime.tables import table


@dataclass
class Found:
    """What is known of one stage's folder."""

    manifest: dict[str, Any]
    faults: list[str] = field(default_factory=list)  # damaged or unfinished
    stale: list[str] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)  # stages of this run that it was made from

    @property
    def state(self) -> str:
        """In one word."""
        if not self.manifest:
            return "unfinished"
        return "damaged" if self.faults else "stale" if self.stale else "good"


def check_outputs(folder: Path, outputs: dict[str, str]) -> list[str]:
    """Files of a stage that are not what its manifest says."""
    now = hash_tree(folder)
    changed = [f"{name} has another hash" for name in outputs.keys() & now.keys() if outputs[name] != now[name]]
    return sorted(changed + [f"{name} is gone" for name in outputs.keys() - now.keys()])


def check_input(name: str, path: Path, recorded: dict[str, str]) -> list[str]:
    """What of an input is no longer what the stage was made from; only files of that input are looked at."""
    if not _exists(path):
        return [f"{name} ({path}) is gone"]
    for file, digest in sorted(recorded.items()):
        where = path / file if path.is_dir() else path
        inside = where.resolve().is_relative_to(path.resolve())
        if not (inside and _exists(where) and where.is_file() and sha256(where) == digest):
            return [f"made from another {name} ({path}): {file}"]
    return []


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def current(path: Path, run: Path) -> Path:
    """Where an input is now: where it was, or at the same place of a run folder that has been moved."""
    moved = [run / Path(*path.parts[-n:]) for n in (1, 2, 3)]
    return next((p for p in (path, *moved) if _exists(p)), path)


def look_at(folder: Path, stages: dict[Path, str]) -> Found:
    """One stage's folder. Errors: InputError for a manifest that is none."""
    path = folder / "manifest.json"
    if not path.exists():
        saved = len(list((folder / SAVES).glob("step-*")))
        return Found({}, [f"no manifest; {saved} saves to go on from"])
    manifest = read_manifest(path)
    found = Found(manifest, check_outputs(folder, manifest["outputs"]))
    for name, of in manifest["inputs"].items():
        where = current(Path(of["path"]), folder.parent)
        found.stale += check_input(name, where, of["sha256"])
        parent = next((stages[p] for p in (where.resolve(), *where.resolve().parents) if p in stages), None)
        found.parents += [parent] if parent and parent not in found.parents else []
    return found


def chain(stages: dict[str, Found], name: str, below: tuple[str, ...] = ()) -> list[str]:
    """All that a stage was made from, first things first, and itself. Errors: InputError where that is a circle."""
    if name in below:
        raise InputError(f"{name}: its manifest says that it was made from itself, by way of {', '.join(below)}")
    before: list[str] = []
    for parent in stages[name].parents:
        before += [n for n in chain(stages, parent, (*below, name)) if n not in before]
    return [*before, name]


def verify(run: Path) -> dict[str, Found]:
    """Every stage's folder of a run, in the order of the chain. Errors: InputError where there is no run."""
    folders = sorted(p for p in run.glob("*") if (p / "stage.json").exists())
    if not folders:
        raise InputError(f"{run}: holds no stage")
    by_path = {p.resolve(): p.name for p in folders}
    stages = {p.name: look_at(p, by_path) for p in folders}
    stages = {name: stages[name] for start in stages for name in chain(stages, start)}
    for found in stages.values():  # parents first, so that one pass is enough
        states = {p: stages[p].state for p in found.parents}
        found.stale += [f"made from {p}, which is {state}" for p, state in states.items() if state != "good"]
    return stages


def report(run: Path, stages: dict[str, Found]) -> str:
    """The table, and the chain of each model that nothing else was made from."""
    rows = []
    for name, found in stages.items():
        seed = str(found.manifest.get("config", {}).get("seed", ""))
        files = str(len(found.manifest.get("outputs", {})))
        rows.append([name, found.state, files, seed, ", ".join(found.parents), "; ".join(found.faults + found.stale)])
    used = {p for name, found in stages.items() if name != "eval" for p in found.parents}
    lines = [table(["stage", "state", "files", "seed", "made from", ""], rows), ""]
    for name, found in stages.items():
        if name not in used and "model.safetensors" in found.manifest.get("outputs", {}):
            hashes = {
                n: stages[n].manifest.get("outputs", {}).get("model.safetensors", "") for n in chain(stages, name)
            }
            lines.append(f"{run / name}: " + " -> ".join(f"{n} {digest[:8]}".strip() for n, digest in hashes.items()))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Verify the run named on the command line."""
    if len(argv) != 1:
        raise InputError("usage: python -m mpo.verify RUN")
    stages = verify(Path(argv[0]))
    print(report(Path(argv[0]), stages))
    bad = [name for name, found in stages.items() if found.state != "good"]
    print(
        f"\n{len(stages)} stages: " + (f"not good: {', '.join(bad)}" if bad else "every file is what its manifest says")
    )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    run_plain(main)
