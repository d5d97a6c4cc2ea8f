"""Check the flags of several stages before the first one runs: python -m mpo.tools.check < FILE

Each line of the input is a command as it will run later, such as `train_dpo.py --data ... --loss ipo`. The first
mistake ends the program with the line that the stage itself would print. So does a stage that is finished with other
flags, before any stage that it was made from is touched.
"""

from __future__ import annotations

import importlib
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo import config
from mpo.runtime import trackers
from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.flags import parse
from mpo.runtime.manifest import MANIFEST, Recipe, read_manifest, recorded
from mpo.runtime.setup import setup_torch
from mpo.runtime.stage import would_discard

CONFIGS = {f"{script}.py": flags for script, flags in config.STAGES.items()}
"""A stage's script -> its config. Only these scripts are imported."""


def other_flags(values: Any) -> list[str]:
    """How the flags of the finished stage in --out differ from these; nothing where there is none of this run's own."""
    out = Path(values.out)
    if values.overwrite or out.is_symlink() or not (out / MANIFEST).is_file():
        return []
    manifest = read_manifest(out / MANIFEST)
    made = recorded(manifest)
    return made.differences(Recipe(Recipe.of(asdict(values), manifest["inputs"]).flags, made.inputs))


def main(argv: list[str]) -> None:
    """Check the commands on standard input. Raises InputError for the first mistake."""
    otherwise: list[tuple[str, str, list[str]]] = []  # script, folder, differences
    for line in filter(str.strip, sys.stdin):
        try:
            script, *flags = shlex.split(line)
        except ValueError as e:
            sys.argv[0] = line.split()[0]
            raise InputError(f"{line.strip()}: cannot be read ({e})") from None
        if script not in CONFIGS:
            raise InputError(f"{script}: not one of {', '.join(CONFIGS)}")
        sys.argv[0] = script  # so that an error names the stage
        values: Any = parse(CONFIGS[script], flags)
        setup_torch(values)  # refuses a device or kernels that are not here
        if check := getattr(importlib.import_module(Path(script).stem), "check", None):
            check(values)
        trackers.check(getattr(values, "log", "none"))
        if differences := other_flags(values):
            otherwise.append((script, values.out, differences))
    if otherwise:
        (sys.argv[0], out, differences), *others = otherwise
        more = f" (and so do {', '.join(Path(name).name for _, name, _ in others)})" if others else ""
        raise InputError(would_discard(out, f"a finished stage{more}", differences))


if __name__ == "__main__":
    run_plain(main)
