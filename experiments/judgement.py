"""Verdicts by the rules of docs/protocol.md: worlds of results, contrasts between methods, claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.grid import read_results
from experiments.statistics import Contrast, Values, at_kl, column, contrast, difference, path
from experiments.study import FIRST_STAGE, GRIDS, Study

Row = Mapping[str, Any]
Points = list[tuple[float, float]]
Pair = tuple[str, str]

CLAIMS = {
    1: "MPO beats its parts",
    2: "DPO wants easy pairs",
    3: "PPO wants the DPO model as its reference, and more data",
    4: "Easy then hard beats hard then easy beats mixed",
    5: "MPO is less sensitive to label noise",
    6: "MPO over-optimises less",
}
JUDGED: dict[int, list[Pair]] = {
    1: [("mpo", "dpo-all-long"), ("mpo", "ppo-long")],
    2: [("dpo", "dpo-all"), ("dpo-all", "dpo-hard"), ("dpo", "dpo-random"), ("dpo", "dpo-inverted")],
    3: [("mpo", "mpo-sft-ref"), ("mpo-all", "ppo-long"), ("ppo", "ppo-some"), ("ppo-some", "ppo-few")],
    4: [("mpo", "reversed"), ("reversed", "mixed"), ("mpo", "mixed")],
}
SHOWN: dict[int, list[Pair]] = {
    1: [("mpo", "dpo-ppo"), ("mpo", "dpo-all"), ("mpo", "ppo")],
    2: [("dpo-long", "dpo-all-long")],
    3: [("mpo", "ppo-hard"), ("mpo-all", "ppo"), ("mpo", "mpo-all")],
    4: [("mpo", "ppo-dpo")],
}


@dataclass(frozen=True)
class World:
    """The results of one world: method -> its rows, a row a seed."""

    task: str
    main: dict[str, list[Row]]
    noise: dict[str, dict[str, list[Row]]]  # noise -> method -> rows; "0" is the main grid
    gamma: dict[str, dict[str, list[Row]]]
    pushed: dict[str, list[Row]]
    price: dict[str, list[Row]]  # mpo at the most noise, at a higher price of KL

    @property
    def noisiest(self) -> dict[str, list[Row]]:
        """The rows at the most noise, by method."""
        return self.noise[max(self.noise, key=float)]

    def golds(self, method: str) -> Values:
        """Gold by seed and prompt."""
        return column(self.main.get(method, []), "golds")

    def path(self, method: str, seed: int, name: str = "gold", pushed: bool = False) -> Points:
        """(KL, gold) from SFT through the first stage to the policy."""
        rows = self.pushed if pushed else self.main
        row = next(r for r in rows[method] if r["seed"] == seed)
        if first := FIRST_STAGE.get(method):
            before = self.path(first, seed, name)
        else:
            before = [(0.0, next(r[name] for r in self.main["sft"] if r["seed"] == seed))]
        return path(row, before, name)

    def reward_models(self) -> dict[str, dict[int, Row]]:
        """noise -> seed -> what the reward model knew (experiments/grid.py), where a row says so.

        Without noise the rows of the gamma sweep do, whose reward models are those of the same seeds.
        """
        grids = {"0": list(self.gamma.values())} | {n: [grid] for n, grid in self.noise.items() if n != "0"}
        rows = {n: [r for grid in found for of in grid.values() for r in of] for n, found in grids.items()}
        return {n: {r["seed"]: r["rm"] for r in found if "rm" in r} for n, found in rows.items()}

    def seeds(self, *methods: str, pushed: bool = False) -> list[int]:
        """Seeds on which all these methods, and what they start from, are finished."""
        needed = {"sft", *(FIRST_STAGE[m] for m in methods if m in FIRST_STAGE)} | (set() if pushed else set(methods))
        found = [{r["seed"] for r in self.main.get(m, [])} for m in needed]
        found += [{r["seed"] for r in self.pushed.get(m, [])} for m in methods if pushed]
        return sorted(set.intersection(*found))


def by_method(rows: Sequence[Row], task: str, variant: str = "") -> dict[str, list[Row]]:
    """The rows of one world and variant, by method."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["task"] == task and row["variant"] == variant:
            found.setdefault(row["policy"], []).append(row)
    return found


def read_world(study: Study, task: str) -> World:
    """Everything the result files hold of one world."""
    rows = {grid: read_results(study.results / f"{grid}.jsonl") for grid in GRIDS}
    main = by_method(rows["main"], task)
    noise = {"0": main} | {f"{n}": by_method(rows["noise"], task, f"{n}") for n in study.noise}
    gamma = {"q0.5": main} | {g: by_method(rows["gamma"], task, g) for g in study.gammas}
    pushed, price = (by_method(rows[grid], task) for grid in ("pushed", "price"))
    return World(task, main, noise, dict(sorted(gamma.items())), pushed, price)


# --- contrasts ------------------------------------------------------------------------------------


def gold_contrast(world: World, pair: Pair) -> Contrast | None:
    """The first method's gold less the second's; None before both have a common seed."""
    found = difference(world.golds(pair[0]), world.golds(pair[1]))
    return contrast(found) if found else None


def equal_kl_contrast(world: World, pair: Pair) -> Contrast | None:
    """The same at the smaller of the two final KLs, by seed."""
    found = {}
    for seed in world.seeds(*pair):
        ours, theirs = (world.path(m, seed) for m in pair)
        kl = min(ours[-1][0], theirs[-1][0])
        found[seed] = np.asarray([at_kl(ours, kl) - at_kl(theirs, kl)])
    return contrast(found) if found else None


def noise_contrast(world: World, rival: str, noise: str) -> Contrast | None:
    """How much more gold the rival loses to label noise than mpo does."""
    noisy = world.noise.get(noise, {})
    losses = [
        difference(world.golds(m), column(noisy.get(m, []), "golds")) for m in (rival, "mpo")
    ]  # what each loses, prompt by prompt
    found = difference(*losses)
    return contrast(found) if found else None


def fall(points: Points) -> float:
    """How far gold ends below its highest point on a path."""
    return max(gold for _, gold in points) - points[-1][1]


def fall_contrast(world: World, rival: str) -> Contrast | None:
    """How much further the rival falls from its best than mpo does, when both are pushed."""
    found = {
        seed: np.asarray([fall(world.path(rival, seed, pushed=True)) - fall(world.path("mpo", seed, pushed=True))])
        for seed in world.seeds(rival, "mpo", pushed=True)
    }
    return contrast(found) if found else None


def judged(world: World, study: Study, claim: int) -> dict[str, Contrast | None]:
    """The contrasts that a claim rests on, by name."""
    if claim == 5:
        worst = f"{max(study.noise)}"
        return {
            f"loss of {m} - loss of mpo": noise_contrast(world, m, worst)
            for m in ("dpo-all-long", "ppo-long")
            if m in study.noise_methods
        }
    if claim == 6:
        return {"fall of ppo - fall of mpo": fall_contrast(world, "ppo")}
    found = {" - ".join(pair): gold_contrast(world, pair) for pair in JUDGED[claim]}
    if claim == 1:
        found |= {" - ".join(pair) + " at equal KL": equal_kl_contrast(world, pair) for pair in JUDGED[claim]}
    return found


def verdict(found: Sequence[Mapping[str, Contrast | None]], seeds: int) -> str:
    """Over the worlds: holds, fails, mixed or open (docs/protocol.md); no verdict while one of `seeds` is missing."""
    contrasts = [c for world in found for c in world.values()]
    if not any(contrasts):
        return "not run"
    if any(c is None or len(c.per_seed) < seeds for c in contrasts):
        return "unfinished"
    verdicts = {name: [world[name].verdict for world in found] for name in found[0]}  # type: ignore[union-attr]
    flat = [v for each in verdicts.values() for v in each]
    if all(v == "holds" for v in flat):
        return "holds"
    if any(all(v == "fails" for v in each) for each in verdicts.values()):
        return "fails"
    return "open" if set(flat) == {"open"} else "mixed"


def collapsed(row: Row, sft: Sequence[Row]) -> str:
    """Why a policy counts as collapsed, "" where it does not."""
    start = next((r["gold"] for r in sft if r["seed"] == row["seed"]), None)
    why = [f"gold {row['gold']:.2f} below SFT's {start:.2f}"] if start is not None and row["gold"] < start else []
    return "; ".join(why + ([f"EOS {100 * row['eos']:.0f} %"] if row["eos"] < 0.8 else []))
