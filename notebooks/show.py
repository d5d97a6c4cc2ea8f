"""What the notebooks show: tables and pictures, which a notebook and a page display in the same way; and runs to compare."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo.data.tokenizer import Tokenizer
from mpo.runtime.files import read_json
from mpo.runtime.output import table
from mpo.tools.page_svg import WIDTH, standalone, svg

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Table:
    """A table. Floats are shown with two decimals."""

    header: Sequence[str]
    rows: Iterable[Sequence[Any]]

    def _repr_markdown_(self) -> str:
        cells = [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in row] for row in self.rows]
        return table(list(self.header), cells)

    def __repr__(self) -> str:
        return self._repr_markdown_()


@dataclass(frozen=True)
class Picture:
    """A picture. `title` says in words what it shows, for those who cannot see it."""

    title: str
    draw: Callable[[Any], None]  # on matplotlib's axes
    columns: int = 1
    height: float = 220

    def _repr_svg_(self) -> str:
        return standalone(svg(self.draw, self.height, self.columns), WIDTH * self.columns, self.height)

    def __repr__(self) -> str:
        return self.title


def readable(piece: str) -> str:
    """A token as a table shows it: a dot for a space, an arrow for the end of a line."""
    return f"`{piece.replace(' ', '·').replace(chr(10), '↵').replace('|', '¦')}`"


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token of a text, as a table shows it."""
    names = {tokenizer.bos: "<s>", tokenizer.eos: "</s>"}
    return [readable(names.get(i) or tokenizer.vocabulary.decode([i])) for i in ids]


def quoted(prompt: str, *responses: tuple[str, str]) -> str:
    """A prompt and named responses, one turn on each line."""
    lines = prompt.strip().replace("\n\n", "\n").splitlines()
    return "\n".join([*lines, *(f"  {name}: {text.strip()}" for name, text in responses)])


def another_run(source: Path, name: str, *variables: str) -> Path:
    """The folder of a run that differs from `source` in these variables of make, which trains what is not there yet.

    What they do not change is shared with `source`.
    """
    run = source.parent / f"{source.name}-{name}"
    _call(["make", "pipeline", f"FROM={source}", f"RUN={run}", *variables])
    return run


def _call(words: list[str]) -> None:
    """Run a command. Raises RuntimeError with the last lines that it printed if it fails."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("\n".join([" ".join(words), *(done.stdout + done.stderr).splitlines()[-5:]]))


def results(run: Path) -> dict[str, Any]:
    """The results of each policy of a run, by name."""
    policies: dict[str, Any] = read_json(run / "eval" / "results.json")["policies"]
    return policies


def evaluate(run: Path, name: str, policies: dict[str, Path], prompts: int = 200) -> dict[str, Any]:
    """The results of eval.py for these folders of models, with its responses in the folder run/name.

    eval.py does nothing if it has been here, and no model has changed since.
    """
    out = run / name
    words = [sys.executable, "eval.py", "--out", str(out), "--data", str(run / "data"), "--rm", str(run / "rm")]
    named = ",".join(f"{k}={v}" for k, v in policies.items())
    _call([*words, "--policies", named, "--prompts", str(prompts), "--overwrite", "true"])
    evaluated: dict[str, Any] = read_json(out / "results.json")["policies"]
    return evaluated


def responses(run: Path, name: str, policy: str) -> list[dict[str, Any]]:
    """The responses of a policy in an evaluation: the text of each, its rewards, whether it ended."""
    lines = (run / name / f"responses-{policy}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def last_steps(stage: Path, *names: str, steps: int = 20) -> list[float]:
    """The mean of some metrics over the last steps of a stage."""
    lines = (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-steps:]
    entries = [json.loads(line) for line in lines]
    return [sum(entry[name] for entry in entries) / len(entries) for name in names]
