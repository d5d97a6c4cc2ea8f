"""What the claims need (docs/protocol.md): worlds, seeds, budgets, methods, trials, sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.grid import ROOT

GRIDS = ("tune", "main", "noise", "price", "gamma", "pushed")  # a results file each

TRIALS = {
    "dpo": [f"--lr {lr} --beta {beta}" for lr, beta in ((5e-5, 0.5), (1e-4, 0.5), (1e-4, 0.2))],
    "ppo": [f"--lr {lr} --kl_coef {kl}" for lr, kl in ((1e-4, 0.05), (2e-4, 0.05), (2e-4, 0.02))],
}

# Tuned in this order: method -> which trials.
TUNED = dict.fromkeys(("dpo", "dpo-all", "dpo-hard"), "dpo")
TUNED |= dict.fromkeys(("ppo", "ppo-hard", "mpo", "mpo-all", "mpo-sft-ref", "dpo-ppo", "reversed", "mixed"), "ppo")
TUNED |= {"ppo-dpo": "dpo"}

# What the other methods' second stage starts from.
FIRST_STAGE = {
    "mpo": "dpo",
    "mpo-all": "dpo",
    "mpo-sft-ref": "dpo",
    "dpo-ppo": "dpo-all",
    "reversed": "dpo-hard",
    "mixed": "dpo-random",
    "ppo-dpo": "ppo-hard",
}


@dataclass(frozen=True)
class Study:
    """One size of the whole experiment."""

    root: str = "runs/claims"
    results: Path = ROOT / "experiments" / "results"
    page: Path = ROOT / "docs" / "results.md"
    reasons: Path | None = ROOT / "experiments" / "reasons"  # what the page says of its numbers
    tasks: tuple[str, ...] = ("hh", "tldr")
    seeds: tuple[int, ...] = (11, 12, 13, 14, 15)
    tuning_seed: int = 1
    trials: int = 3  # of each method
    dpo_unit: str = "--steps 320 --keep 3"  # one unit of budget, and the models kept on the way
    ppo_unit: str = "--iterations 50 --keep 3"
    dpo_long: str = "--steps 640"
    ppo_long: str = "--iterations 100"
    few: int = 400  # prompts of ppo-few
    some: int = 1600  # prompts of ppo-some
    prompts: int = 400  # held-out ones
    variables: Mapping[str, str] = field(default_factory=dict)  # make's, for every cell
    noise: tuple[float, ...] = (0.15, 0.3)
    noise_methods: tuple[str, ...] = ("sft", "dpo", "dpo-all-long", "ppo-long", "mpo")
    price: str = "--kl_coef 0.2"  # of mpo once more at the most noise: four times the price that the tuning chose
    gammas: tuple[str, ...] = ("q0.25", "q0.75", "q0.9")
    gamma_methods: tuple[str, ...] = ("dpo", "mpo")
    pushed_long: int = 2  # units of the pushed stages

    @property
    def settings(self) -> Path:
        """Where the tuning writes what it chose."""
        return self.results / "settings.json"

    @property
    def inherited(self) -> dict[str, tuple[str, str]]:
        """Methods that are not tuned: whose settings they take, and what makes them different."""
        return {
            "dpo-random": ("dpo", ""),
            "dpo-inverted": ("dpo", ""),
            "dpo-long": ("dpo", self.dpo_long),
            "dpo-all-long": ("dpo-all", self.dpo_long),
            "ppo-long": ("ppo", self.ppo_long),
            "ppo-some": ("ppo", f"--limit {self.some}"),
            "ppo-few": ("ppo", f"--limit {self.few}"),
        }

    @property
    def pushed(self) -> dict[str, str]:
        """The flags that drive a method past its best."""
        dpo = f"--lr 2e-4 --beta 0.05 {self.dpo_long} --keep 7"
        ppo = f"--kl_coef 0 {self.ppo_long} --keep 7"
        return {"dpo-all": dpo, "ppo": ppo, "mpo": ppo, "dpo-ppo": ppo}

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method of the main grid, each after what it starts from."""
        return ("sft", *TUNED, *self.inherited)

    def base_run(self, task: str, seed: int) -> str:
        """The run folder of the main grid, whose stages the tuning and the sweeps share."""
        return f"{self.root}/{task}-{seed}"

    def make_variables(self, settings: Mapping[str, str], method: str) -> dict[str, str]:
        """The budgets for every stage, and the tuned flags of the folders that lead to a method."""
        found = {"DPO_FLAGS": self.dpo_unit, "PPO_FLAGS": self.ppo_unit} | dict(self.variables)
        for name in filter(None, (FIRST_STAGE.get(method), method)):
            of, more = self.inherited.get(name, (name, ""))
            if of in settings:
                found[f"{name}_FLAGS"] = f"{settings[of]} {more}".strip()
        return found


FULL = Study()

# The same in minutes, with numbers that mean nothing: for CI, and to try a change of the code.
REDUCED = replace(
    FULL,
    root="runs/claims-reduced",
    results=ROOT / "runs" / "claims-reduced" / "results",
    page=ROOT / "runs" / "claims-reduced" / "results.md",
    reasons=None,
    tasks=("hh",),
    seeds=(11,),
    trials=1,
    dpo_unit="--steps 4 --keep 1",
    ppo_unit="--iterations 2 --keep 1 --critic_warmup 0 --batch 16 --minibatch 8 --microbatch 8 --max_new 24",
    dpo_long="--steps 8",
    ppo_long="--iterations 4",
    few=16,
    some=64,
    prompts=16,
    variables={"QUICK": "1"},
    noise=(0.3,),
    noise_methods=("sft", "dpo-all-long", "ppo-long", "mpo"),
    gammas=("q0.75",),
)
