"""The study of the paper's claims (docs/protocol.md): worlds, seeds, budgets, methods, trials, sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.grid import ROOT

GRIDS = ("tune", "main", "noise", "price", "gamma", "pushed")  # each has a results file

# The last stages that are tried for each method that is tuned, by the kind of that stage.
TRIALS = {
    "dpo": [f"--lr {lr} --beta {beta}" for lr, beta in ((5e-5, 0.5), (1e-4, 0.5), (1e-4, 0.2))],
    "ppo": [f"--lr {lr} --kl_coef {kl}" for lr, kl in ((1e-4, 0.05), (2e-4, 0.05), (2e-4, 0.02))],
}

# The methods that are tuned, in this order -> which trials.
TUNED = dict.fromkeys(("dpo", "dpo-all", "dpo-hard"), "dpo")
TUNED |= dict.fromkeys(("ppo", "ppo-hard", "mpo", "mpo-all", "mpo-sft-ref", "dpo-ppo", "reversed", "mixed"), "ppo")
TUNED |= {"ppo-dpo": "dpo"}


@dataclass(frozen=True)
class LastStage:
    """How a method's last stage is trained, as the Makefile has it."""

    kind: str  # dpo or ppo
    model: str  # the method it starts from
    ref: str  # the method whose policy is the KL reference
    rows: str  # the file, in a run folder, of the pairs or prompts it is trained on


LAST_STAGES = {
    "dpo": LastStage("dpo", "sft", "sft", "split/pairs.jsonl"),
    "dpo-all": LastStage("dpo", "sft", "sft", "data/train.jsonl"),
    "dpo-hard": LastStage("dpo", "sft", "sft", "split/hard.jsonl"),
    "dpo-random": LastStage("dpo", "sft", "sft", "split/random/pairs.jsonl"),
    "dpo-inverted": LastStage("dpo", "sft", "sft", "split/inverted/pairs.jsonl"),
    "dpo-long": LastStage("dpo", "sft", "sft", "split/pairs.jsonl"),
    "dpo-all-long": LastStage("dpo", "sft", "sft", "data/train.jsonl"),
    "ppo": LastStage("ppo", "sft", "sft", "data/train.jsonl"),
    "ppo-hard": LastStage("ppo", "sft", "sft", "split/prompts.jsonl"),
    "ppo-long": LastStage("ppo", "sft", "sft", "data/train.jsonl"),
    "ppo-some": LastStage("ppo", "sft", "sft", "data/train.jsonl"),
    "ppo-few": LastStage("ppo", "sft", "sft", "data/train.jsonl"),
    "mpo": LastStage("ppo", "dpo", "dpo", "split/prompts.jsonl"),
    "mpo-all": LastStage("ppo", "dpo", "dpo", "data/train.jsonl"),
    "mpo-sft-ref": LastStage("ppo", "dpo", "sft", "split/prompts.jsonl"),
    "dpo-ppo": LastStage("ppo", "dpo-all", "dpo-all", "data/train.jsonl"),
    "reversed": LastStage("ppo", "dpo-hard", "dpo-hard", "split/pairs.jsonl"),
    "mixed": LastStage("ppo", "dpo-random", "dpo-random", "split/random/prompts.jsonl"),
    "ppo-dpo": LastStage("dpo", "ppo-hard", "ppo-hard", "split/pairs.jsonl"),
}

UNTUNED = tuple(method for method in LAST_STAGES if method not in TUNED)

# The methods of two stages -> their first stage, a method itself.
FIRST_STAGE = {method: last.model for method, last in LAST_STAGES.items() if last.model != "sft"}


@dataclass(frozen=True)
class Study:
    """The study at one size."""

    root: str = "runs/claims"
    results: Path = ROOT / "experiments" / "results"
    page: Path = ROOT / "docs" / "results.md"
    reasons: Path | None = ROOT / "experiments" / "reasons"  # the page's prose; None: a page of tables only
    tasks: tuple[str, ...] = ("hh", "tldr")
    seeds: tuple[int, ...] = (11, 12, 13, 14, 15)
    tuning_seed: int = 1
    methods: tuple[str, ...] = ("sft", *TUNED, *UNTUNED)  # of the main grid, in the order of its tables
    trials: int = 3  # of each tuned method
    dpo_unit: str = "--steps 320 --keep 3"  # one unit of budget; how many intermediate models to keep
    ppo_unit: str = "--iterations 50 --keep 3"
    dpo_long: str = "--steps 640"
    ppo_long: str = "--iterations 100"
    few: int = 400  # training prompts of ppo-few
    some: int = 1600  # training prompts of ppo-some
    prompts: int = 400  # held-out prompts of the evaluation
    variables: Mapping[str, str] = field(default_factory=dict)  # make variables of every cell
    noise: tuple[float, ...] = (0.15, 0.3)  # share of training labels flipped
    noise_methods: tuple[str, ...] = ("sft", "dpo", "dpo-all-long", "ppo-long", "mpo")
    price: str = "--kl_coef 0.2"  # mpo again at the highest noise, with four times the tuned KL coefficient
    gammas: tuple[str, ...] = ("q0.25", "q0.75", "q0.9")
    gamma_methods: tuple[str, ...] = ("dpo", "mpo")

    @property
    def settings(self) -> Path:
        """The file of the settings that the tuning chose."""
        return self.results / "settings.json"

    @property
    def inherited(self) -> dict[str, tuple[str, str]]:
        """The methods that are not tuned -> the method whose settings they take, and their own flags besides."""
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
        """Method -> the flags that drive it past its best gold."""
        dpo = f"--lr 2e-4 --beta 0.05 {self.dpo_long} --keep 7"
        ppo = f"--kl_coef 0 {self.ppo_long} --keep 7"
        flags = {"dpo-all": dpo, "ppo": ppo, "mpo": ppo, "dpo-ppo": ppo}
        return {method: pushed for method, pushed in flags.items() if method in self.methods}

    @property
    def tuned(self) -> dict[str, str]:
        """The methods that are tuned -> the kind of their last stage (TUNED)."""
        return {method: kind for method, kind in TUNED.items() if method in self.methods}

    def base_run(self, task: str, seed: int) -> str:
        """A run folder of the main grid, whose stages the tuning and the sweeps share."""
        return f"{self.root}/{task}-{seed}"

    def make_variables(self, settings: Mapping[str, str], method: str) -> dict[str, str]:
        """Make variables for a method: the budget of each kind of stage, and the tuned flags of its own stages."""
        variables = {"DPO_FLAGS": self.dpo_unit, "PPO_FLAGS": self.ppo_unit} | dict(self.variables)
        for name in filter(None, (FIRST_STAGE.get(method), method)):
            of, more = self.inherited.get(name, (name, ""))
            if of in settings:
                variables[f"{name}_FLAGS"] = f"{settings[of]} {more}".strip()
        return variables


FULL = Study()

# The same in minutes, with meaningless numbers: for CI, and to try out a change of the code.
REDUCED = replace(
    FULL,
    root="runs/claims-reduced",
    results=ROOT / "runs" / "claims-reduced" / "results",
    page=ROOT / "runs" / "claims-reduced" / "results.md",
    reasons=None,
    tasks=("hh",),
    seeds=(FULL.tuning_seed,),  # so that the main grid shares the stages of the tuning
    methods=("sft", "dpo", "dpo-all-long", "ppo-long", "mpo"),
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
    noise_methods=("sft", "mpo"),
    gammas=("q0.75",),
    gamma_methods=("mpo",),
)
