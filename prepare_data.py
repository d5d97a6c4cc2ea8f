"""Stage 1: make or read preference data, and write it as rows: one split for training, one for testing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from mpo.config import DataConfig
from mpo.data import hh, tldr
from mpo.data.rows import Row, read_rows, write_rows
from mpo.runtime.entry import run
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_text
from mpo.runtime.output import counts_text
from mpo.runtime.stage import Stage
from mpo.world.build import build, flip_labels, probe_sheet


def read(config: DataConfig, dropped: Counter[str]) -> dict[str, list[Row]]:
    """The rows of each split, from a folder in the task's official layout or from a single row file.

    The last rows of a single file, a share of --held_out, become the test split. Raises InputError for a path that
    cannot be read, or a file with too few rows.
    """
    path = Path(config.data)
    if path.is_dir():
        reader = hh.read_folder if config.task == "hh" else tldr.read_folder
        return {split: reader(path, split, dropped) for split in ("train", "test")}
    rows = read_rows(path)
    if (tests := round(len(rows) * config.held_out)) < 1:
        raise InputError(f"{path}: {len(rows)} rows are too few to hold any out; raise --held_out")
    return {"train": rows[:-tests], "test": rows[-tests:]}


def without_overlap(splits: dict[str, list[Row]], dropped: Counter[str]) -> dict[str, list[Row]]:
    """Drop the training rows whose prompt is in the test split, too."""
    held_out = {row.prompt for row in splits["test"]}
    train = [row for row in splits["train"] if row.prompt not in held_out]
    dropped["prompt is in the test split"] += len(splits["train"]) - len(train)
    return {"train": train, "test": splits["test"]}


def check(config: DataConfig) -> None:
    """Refuse flags that contradict each other."""
    if config.noise and config.data != "builtin":
        raise InputError(f"--noise {config.noise}: needs the built-in world; leave out --data {config.data}")


def main(config: DataConfig) -> None:
    """Make the rows of the built-in world or read those of --data; remove overlap between the splits; write."""
    builtin = config.data == "builtin"
    stage = Stage(config, {} if builtin else {"data": config.data}, config.out, config.overwrite)
    dropped: Counter[str] = Counter()
    if builtin:
        splits = build(config.task, config.seed, config.train, config.test)
        splits["train"] = flip_labels(config.task, config.seed, splits["train"], config.noise)
        prompts = max(2, min(24, config.test // 40))  # for each kind and mistake: fewer with a small test split
        sheet = "".join(json.dumps(item) + "\n" for item in probe_sheet(config.task, config.seed, prompts))
        write_text(stage.out / "probe.jsonl", sheet)
    else:
        splits = without_overlap(read(config, dropped), dropped)
        for name, most in (("train", config.train), ("test", config.test)):
            kept = splits[name][: most or None]
            dropped[f"beyond --{name}"] += len(splits[name]) - len(kept)
            splits[name] = kept
    for name, rows in splits.items():
        write_rows(stage.out / f"{name}.jsonl", rows)
    counts = {name: len(rows) for name, rows in splits.items()}
    domains = {name: dict(Counter(row.domain for row in rows)) for name, rows in splits.items()}
    source = f"the built-in world '{config.task}'" if builtin else config.data
    left_out = counts_text({f"dropped: {reason}": n for reason, n in dropped.items()})
    pairs = f"{counts['train']} training and {counts['test']} test pairs from {source}"
    print(f"data: {pairs}; {left_out}" if left_out else f"data: {pairs}")
    stage.finish(source=config.data, task=config.task, counts=counts, domains=domains, dropped=dict(+dropped))


if __name__ == "__main__":
    run(main, DataConfig, check)
