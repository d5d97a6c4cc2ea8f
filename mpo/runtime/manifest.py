"""What a finished stage records about itself in manifest.json, and what its result was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, sha256

MANIFEST, FLAGS, METRICS = "manifest.json", "stage.json", "metrics.jsonl"
HUB = "hub.json"  # in a folder that was downloaded from a hub: which repository, and which commit of it (tools/hub.py)
SAVES, LOCK, TRACKER = "saves", ".lock", ".tracker"  # only in an unfinished stage: saves.py, lock.py, trackers.py
# Flags that change a stage's result by rounding at most.
ROUNDING_ONLY = {"out", "overwrite", "threads", "save_every", "plan", "microbatch"}
ROUNDING_ONLY |= {"shard", "recompute", "compile", "device", "deterministic", "log"}
Hashes = dict[str, str]
"""File -> its SHA-256."""


def hash_tree(path: Path) -> Hashes:
    """SHA-256 of a file, or of every file in a folder except the logs and the manifest itself."""
    if path.is_file():
        return {path.name: sha256(path)}
    files = (p for p in path.rglob("*") if p.is_file() and p.name not in (MANIFEST, METRICS, LOCK, TRACKER))
    names = sorted((p.relative_to(path), p) for p in files)
    return {str(name): sha256(p) for name, p in names if name.parts[0] != SAVES and not p.name.endswith(".partial")}


@dataclass(frozen=True)
class Recipe:
    """What the result of a stage depends on. Two stages with equal recipes differ by rounding at most."""

    flags: dict[str, Any]  # without those that change only rounding, and those that name an input
    inputs: dict[str, Hashes]  # by the flag that names the input

    @staticmethod
    def of(flags: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str]]) -> Recipe:
        """The recipe of a stage with these flags, and inputs with these hashes."""
        kept = {k: v for k, v in flags.items() if k not in ROUNDING_ONLY | inputs.keys()}
        if "policies" in kept:  # name=folder,...: each is an input under its name; their order matters, the folders not
            kept["policies"] = ",".join(item.partition("=")[0] for item in str(kept["policies"]).split(","))
        return Recipe(kept, {k: dict(v) for k, v in inputs.items()})

    def differences(self, now: Recipe) -> list[str]:
        """How the recipe `now` differs from this one, as phrases. Flags that only one of the two has don't count."""
        both = [name for name in self.flags if name in now.flags]
        flags = [(name, self.flags[name], now.flags[name]) for name in both if self.flags[name] != now.flags[name]]
        phrases = [f"--{name} was {_shown(old)} and is now {_shown(new)}" for name, old, new in flags]
        for name in dict.fromkeys([*self.inputs, *now.inputs]):
            old, new = self.inputs.get(name), now.inputs.get(name)
            if old is None or new is None:
                phrases.append(f"its input {name} is {'new' if old is None else 'left out'}")
            elif old != new:
                changed = sorted(f for f in old.keys() | new.keys() if old.get(f) != new.get(f))
                more = f" and {len(changed) - 1} more files" if len(changed) > 1 else ""
                phrases.append(f"the content of its input {name} has changed ({changed[0]}{more})")
        return phrases


def _shown(value: Any) -> str:
    return str(value) if value != "" else "not given"


def is_stage(folder: Path) -> bool:
    """Whether a stage has written this folder. Other folders may have a manifest.json that is not ours."""
    return (folder / FLAGS).is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """A stage's manifest. Raises InputError where the file is not one."""
    content = read_json(path)
    needed = {"config": dict, "inputs": dict, "outputs": dict, "results": dict}
    good = isinstance(content, dict) and all(isinstance(content.get(k), kind) for k, kind in needed.items())
    if good:
        of = list(content["inputs"].values())
        good = all(isinstance(x, dict) and isinstance(x.get("sha256"), dict) for x in of)
        good = good and all(isinstance(x.get("path"), str) and "\0" not in x["path"] for x in of)
    if not good:
        raise InputError(f"{path}: not a stage's manifest; move {path.parent} away and run its stage again")
    result: dict[str, Any] = content
    return result


def recorded(manifest: Mapping[str, Any]) -> Recipe:
    """The recipe of a finished stage."""
    return Recipe.of(manifest["config"], {name: of["sha256"] for name, of in manifest["inputs"].items()})


def changed_files(outputs: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files of a finished stage that are missing or do not have the hash in its manifest, as phrases."""
    changed = [f"{name} has a different hash" for name in outputs.keys() & now.keys() if outputs[name] != now[name]]
    return sorted(changed + [f"{name} is missing" for name in outputs.keys() - now.keys()])


def check_manifest(path: Path, hashes: Mapping[str, str]) -> None:
    """Check an input (a stage's folder or a file in it) against the stage's manifest. Other inputs are accepted.

    Raises InputError naming the first file that differs.
    """
    folder = path if path.is_dir() else path.parent
    if not is_stage(folder) or not (folder / MANIFEST).is_file():
        return
    outputs = read_manifest(folder / MANIFEST)["outputs"]
    if not path.is_dir():
        outputs = {name: digest for name, digest in outputs.items() if name in hashes}
    if changed := changed_files(outputs, hashes):
        raise InputError(
            f"{folder}: {changed[0]}: it was changed after its stage had finished; restore the file, or run the stage "
            "again with REDO=1 (without make: --overwrite true)"
        )
