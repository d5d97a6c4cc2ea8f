"""Verdicts by the rules of docs/protocol.md: the results of a world, contrasts between methods, claims."""

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
    2: "DPO works best on easy pairs",
    3: "PPO gains from the DPO model as its reference, and from more data",
    4: "Easy then hard beats hard then easy, which beats a random split",
    5: "MPO is less sensitive to label noise",
    6: "MPO over-optimises less",
}
# The pairs of methods whose contrasts decide a claim's verdict, and those that are shown for comparison only.
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
    """The results of one world. Where a field maps a method to rows, there is one row for each seed."""

    task: str
    main: dict[str, list[Row]]
    noise: dict[str, dict[str, list[Row]]]  # share of labels flipped -> method -> rows; "0" is the main grid
    gamma: dict[str, dict[str, list[Row]]]  # threshold of the split -> method -> rows; "q0.5" is the main grid
    pushed: dict[str, list[Row]]
    price: dict[str, list[Row]]  # mpo at the highest noise, with a larger KL coefficient

    @property
    def noisiest(self) -> dict[str, list[Row]]:
        """The rows at the highest noise, by method."""
        return self.noise[max(self.noise, key=float)]

    def golds(self, method: str) -> Values:
        """The gold of each response, by seed."""
        return column(self.main.get(method, []), "golds")

    def path(self, method: str, seed: int, name: str = "gold", pushed: bool = False) -> Points:
        """(KL, gold) from the SFT model through the first stage, if there are two, to the final policy."""
        rows = self.pushed if pushed else self.main
        row = next(r for r in rows[method] if r["seed"] == seed)
        if first := FIRST_STAGE.get(method):
            before = self.path(first, seed, name)
        else:
            before = [(0.0, next(r[name] for r in self.main["sft"] if r["seed"] == seed))]
        return path(row, before, name)

    def stages(self, method: str, seed: int, name: str = "gold", pushed: bool = False) -> list[Points]:
        """The same path, cut where the second stage begins. The last point of a stage is the first of the next."""
        points = self.path(method, seed, name, pushed)
        if first := FIRST_STAGE.get(method):
            cut = len(self.path(first, seed, name))
            return [points[:cut], points[cut - 1 :]]
        return [points]

    def reward_models(self) -> dict[str, dict[int, Row]]:
        """Noise -> seed -> what was measured of the reward model (experiments/grid.py), where a row records it.

        Rows of the main grid do not. Without noise, the rows of the gamma sweep stand in: their reward models are
        those of the main grid's seeds.
        """
        grids = {"0": list(self.gamma.values())} | {n: [grid] for n, grid in self.noise.items() if n != "0"}
        rows = {n: [row for grid in several for of in grid.values() for row in of] for n, several in grids.items()}
        return {n: {r["seed"]: r["rm"] for r in some if "rm" in r} for n, some in rows.items()}

    def seeds(self, *methods: str, pushed: bool = False) -> list[int]:
        """The seeds on which all these methods, and their first stages, are finished."""
        needed = {"sft", *(FIRST_STAGE[m] for m in methods if m in FIRST_STAGE)} | (set() if pushed else set(methods))
        finished = [{r["seed"] for r in self.main.get(m, [])} for m in needed]
        finished += [{r["seed"] for r in self.pushed.get(m, [])} for m in methods if pushed]
        return sorted(set.intersection(*finished))


def by_method(rows: Sequence[Row], task: str, variant: str = "") -> dict[str, list[Row]]:
    """The rows of one world and variant, by method."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        if row["task"] == task and row["variant"] == variant:
            grouped.setdefault(row["policy"], []).append(row)
    return grouped


def read_world(study: Study, task: str) -> World:
    """All that the result files hold of one world."""
    rows = {grid: read_results(study.results / f"{grid}.jsonl") for grid in GRIDS}
    main = by_method(rows["main"], task)
    noise = {"0": main} | {f"{n}": by_method(rows["noise"], task, f"{n}") for n in study.noise}
    gamma = {"q0.5": main} | {g: by_method(rows["gamma"], task, g) for g in study.gammas}
    pushed, price = (by_method(rows[grid], task) for grid in ("pushed", "price"))
    return World(task, main, noise, dict(sorted(gamma.items())), pushed, price)


# --- contrasts ------------------------------------------------------------------------------------


def contrast_or_none(differences: Values) -> Contrast | None:
    """The contrast of paired differences by seed; None where no seed has any."""
    return contrast(differences) if differences else None


def gold_contrast(world: World, pair: Pair) -> Contrast | None:
    """The first method's gold less the second's; None until they share a finished seed."""
    return contrast_or_none(difference(world.golds(pair[0]), world.golds(pair[1])))


def equal_kl_contrast(world: World, pair: Pair) -> Contrast | None:
    """The same where both are at the smaller of their two final KLs, seed by seed."""
    differences = {}
    for seed in world.seeds(*pair):
        ours, theirs = (world.path(m, seed) for m in pair)
        kl = min(ours[-1][0], theirs[-1][0])
        differences[seed] = np.asarray([at_kl(ours, kl) - at_kl(theirs, kl)])
    return contrast_or_none(differences)


def noise_contrast(world: World, rival: str, noise: str) -> Contrast | None:
    """How much more gold the rival loses to label noise than mpo does."""
    noisy = world.noise.get(noise, {})
    losses = [
        difference(world.golds(m), column(noisy.get(m, []), "golds")) for m in (rival, "mpo")
    ]  # prompt by prompt, without noise less with it
    return contrast_or_none(difference(*losses))


def fall(points: Points) -> float:
    """How far gold ends below its highest point on a path."""
    return max(gold for _, gold in points) - points[-1][1]


def fall_contrast(world: World, rival: str) -> Contrast | None:
    """How much further the rival falls from its best gold than mpo does, when both are pushed."""
    differences = {
        seed: np.asarray([fall(world.path(rival, seed, pushed=True)) - fall(world.path("mpo", seed, pushed=True))])
        for seed in world.seeds(rival, "mpo", pushed=True)
    }
    return contrast_or_none(differences)


def judged(world: World, study: Study, claim: int) -> dict[str, Contrast | None]:
    """The contrasts that decide a claim's verdict, by name."""
    if claim == 5:
        worst = f"{max(study.noise)}"
        return {
            f"drop of {m} - drop of mpo": noise_contrast(world, m, worst)
            for m in ("dpo-all-long", "ppo-long")
            if m in study.noise_methods
        }
    if claim == 6:
        return {"fall of ppo - fall of mpo": fall_contrast(world, "ppo")}
    contrasts = {" - ".join(pair): gold_contrast(world, pair) for pair in JUDGED[claim]}
    if claim == 1:
        contrasts |= {" - ".join(pair) + " at equal KL": equal_kl_contrast(world, pair) for pair in JUDGED[claim]}
    return contrasts


def verdict(worlds: Sequence[Mapping[str, Contrast | None]], seeds: int) -> str:
    """A claim's verdict from its contrasts in each world (docs/protocol.md).

    holds: all contrasts hold in all worlds. fails: some contrast fails in all worlds. open: all contrasts are open in
    all worlds. mixed: anything else. There is no verdict while a contrast has fewer than `seeds` seeds.
    """
    contrasts = [c for world in worlds for c in world.values()]
    if not any(contrasts):
        return "not run"
    if any(c is None or len(c.per_seed) < seeds for c in contrasts):
        return "unfinished"
    verdicts = {name: [world[name].verdict for world in worlds] for name in worlds[0]}  # type: ignore[union-attr]
    flat = [v for each in verdicts.values() for v in each]
    if all(v == "holds" for v in flat):
        return "holds"
    if any(all(v == "fails" for v in each) for each in verdicts.values()):
        return "fails"
    return "open" if set(flat) == {"open"} else "mixed"


def collapsed(row: Row, sft: Sequence[Row]) -> str:
    """Why a policy counts as collapsed; "" if it does not."""
    start = next((r["gold"] for r in sft if r["seed"] == row["seed"]), None)
    why = [f"gold {row['gold']:.2f} below SFT's {start:.2f}"] if start is not None and row["gold"] < start else []
    return "; ".join(why + ([f"EOS {100 * row['eos']:.0f} %"] if row["eos"] < 0.8 else []))
