"""How often a reward model prefers the chosen response of a pair, by category: a file of your own, or RewardBench.

`make score RM=folder DATA=file`. The reward model is one of this project, or any model for sequence classification that
loads (docs/models.md). The scores of every row are written as well.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo.config import ScoreConfig
from mpo.data.batches import Pair, encode
from mpo.data.formats import REWARDBENCH, read_file
from mpo.evaluation import Interval, interval_of, win_rate, wins
from mpo.model.checkpoint import load_scalar
from mpo.model.llama import ScalarModel
from mpo.model.scoring import rm_tokenizer, score_all
from mpo.runtime import signals
from mpo.runtime.entry import run
from mpo.runtime.errors import InputError, UpToDate
from mpo.runtime.files import read_json, write_json, write_text
from mpo.runtime.manifest import SAVES
from mpo.runtime.output import counts_text, percent, progress, table
from mpo.runtime.setup import setup_torch
from mpo.runtime.stage import ABOUT, Stage
from mpo.tools import memory

# RewardBench's sections and, for each of their subsets, its weight (2403.13787): how many pairs it has. Only that of
# math-prm, which has 447, is raised to the number of all pairs about code.
SECTIONS = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {"math-prm": 984} | {f"hep-{name}": 164 for name in ("cpp", "go", "java", "js", "python", "rust")},
}
WEIGHTS = (
    "RewardBench's score is the mean of its sections. A section's accuracy is the mean of its subsets, weighted by "
    "their sizes in the paper (2403.13787), except that math-prm counts as much as all six subsets about code. The "
    "paper's fifth section, older test sets with half the weight, is no part of this file."
)
TIES = "A tie counts as half. Brackets: 95 % bootstrap intervals over pairs."
NO_CATEGORY = "(no category)"
SAVE_EVERY = 60.0  # seconds


class Estimate(NamedTuple):
    """An accuracy, its bootstrap draws, and how many pairs and ties it comes from."""

    value: float
    draws: NDArray[np.float64]
    pairs: int
    ties: int

    @property
    def interval(self) -> Interval:
        """With its 95 % interval."""
        return interval_of(self.value, self.draws)


def estimate(won: NDArray[np.float64], seed: Sequence[int]) -> Estimate:
    """The accuracy on some pairs, from 1, 1/2 or 0 for each (N,)."""
    return Estimate(*win_rate(won, seed), len(won), int((won == 0.5).sum()))


def weighted(parts: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """The weighted mean of accuracies on different pairs."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    value = float(sum(share * part.value for share, part in zip(shares, parts, strict=True)))
    draws = sum((share * part.draws for share, part in zip(shares, parts, strict=True)), np.zeros(len(parts[0].draws)))
    return Estimate(value, draws, sum(part.pairs for part in parts), sum(part.ties for part in parts))


def by_category(domains: Sequence[str], won: NDArray[np.float64], seed: int, sections: bool) -> dict[str, Estimate]:
    """The accuracy in each domain and in all, by name. `sections`: the domains are RewardBench's subsets.

    Then each section comes before its subsets, and the score of RewardBench takes the place of the accuracy in all.
    Subsets that no section has come last, and count in no other line.
    """
    of = np.asarray([domain or NO_CATEGORY for domain in domains])
    single = {name: estimate(won[of == name], (seed, i)) for i, name in enumerate(dict.fromkeys(of.tolist()))}
    if not sections:
        return (single if len(single) > 1 else {}) | {"all": estimate(won, (seed, len(single)))}
    lines, whole = dict[str, Estimate](), list[Estimate]()
    for section, weights in SECTIONS.items():
        if present := [name for name in weights if name in single]:
            whole.append(weighted([single[name] for name in present], [weights[name] for name in present]))
            lines |= {section: whole[-1]} | {f"- {name}": single.pop(name) for name in present}
    lines |= {"RewardBench": weighted(whole, [1.0] * len(whole))} if whole else {}
    return lines | single


def report_of(lines: Mapping[str, Estimate], about: str, sections: bool) -> str:
    """The table as text, and how to read it."""
    rows = [[name, str(e.pairs), percent(e.interval), str(e.ties)] for name, e in lines.items()]
    notes = [about, *([WEIGHTS] if sections else []), TIES]
    return "\n".join([table(["category", "pairs", "accuracy, %", "ties"], rows), "", *notes, ""])


# --- scores ----------------------------------------------------------------------------------------


def that_fit(pairs: list[Pair], rm: ScalarModel, counts: dict[str, int]) -> list[Pair]:
    """The pairs that have room in the reward model's positions; the others are counted in `counts`.

    Raises InputError if none has.
    """
    room = rm.config.max_position_embeddings
    fit = [p for p in pairs if len(p.prompt) + max(len(p.chosen), len(p.rejected)) <= room]
    if len(fit) < len(pairs):
        counts[f"dropped: longer than the {room} tokens that the model takes"] = len(pairs) - len(fit)
    counts["kept"] = len(fit)
    if not fit:
        raise InputError(f"none of the rows fits ({counts_text(counts)}); take a reward model for longer texts")
    return fit


def earlier_scores(about: Path, most: int) -> list[list[float]]:
    """The scores that an interrupted run has saved, for at most `most` pairs; none if the file is not there or damaged.

    What they were made from has been compared with this run when its folder was opened.
    """
    try:
        scores = [[float(chosen), float(rejected)] for chosen, rejected in read_json(about)["scores"]]
    except (InputError, KeyError, TypeError, ValueError):
        return []
    return scores if len(scores) <= most else []


def score_rows(stage: Stage, rm: ScalarModel, pairs: Sequence[Pair], microbatch: int) -> Tensor:
    """(N, 2): the scores of the chosen and the rejected responses. They are saved every minute.

    Raises InputError for a score that is not finite.
    """
    about = stage.out / SAVES / "step-00000000" / ABOUT
    scores, last = earlier_scores(about, len(pairs)), time.monotonic()
    if scores:
        print(f"{stage.name}: going on after {len(scores)} pairs")
    begins = range(len(scores), len(pairs), microbatch)
    for begin in progress(begins, stage.name, len(scores) // microbatch):
        part = pairs[begin : begin + microbatch]
        of_part = torch.stack(score_all(rm, part, microbatch), 1)  # (b, 2)
        if not of_part.isfinite().all():
            worst = next(p.row for p, s in zip(part, of_part, strict=True) if not s.isfinite().all())
            raise InputError(f"{worst.where}: the reward model's score is not a finite number")
        scores += of_part.tolist()
        if time.monotonic() - last >= SAVE_EVERY:
            write_json(about, asdict(stage.recipe) | {"scores": scores})
            signals.promise(f"goes on after {len(scores)} pairs")
            last = time.monotonic()
    return torch.tensor(scores, dtype=torch.float64)


def write_scores(path: Path, pairs: Sequence[Pair], scores: Tensor) -> None:
    """Write the scores of each pair as a line of JSON."""
    lines = []
    for pair, (chosen, rejected) in zip(pairs, scores.tolist(), strict=True):
        item = {"id": pair.row.id, "domain": pair.row.domain, "chosen": chosen, "rejected": rejected}
        lines.append(json.dumps(item, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def main(config: ScoreConfig) -> None:
    """Load, score, count, write. A finished run prints its table again."""
    setup_torch(config)
    try:
        stage = Stage(config, {"data": config.data, "rm": config.rm}, config.out, config.overwrite)
    except UpToDate:
        print((Path(config.out) / "report.txt").read_text(encoding="utf-8"), end="")
        raise
    tokenizer, rm = rm_tokenizer(config.rm), load_scalar(config.rm, centred=False)  # as transformers scores
    unusable = Counter[str]()
    form, rows = read_file(Path(config.data), unusable)
    if not rows:
        raise InputError(f"{config.data}: no row makes a pair ({counts_text(unusable)})")
    pairs, counts = encode(rows, tokenizer, config.max_prompt, config.max_response)
    counts |= {f"dropped: {reason}": n for reason, n in unusable.items()}
    pairs = that_fit(pairs, rm, counts)
    print(f"{stage.name}: {form}: {counts_text(counts)}")
    scores = score_rows(stage, rm, pairs, config.microbatch)
    won = wins(scores[:, 0].numpy(), scores[:, 1].numpy())
    sections = form == REWARDBENCH
    lines = by_category([pair.row.domain for pair in pairs], won, config.seed, sections)
    report = report_of(lines, f"{config.rm} on {config.data}: {counts_text(counts)}.", sections)
    write_scores(stage.out / "scores.jsonl", pairs, scores)
    write_text(stage.out / "report.txt", report)
    print(report, end="")
    print(f"The scores of every pair: {stage.out / 'scores.jsonl'}")
    results: dict[str, Any] = {
        name: {"pairs": e.pairs, "accuracy": e.interval, "ties": e.ties} for name, e in lines.items()
    }
    stage.finish(format=form, categories=results, rows=counts)


if __name__ == "__main__":
    run(main, ScoreConfig, None, memory.show)
