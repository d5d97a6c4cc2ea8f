"""Stage 1: make or read preference data, and write it as rows: one split for training, one for testing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from mpo.config import DataConfig
from mpo.data import hh, published, tldr
from mpo.data.dialogue import usual_form
from mpo.data.formats import read_file
from mpo.data.held_out import hold_out, sample, without_overlap
from mpo.data.rows import Row, write_rows
from mpo.runtime.entry import run
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_text
from mpo.runtime.output import counts_text
from mpo.runtime.stage import Stage
from mpo.tools import hub
from mpo.world.build import build, flip_labels, probe_sheet

Splits = dict[str, list[Row]]
LAYOUTS = {"hh": ("HH pairs", hh.read_folder), "tldr": ("TL;DR comparisons", tldr.read_folder)}


def make(config: DataConfig, out: Path) -> Splits:
    """The rows of the built-in world. Also writes the probe sheet."""
    splits = build(config.task, config.seed, config.train, config.test)
    splits["train"] = flip_labels(config.task, config.seed, splits["train"], config.noise)
    prompts = max(2, min(24, config.test // 40))  # for each kind and mistake: fewer with a small test split
    sheet = "".join(json.dumps(item) + "\n" for item in probe_sheet(config.task, config.seed, prompts))
    write_text(out / "probe.jsonl", sheet)
    return splits


def read(config: DataConfig, dropped: Counter[str]) -> tuple[str, Splits]:
    """The format of --data, and the rows of each split; `dropped` counts what was left out, by reason.

    A folder in the task's official layout has splits of its own, and so may another folder of data files. A file is
    divided, unless --test_data names the test rows.

    Raises InputError for what cannot be read, or where a split would be empty.
    """
    path, splits = Path(config.data), Splits()
    official, reader = LAYOUTS[config.task]
    if path.is_dir() and not published.is_meant(path, config.task):
        wanted = ("train",) if config.test_data else ("train", "test")
        name, splits = official, {split: reader(path, split, dropped) for split in wanted}
    elif path.is_dir():
        name, splits = published.read_folder(path, dropped)
    else:
        name, splits["train"] = read_file(path, dropped)
    refuse_empty(config.data, name, splits, dropped)
    if config.test_data:
        _, splits["test"] = read_file(Path(config.test_data), dropped)
    elif "test" not in splits:
        splits = hold_out(f"{path}, read as {name}", splits["train"], config.held_out, config.seed)
    splits = without_overlap(splits, dropped)
    refuse_empty(config.data, name, splits, dropped)
    for split, most in (("train", config.train), ("test", config.test)):
        kept = sample(splits[split], most, config.seed, f"rows of {split}")
        dropped[f"beyond --{split}"] += len(splits[split]) - len(kept)
        splits[split] = kept
    return name, splits


def refuse_empty(source: str, name: str, splits: Mapping[str, Sequence[Row]], dropped: Counter[str]) -> None:
    """Raise InputError where a split has no rows."""
    for split, rows in splits.items():
        if not rows:
            reasons = counts_text({f"dropped: {reason}": n for reason, n in dropped.items()})
            raise InputError(f"{source}, read as {name}: no row is left for the {split} split; {reasons}")


def check(config: DataConfig) -> None:
    """Refuse flags that contradict each other."""
    if config.noise and config.data != "builtin":
        raise InputError(f"--noise {config.noise}: needs the built-in world; leave out --data {config.data}")
    if config.data == "builtin" and not (config.train and config.test):
        raise InputError("--train, --test: the built-in world has no end, so that 0 (all) is not possible")
    if config.test_data and config.data in ("builtin", config.test_data):
        raise InputError(f"--test_data {config.test_data}: needs --data with other rows, to train on")
    if config.data != "builtin" and not Path(config.data).exists():
        raise InputError(f"--data {config.data}: no such file or folder{hub.advice('dataset', config.data)}")


def main(config: DataConfig) -> None:
    """Make the rows of the built-in world or read those of --data; write them, and what form their prompts have."""
    builtin, dropped = config.data == "builtin", Counter[str]()
    inputs = {} if builtin else {"data": config.data} | ({"test_data": config.test_data} if config.test_data else {})
    stage = Stage(config, inputs, config.out, config.overwrite)
    name, splits = ("the built-in world", make(config, stage.out)) if builtin else read(config, dropped)
    for split, rows in splits.items():
        write_rows(stage.out / f"{split}.jsonl", rows)
    counts = {split: len(rows) for split, rows in splits.items()}
    domains = {split: dict(Counter(row.domain for row in rows)) for split, rows in splits.items()}
    form = usual_form(row.prompt for row in chain(*splits.values()))
    source = f"the built-in world '{config.task}'" if builtin else f"{config.data}, read as {name}"
    left_out = counts_text({f"dropped: {reason}": n for reason, n in dropped.items()})
    pairs = f"{counts['train']} training and {counts['test']} test pairs from {source}"
    print(f"data: {pairs}; {left_out}" if left_out else f"data: {pairs}")
    about = {"format": name, "prompt_form": form, "counts": counts, "domains": domains, "dropped": dict(+dropped)}
    stage.finish(source=config.data, task=config.task, **about)


if __name__ == "__main__":
    run(main, DataConfig, check)
