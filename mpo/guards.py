"""What stops a stage before it ruins its weights, and what it warns of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpo import parallel
from mpo.errors import RunError
from mpo.files import write_json
from mpo.stage import Stage


class NotFinite(Exception):
    """A number that is NaN or infinite, and the rows of the batch that it came from."""

    def __init__(self, what: str, rows: Sequence[int]):
        super().__init__(what)
        self.what, self.rows = what, list(rows)


def not_finite(values: Tensor, rows: Sequence[int]) -> list[int]:
    """Which `rows`, whose values (b, ...) these are, have one that is not finite."""
    good = torch.isfinite(values.detach()).reshape(len(values), -1).all(1)
    return [rows[i] for i in (~good).nonzero().flatten().tolist()]


def agree_finite(what: str, bad: Sequence[int]) -> None:
    """Errors: NotFinite with all rows that any process has found bad, in every process, so that none waits for it."""
    if parallel.most([len(bad)])[0]:
        raise NotFinite(what, sorted({row for rows in parallel.every(list(bad)) for row in rows}))


def failure(
    stage: Stage, step: int, error: NotFinite, rows: Sequence[Mapping[str, Any]], save: Path | None
) -> RunError:
    """Write failure.json (the step, what was wrong, the rows as they were computed) and say so in one line.

    `rows`: {"id", token ids, ...} of the batch; `save`: the weights before the step, from which the same command
    makes it again.
    """
    blamed = [rows[i]["id"] for i in error.rows]
    about = {"step": step, "what": error.what, "rows_to_blame": blamed, "save": str(save or ""), "batch": list(rows)}
    write_json(stage.out / "failure.json", about)
    shown = ", ".join(map(str, blamed[:3])) + (f" and {len(blamed) - 3} more" if len(blamed) > 3 else "")
    rows_of = f"rows {shown}" if blamed else "of the whole batch"
    if save:
        kept = f"no step was taken. {save} has the weights before it, so that the same command shows it again"
    else:
        kept = "it was not saved, and the same command goes on from the last save"
    return RunError(
        f"{stage.name}: step {step}: {error.what} is not finite ({rows_of}); {kept}; {stage.out / 'failure.json'} has "
        "the batch. Lower --lr, or look at these rows"
    )


def collapses(now: Mapping[str, float], first: Mapping[str, float]) -> dict[str, str]:
    """Signs that PPO is running away, by name, each with its usual cause; `first`: the metrics of the first rollout."""
    found = {}
    if now["kl_exact"] > 10 + first["kl_exact"]:
        found["kl"] = (
            f"{now['kl_exact']:.1f} nats a response from the reference: the policy is exploiting the reward model; "
            "raise --kl_coef, lower --lr, or take fewer --iterations"
        )
    if now["eos_rate"] < 0.5 * first["eos_rate"] and first["eos_rate"] > 0.1:  # few that end say little
        found["eos_rate"] = (
            f"{now['eos_rate']:.0%} of the responses end, {first['eos_rate']:.0%} did at first: unfinished ones score "
            "too well; raise --missing_eos_penalty or --max_new"
        )
    if now["length"] < first["length"] / 3 or now["length"] > 3 * first["length"]:
        found["length"] = (
            f"{now['length']:.0f} tokens a response, {first['length']:.0f} at first: the reward model likes the length "
            "itself (score_length_correlation); raise --kl_coef or look at the reward model's training pairs"
        )
    if now["entropy"] < 0.1 * first["entropy"]:
        found["entropy"] = (
            f"entropy {now['entropy']:.2f} nats a token, {first['entropy']:.2f} at first: the policy says the same "
            "thing again and again; lower --lr or --epochs"
        )
    return found
