"""Hash every file of a run again, and trace each model back to the data: python -m mpo.tools.verify RUN

A stage is *damaged* if one of its files differs from its manifest, and *unfinished* if it has no manifest. It is
*stale* if one of its inputs has changed since it ran, or comes from a stage that is not good itself. The exit status
is 0 if all stages are good, else 1.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpo.runtime.entry import one_argument, run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, sha256
from mpo.runtime.manifest import (
    FLAGS,
    MANIFEST,
    SAVES,
    Recipe,
    changed_files,
    hash_tree,
    is_stage,
    read_manifest,
    recorded,
)
from mpo.runtime.output import table


@dataclass
class StageCheck:
    """The result of checking one stage's folder."""

    manifest: dict[str, Any]  # empty for an unfinished stage
    faults: list[str] = field(default_factory=list)  # why it is damaged or unfinished
    stale: list[str] = field(default_factory=list)  # why it is stale
    parents: list[str] = field(default_factory=list)  # the stages of this run whose output it read

    @property
    def state(self) -> str:
        """good, stale, damaged or unfinished."""
        if not self.manifest:
            return "unfinished"
        return "damaged" if self.faults else "stale" if self.stale else "good"


def check_flags(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """How stage.json, written first, differs from the flags in manifest.json, written last, as at most one phrase."""
    first = read_json(folder / FLAGS)
    if not isinstance(first, dict):
        return [f"{FLAGS} does not hold flags"]
    flags, last = Recipe.of(first, manifest["inputs"]).flags, recorded(manifest).flags
    differ = sorted(name for name in flags.keys() | last.keys() if flags.get(name) != last.get(name))
    return [f"{FLAGS} and {MANIFEST} are of different runs: --{', --'.join(differ)}"] if differ else []


def check_input(name: str, path: Path, recorded: dict[str, str]) -> list[str]:
    """Why an input is no longer what the stage read, as a list of at most one phrase.

    `recorded` comes from a manifest, which may be malformed, so only files inside `path` are opened.
    """
    if not _exists(path):
        return [f"{name} ({path}) is missing"]
    for file, digest in sorted(recorded.items()):
        where = path / file if path.is_dir() else path
        inside = where.resolve().is_relative_to(path.resolve())
        if not (inside and _exists(where) and where.is_file() and sha256(where) == digest):
            return [f"made from a different {name} ({path}): {file}"]
    return []


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # no file can have this name
        return False


def current(path: Path, run: Path) -> Path:
    """Where an input is now: at its recorded path or, if the run folder has been moved, at the same place in it."""
    moved = [run / Path(*path.parts[-n:]) for n in (1, 2, 3)]
    return next((p for p in (path, *moved) if _exists(p)), path)


def look_at(folder: Path, stages: dict[Path, str]) -> StageCheck:
    """Check one stage's folder. `stages`: the name of each stage of the run by its resolved path.

    Raises InputError for a malformed manifest.
    """
    path = folder / MANIFEST
    if not path.exists():
        saved = len(list((folder / SAVES).glob("step-*")))
        return StageCheck({}, [f"no manifest; {saved} saves to resume from"])
    manifest = read_manifest(path)
    check = StageCheck(manifest, changed_files(manifest["outputs"], hash_tree(folder)))
    check.faults += check_flags(folder, manifest)
    for name, of in manifest["inputs"].items():
        where = current(Path(of["path"]), folder.parent)
        check.stale += check_input(name, where, of["sha256"])
        parent = next((stages[p] for p in (where.resolve(), *where.resolve().parents) if p in stages), None)
        check.parents += [parent] if parent and parent not in check.parents else []
    return check


def chain(stages: dict[str, StageCheck], name: str, below: tuple[str, ...] = ()) -> list[str]:
    """All stages that a stage was made from, the first one first, and the stage itself at the end.

    `below` is for the recursion: the stages that led here. Raises InputError where a stage was made from itself.
    """
    if name in below:
        raise InputError(f"{name}: its manifest says that it was made from itself, by way of {', '.join(below)}")
    before: list[str] = []
    for parent in stages[name].parents:
        before += [n for n in chain(stages, parent, (*below, name)) if n not in before]
    return [*before, name]


def verify(run: Path) -> dict[str, StageCheck]:
    """Check every stage of a run. Each comes after the stages that it was made from.

    Raises InputError for a folder without stages, and for manifests that are malformed or form a circle.
    """
    folders = sorted(p for p in run.glob("*") if is_stage(p))
    if not folders:
        raise InputError(f"{run}: contains no stage")
    by_path = {p.resolve(): p.name for p in folders}
    stages = {p.name: look_at(p, by_path) for p in folders}
    stages = {name: stages[name] for start in stages for name in chain(stages, start)}
    for check in stages.values():  # parents come first, so that one pass is enough
        states = {p: stages[p].state for p in check.parents}
        check.stale += [f"made from {p}, which is {state}" for p, state in states.items() if state != "good"]
    return stages


def report(run: Path, stages: dict[str, StageCheck]) -> str:
    """A table of the stages, then what each final model was made from, with the hash of each model."""
    rows = []
    for name, check in stages.items():
        seed = str(check.manifest.get("config", {}).get("seed", ""))
        files = str(len(check.manifest.get("outputs", {})))
        rows.append([name, check.state, files, seed, ", ".join(check.parents), "; ".join(check.faults + check.stale)])
    used = {p for name, check in stages.items() if name != "eval" for p in check.parents}
    header = ["stage", "state", "files", "seed", "made from", "why"]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    lines = [table(header, rows), ""]
    for name, check in stages.items():
        if name not in used and "model.safetensors" in check.manifest.get("outputs", {}):
            hashes = {
                n: stages[n].manifest.get("outputs", {}).get("model.safetensors", "") for n in chain(stages, name)
            }
            *before, last = (f"{n} {digest[:8]}".strip() for n, digest in hashes.items())
            made_from = "made from, in order (first 8 digits of each model's SHA-256): "
            lines.append(f"{run / last}: {made_from}{', '.join(before)}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Verify the run folder argv[0], print the result, and exit with 1 unless every stage is good."""
    run = Path(one_argument(argv, "mpo verify RUN"))
    stages = verify(run)
    print(report(run, stages))
    bad = [name for name, check in stages.items() if check.state != "good"]
    print(f"\n{len(stages)} stages: " + (f"not good: {', '.join(bad)}" if bad else "every file matches its manifest"))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    run_plain(main)
