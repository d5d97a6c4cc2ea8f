"""`mpo.train`: a stage of the pipeline on rows that are in memory or in a file (docs/library.md).

It calls the `main` of the stage's script, so that checks, saves and the folder that is written are those of the stage.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

from mpo.api.models import Item, Policy, RewardModel, in_range, load, parse
from mpo.config import STAGES, Range, TokenizerConfig
from mpo.data.files import read_objects
from mpo.data.formats import OWN, read_file, recognised
from mpo.data.held_out import hold_out
from mpo.data.rows import Row, row_text
from mpo.data.typed import as_row_prompt
from mpo.model.llama import PRESETS
from mpo.runtime import lock, signals
from mpo.runtime.entry import configure
from mpo.runtime.errors import InputError, UpToDate
from mpo.runtime.files import write_text
from mpo.runtime.output import counts_text
from mpo.runtime.setup import restored

Rows = Sequence[Item] | Sequence[str] | str | Path
"""Preference pairs (for PPO also prompts alone), a file of them, or the folder of a data stage."""
Splits = dict[str, list[Row]]
TRAINED = ("sft", "rm", "dpo", "ppo")
NEEDS_TEST = ("sft", "rm")  # the stages that measure themselves on held-out rows


@overload
def train(stage: Literal["rm"], rows: Rows, *, out: str | Path, held_out: float = 0.1, **flags: Any) -> RewardModel: ...


@overload
def train(
    stage: Literal["sft", "dpo", "ppo"], rows: Rows, *, out: str | Path, held_out: float = 0.1, **flags: Any
) -> Policy: ...


def train(
    stage: Literal["sft", "rm", "dpo", "ppo"], rows: Rows, *, out: str | Path, held_out: float = 0.1, **flags: Any
) -> Policy | RewardModel:
    """Train on rows of your own, and load the result: what `mpo dpo` and its like do, called from Python.

    Args:
        stage: sft, rm (a reward model), dpo or ppo.
        rows: preference pairs as dicts, all in one format of docs/data.md, such as {"prompt", "chosen", "rejected"};
            or a file of them; or the folder of a data stage. PPO also takes prompts alone: texts, or {"prompt"}.
        out: the folder to write. Rows that are not in a file of this project's form yet are written beside it.
        held_out: the share of the rows on which sft and rm measure themselves.
        flags: the flags of the stage (`mpo dpo --help`), with Python's values: lr=1e-4, overwrite=True; None is the
            default. A model that is loaded may stand for its folder: model=policy, rm=rm. `model` is needed: a folder
            or, for sft, a preset, which gets a new tokenizer unless `tokenizer` names one. Without `ref`, the model
            itself is the reference.

    A call that was interrupted (Ctrl-C) goes on from its last save, and one that is finished only loads its result;
    with other rows or flags it is refused, until `overwrite=True` or another `out`. Code is no flag: give a loss that
    you have changed another `out`.

    Raises:
        InputError: rows or flags are wrong, as the script would say it.
        RunError: the training cannot go on, as with a loss that is not finite.
    """
    _check_call(stage, flags)
    in_range("held_out", held_out, Range(above=0, below=1))
    program, of_rows = importlib.import_module(f"mpo.stages.train_{stage}"), "prompts" if stage == "ppo" else "data"
    flags = {name: value for name, value in flags.items() if value is not None}
    given = {"out": out, of_rows: "rows", **_models(stage, Path(out), flags), **flags}
    config = configure(STAGES[f"train_{stage}"], _as_words(given), program.check)
    if config.plan:
        raise InputError(f"plan=True: only the command prints a plan: mpo {stage} --plan true ...")
    where = _Data(stage, rows, Path(out), held_out, config.seed)
    config = replace(config, **{of_rows: str(where.path)})
    with restored(), signals.borrowed():
        try:
            where.write()
            if given.get("tokenizer") == f"{out}-tokenizer":
                _train_tokenizer(where.path, f"{out}-tokenizer", config.seed, config.overwrite)
            _unless_finished(program.main, config)
        finally:
            lock.release_all()
    return load(config.out, config.device, config.precision)


def _check_call(stage: str, flags: Mapping[str, Any]) -> None:
    """Raise InputError for a call that no flags could mend."""
    if stage not in TRAINED:
        near = difflib.get_close_matches(str(stage), TRAINED, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(TRAINED)}"
        raise InputError(f"{stage!r}: not a stage that trains; {hint}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("mpo.train: runs in one process; for several: mpo launch 2 dpo --data ... (docs/processes.md)")
    if taken := [name for name in ("data", "prompts") if name in flags]:
        raise InputError(f"{taken[0]}=: the rows are the second argument of mpo.train")


def _models(stage: str, out: Path, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that follow from `model` if they are not given."""
    model = flags.get("model")
    if model is None:
        raise InputError(f"mpo.train({stage!r}, ...): needs model=, a folder or a model that is loaded")
    if stage == "sft":
        return {"tokenizer": f"{out}-tokenizer" if str(model) in PRESETS else model}
    return {"ref": model} if stage == "ppo" else {}


def _as_words(given: Mapping[str, Any]) -> list[str]:
    """Python's values as the words of a command line, which the stage's own checks read."""
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items()]


def _unless_finished(main: Any, config: Any) -> None:
    try:
        main(config)
    except UpToDate as e:
        print(e)


def _train_tokenizer(data: Path, out: str, seed: int, overwrite: bool) -> None:
    from mpo.stages import train_tokenizer

    _unless_finished(train_tokenizer.main, TokenizerConfig(data=str(data), out=out, seed=seed, overwrite=overwrite))


class _Data:
    """The rows of one call, and where its stage reads them.

    Rows that are written get a folder whose name says what is in it. So other rows never take the place of those that
    a finished stage was made from, and the stage itself notices that its input is another one.
    """

    def __init__(self, stage: str, rows: Rows, out: Path, held_out: float, seed: int):
        """Read the rows. Raises InputError for rows that cannot be used."""
        self.files: dict[str, str] = {}  # name -> content, of what is to be written
        ready = None if not isinstance(rows, str | Path) else _as_it_is(stage, Path(rows))
        if ready is not None:
            self.path = ready
            return
        pairs = _rows(stage, rows)
        splits = {"train": pairs}
        if stage in NEEDS_TEST:
            splits = hold_out("rows" if not isinstance(rows, str | Path) else str(rows), pairs, held_out, seed)
        self.files = {f"{name}.jsonl": "".join(map(row_text, part)) for name, part in splits.items()}
        digest = hashlib.sha256("\0".join(self.files.values()).encode()).hexdigest()[:8]
        self.folder = out.with_name(f"{out.name}-rows-{digest}")
        self.path = self.folder if stage in NEEDS_TEST else self.folder / "train.jsonl"

    def write(self) -> None:
        """Write the rows, unless they are there. Raises InputError for a file of this name with another content."""
        for name, text in self.files.items():
            path = self.folder / name
            if not path.exists():
                write_text(path, text)
            elif path.read_text(encoding="utf-8") != text:
                raise InputError(f"{path}: was changed after it had been written; move {self.folder} away")


def _as_it_is(stage: str, path: Path) -> Path | None:
    """What the stage reads of a path, if it can read it as it is; None for a file of another form."""
    if path.is_dir():
        if not all((path / f"{split}.jsonl").is_file() for split in ("train", "test")):
            raise InputError(f"{path}: holds no train.jsonl and test.jsonl; `mpo data` writes them, or name a file")
        return path if stage in NEEDS_TEST else path / "train.jsonl"
    if stage in NEEDS_TEST or not path.name.endswith((".jsonl", ".jsonl.gz")):
        return None
    first = next(read_objects(path), None)
    return path if first is not None and recognised(first[1]) == OWN else None


def _rows(stage: str, rows: Rows) -> list[Row]:
    """The rows as they are written."""
    if isinstance(rows, str | Path):
        if stage != "ppo":
            dropped = Counter[str]()
            _, pairs = read_file(Path(rows), dropped)
            if dropped:
                print(f"{rows}: {counts_text({f'dropped: {reason}': n for reason, n in dropped.items()})}")
            return pairs
        rows = [item for _, item in read_objects(Path(rows))]
    if stage == "ppo" and rows and all(_is_prompt(row) for row in rows):
        texts = [row if isinstance(row, str) else str(row["prompt"]) for row in rows]
        return [Row(f"prompt-{i}", as_row_prompt("dialogue", text), "", "") for i, text in enumerate(texts)]
    return parse(rows)  # type: ignore[arg-type]  # refuses what is no dict


def _is_prompt(row: object) -> bool:
    """Whether it is a prompt alone."""
    if isinstance(row, Mapping):
        return isinstance(row.get("prompt"), str) and not {"chosen", "rejected"} & row.keys()
    return isinstance(row, str)
