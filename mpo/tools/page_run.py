"""What the page of a run is made from: its stages, finished or not, their metrics, scores and responses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpo.config import STAGES
from mpo.data.rows import read_jsonl
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json
from mpo.runtime.manifest import FLAGS, MANIFEST, METRICS, is_stage, read_manifest
from mpo.tools.verify import current

Metrics = Sequence[Mapping[str, float]]
"""The metrics of each step."""

KINDS = tuple(STAGES)
INPUT_FLAGS = ("data", "tokenizer", "model", "rm", "split", "prompts", "ref")  # flags that name what a stage reads


@dataclass(frozen=True)
class StageFiles:
    """One stage of a run."""

    name: str
    folder: Path
    kind: str  # the script that writes it, one of KINDS; "" if that cannot be told
    manifest: dict[str, Any]  # empty for an unfinished stage
    flags: dict[str, Any]
    metrics: Metrics
    used: dict[str, dict[str, str]] = field(default_factory=dict)  # stage of this run -> file -> hash that was read

    @property
    def parents(self) -> list[str]:
        """The stages of this run that it reads."""
        return list(self.used)

    @property
    def results(self) -> dict[str, Any]:
        """Its final numbers; empty for an unfinished stage."""
        return dict(self.manifest.get("results", {}))

    @property
    def model_hash(self) -> str:
        """The SHA-256 of its model, or of its largest result; "" if it has none."""
        outputs = self.manifest.get("outputs", {})
        names = ("model.safetensors", "adapter_model.safetensors", "scores.jsonl", "tokenizer.model", "train.jsonl")
        return next((str(outputs[n]) for n in (*names, "results.json") if n in outputs), "")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl. A line that a killed stage left incomplete is skipped; null becomes NaN."""
    steps = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            values = json.loads(line)
            steps.append({str(k): math.nan if v is None else float(v) for k, v in values.items()})
        except (ValueError, TypeError, AttributeError, RecursionError):
            continue
    return steps


def kind_of(manifest: Mapping[str, Any], flags: Mapping[str, Any]) -> str:
    """Which script writes a stage: named in its manifest or, while it is unfinished, told by its flags."""
    if manifest.get("stage") in KINDS:
        return str(manifest["stage"])
    signs = {"prompts": "train_ppo", "beta": "train_dpo", "centring": "train_rm", "tokenizer": "train_sft"}
    signs = {"policies": "eval", **signs, "by": "split_data", "vocab": "train_tokenizer", "task": "prepare_data"}
    return next((kind for flag, kind in signs.items() if flag in flags), "")


def _inputs(manifest: Mapping[str, Any], flags: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """The paths that a stage reads, each with the hashes of its files; an unfinished stage has no hashes."""
    if manifest:
        return [(str(of["path"]), dict(of["sha256"])) for of in manifest["inputs"].values()]
    named = [path for name in INPUT_FLAGS for path in str(flags.get(name, "")).split(",")]
    named += [item.partition("=")[2] for item in str(flags.get("policies", "")).split(",")]
    return [(path, {}) for path in named if path and "\0" not in path]


def _read_stage(folder: Path, names: Mapping[Path, str]) -> StageFiles:
    """Read one stage. `names`: each stage of the run by its resolved path."""
    path = folder / MANIFEST
    manifest = read_manifest(path) if path.exists() else {}
    flags = read_json(folder / FLAGS)
    flags = flags if isinstance(flags, dict) else {}
    used: dict[str, dict[str, str]] = {}
    for text, hashes in _inputs(manifest, flags):
        where = current(Path(text), folder.parent).resolve()
        parent = next((p for p in (where, *where.parents) if p in names), None)
        if parent and names[parent] != folder.name:
            inside = where.relative_to(parent) if where.is_dir() else where.relative_to(parent).parent
            used.setdefault(names[parent], {}).update({str(inside / name): sha for name, sha in hashes.items()})
    return StageFiles(
        folder.name, folder, kind_of(manifest, flags), manifest, flags, read_metrics(folder / METRICS), used
    )


def read_run(run: Path) -> list[StageFiles]:
    """Every stage of a run, each after those that it reads. Raises InputError for a folder without stages."""
    folders = sorted(p for p in run.glob("*") if is_stage(p))
    if not folders:
        raise InputError(f"{run}: contains no stage; name a run folder, such as runs/hh")
    names = {p.resolve(): p.name for p in folders}
    rank = {kind: i for i, kind in enumerate(KINDS)}
    waiting = sorted((_read_stage(p, names) for p in folders), key=lambda s: (rank.get(s.kind, len(KINDS)), s.name))
    ordered: list[StageFiles] = []
    while waiting:
        done = {s.name for s in ordered}
        following = next((s for s in waiting if done.issuperset(s.parents)), waiting[0])  # [0]: a malformed circle
        ordered.append(following)
        waiting.remove(following)
    return ordered


def of_kind(stages: Sequence[StageFiles], kind: str) -> list[StageFiles]:
    """The stages that one script writes."""
    return [s for s in stages if s.kind == kind]


def finished_eval(stages: Sequence[StageFiles]) -> StageFiles | None:
    """The finished evaluation of a run, if it has one."""
    return next((s for s in of_kind(stages, "eval") if s.manifest and (s.folder / "results.json").is_file()), None)


def warnings_of(stages: Sequence[StageFiles]) -> list[str]:
    """What a reader should know before believing the numbers: signs of collapse, unfinished and outdated stages."""
    lines = []
    by_name = {s.name: s for s in stages}
    for stage in stages:
        lines += [f"{stage.name}: {text}" for text in stage.results.get("warnings", {}).values()]
        if not stage.manifest:
            steps = f" after {len(stage.metrics)} steps" if stage.metrics else ""
            lines.append(f"{stage.name}: unfinished{steps}; the same command goes on with it")
        for name, files in stage.used.items():
            outputs = by_name[name].manifest.get("outputs", {})
            if any(outputs.get(file) != digest for file, digest in files.items()):
                lines.append(
                    f"{stage.name}: made from another {name} than the one that is here (make verify says more)"
                )
    return lines


def read_scores(split: StageFiles) -> dict[str, list[float]]:
    """The reward gap of every training pair, by part: contradicted, hard, easy; empty where a stage kept no scores."""
    path = split.folder / "scores.jsonl"
    if not path.is_file():
        return {}
    parts: dict[str, list[float]] = {"contradicted": [], "hard": [], "easy": []}
    for where, item in read_jsonl(path):
        try:
            parts.setdefault(str(item["part"]), []).append(float(item["chosen"]) - float(item["rejected"]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{where}: not the scores of a pair; run the split again with REDO=1") from None
    return parts


def read_responses(evaluation: StageFiles, policies: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The responses of every policy, in the same order of prompts. Policies whose file is missing are left out."""
    files = {name: evaluation.folder / f"responses-{name}.jsonl" for name in policies}
    rows = {name: [item for _, item in read_jsonl(path)] for name, path in files.items() if path.is_file()}
    count = min((len(answered) for answered in rows.values()), default=0)
    return {name: answered[:count] for name, answered in rows.items()}
