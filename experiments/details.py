"""The details of docs/details.md: what is measured without each of them, and the page.

make ablate GRID=details         trains and evaluates what has no row yet, and writes the page
python -m experiments.details    only writes the page, from its template and from experiments/results/details.jsonl

A *variant* is the pipeline without one detail: with other flags, or with a patch (patches.py) where the detail is no
flag. It shares every stage before the one that it changes. Its policies are compared with those of the variant
`default`, on the same seeds, prompts and random numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments import figures
from experiments.grid import ROOT, Cell, read_results
from experiments.statistics import t_interval
from mpo.runtime.files import write_text
from mpo.runtime.output import table

RESULTS = ROOT / "experiments" / "results" / "details.jsonl"
TEMPLATE = ROOT / "experiments" / "details.md"
PAGE = ROOT / "docs" / "details.md"
FIGURE = ROOT / "docs" / "figures" / "details.png"
SEEDS = "21,22,23"  # none of them was used to choose a setting
SMALL = 0.2  # a difference in gold whose interval lies within this range of 0 is called small


# What variants share: name -> (what it shares itself, the stage up to which it is made, make variables).
BASES: dict[str, tuple[str, str, Mapping[str, str]]] = {
    "tokenizer": ("", "tokenizer", {}),
    "sft": ("tokenizer", "sft", {}),
    "split": ("sft", "split", {}),
    "dpo": ("split", "dpo", {}),
    "noisy": ("", "dpo", {"DATA_FLAGS": "--noise 0.3"}),
}
# About how many seconds of one core a variant takes, by what it shares; and how long the bases of a seed take.
SECONDS = {"tokenizer": 200, "sft": 130, "split": 45, "dpo": 50, "noisy": 50}
BASE_SECONDS = 400


@dataclass(frozen=True)
class Variant:
    """The pipeline without one detail."""

    name: str
    says: str  # what is different, in the tables
    shares: str = "dpo"  # a name in BASES
    variables: Mapping[str, str] = field(default_factory=dict)  # make variables, besides those of the base
    patch: str = ""
    policies: tuple[str, ...] = ("mpo",)  # those that are evaluated
    against: str = "default"  # the variant that it is compared with

    @property
    def all_variables(self) -> dict[str, str]:
        """The make variables of its run."""
        return dict(BASES[self.shares][2]) | dict(self.variables)


def _ppo(name: str, says: str, flags: str = "", patch: str = "", **more: Any) -> Variant:
    """A variant of the PPO stage."""
    return Variant(name, says, "dpo", {"PPO_FLAGS": flags} if flags else {}, patch, **more)


def _dpo(name: str, says: str, variables: Mapping[str, str], patch: str = "", against: str = "default") -> Variant:
    """A variant of the DPO stage, whose policy alone is evaluated."""
    return Variant(name, says, "split", variables, patch, ("dpo",), against)


ALL = ("sft", "dpo", "mpo")
# As many responses as by default, and the same sum of learning rates: twice as many optimiser steps at half the rate.
SMALL_BATCH = "--batch 32 --minibatch 32 --iterations 200 --critic_warmup 12 --lr 1.5e-4 --critic_lr 2.5e-4"
# In the order in which they are run: what takes long comes last.
VARIANTS = (
    Variant("default", "the default", policies=ALL),
    # the critic
    _ppo("critic_from_policy", "critic from the policy", patch="critic_from_policy"),
    _ppo("no_warmup", "no critic warm-up", "--critic_warmup 0"),
    _ppo("no_warmup_policy", "critic from the policy, no warm-up", "--critic_warmup 0", "critic_from_policy"),
    _ppo("shared_critic", "critic on the policy's trunk", "--shared_critic true"),
    _ppo("value_after", "values read one token later", patch="value_after"),
    # what is rewarded
    _ppo("no_whitening", "advantages not whitened", patch="no_whitening"),
    _ppo("last_column", "score in the last column", patch="last_column"),
    _ppo("before_eos", "score read before EOS", patch="before_eos"),
    _ppo("no_kl", "no price of KL", "--kl_coef 0"),
    _ppo("dear_kl", "ten times the price of KL", "--kl_coef 0.5"),
    _ppo("k1_in_loss", "KL in the loss, as k1", "--kl_in loss --kl_estimator k1"),
    _ppo("k2_in_loss", "KL in the loss, as k2", "--kl_in loss --kl_estimator k2"),
    _ppo(
        "k1_in_loss_dear", "KL in the loss, as k1, six times the price", "--kl_in loss --kl_estimator k1 --kl_coef 0.3"
    ),
    _ppo(
        "k2_in_loss_dear", "KL in the loss, as k2, six times the price", "--kl_in loss --kl_estimator k2 --kl_coef 0.3"
    ),
    _ppo("raw_scores", "raw scores", patch="raw_scores"),
    _ppo("whitened_scores", "scores whitened in each rollout", patch="whitened_scores"),
    # DPO
    _dpo("no_reference", "DPO without a reference", {}, "no_reference"),
    _dpo("low_beta", "DPO's beta 0.05", {"DPO_FLAGS": "--beta 0.05"}),
    _dpo("high_dpo_lr", "DPO at ten times the rate", {"DPO_FLAGS": "--lr 5e-4"}),
    _dpo("mean_logps", "DPO on means", {}, "mean_logps"),
    _dpo("mean_logps_20", "DPO on means, 20 times the beta", {"DPO_FLAGS": "--beta 10"}, "mean_logps"),
    _dpo("simpo", "SimPO, beta 10", {"LOSS": "simpo:beta=10"}),
    _dpo("simpo_05", "SimPO, beta 0.5", {"LOSS": "simpo:beta=0.5"}, against="simpo"),
    _dpo("bf16_logps", "DPO's log-probs in bf16", {}, "bf16_logps"),
    _dpo("dpo_passes", "four passes of DPO", {"DPO_FLAGS": "--epochs 4"}),
    # rollouts
    _ppo("cold_sampler", "sampled at 0.7, scored at 1", patch="cold_sampler"),
    _ppo("top_p", "sampled with top-p 0.9", patch="top_p"),
    _ppo("stale_sampler", "sampled one update late", patch="stale_sampler"),
    _ppo("dropout", "dropout of 0.1 in the update", patch="dropout"),
    _ppo("retokenised", "responses tokenised again", patch="retokenised"),
    _ppo("two_bos", "two BOS in PPO", patch="two_bos"),
    _ppo("no_penalty", "no penalty of a missing EOS", "--missing_eos_penalty 0"),
    _ppo("faked_eos", "no penalty, and EOS is added", "--missing_eos_penalty 0", "faked_eos"),
    _ppo("small_batch", "rollouts of 32, four times as many", SMALL_BATCH),
    # the update
    _ppo("adams_epsilon", "Adam's epsilon 1e-8", patch="adams_epsilon"),
    _ppo("high_lr", "PPO at three times the rate", "--lr 9e-4"),
    _ppo("constant_lr", "PPO at a constant rate", "--warmup 0 --final_lr 1"),
    _ppo("loss_by_response", "PPO's loss a mean by response", patch="loss_by_response"),
    _ppo("four_passes", "four passes over a rollout", "--epochs 4"),
    _ppo("four_passes_no_clip", "four passes, ratio not clipped", "--epochs 4 --clip 1e6", against="four_passes"),
    _ppo("no_clip", "ratio not clipped", "--clip 1e6"),
    _ppo("no_grad_clip", "PPO's gradients not clipped", "--grad_clip 0"),
    _ppo("no_value_clip", "values not clipped", "--value_clip 1e6"),
    # advantages
    _ppo("whitened_padding", "advantages whitened over padding, too", patch="whitened_padding"),
    _ppo("whitened_minibatches", "advantages whitened in each minibatch", patch="whitened_minibatches"),
    _ppo("lam_1", "lambda 1", "--lam 1"),
    _ppo("gamma_095", "gamma 0.95", "--gamma 0.95"),
    # SFT and the reward model, after which everything is trained anew
    Variant("new_trunk", "reward model with a random trunk", "sft", patch="new_trunk"),
    Variant("no_eos", "EOS masked in SFT", "tokenizer", patch="no_eos", policies=("sft", "mpo")),
    Variant("large_head", "reward model's head ten times as large", "sft", patch="large_head"),
    Variant("short_sft", "a tenth of SFT's steps", "tokenizer", {"SFT_FLAGS": "--epochs 0.15"}, policies=ALL),
    Variant("cut", "responses cut at 16 tokens in SFT", "tokenizer", patch="cut", policies=("sft", "mpo")),
    Variant("prompt_loss", "SFT's loss on prompts, too", "tokenizer", patch="prompt_loss", policies=("sft", "mpo")),
    Variant("rm_passes", "four times the passes of the reward model", "sft", {"RM_FLAGS": "--epochs 6"}),
    # label noise
    Variant("noisy", "30 % of the labels flipped", "noisy", policies=("dpo", "mpo")),
    Variant(
        "noisy_dear", "the same, four times the price of KL", "noisy", {"PPO_FLAGS": "--kl_coef 0.2"}, against="noisy"
    ),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}


# --- cells ------------------------------------------------------------------------------------------


def base_run(out: str, task: str, seed: int, name: str) -> str:
    """The folder of a base; that of `split` is the one that the other grids share."""
    return f"{out}/{task}-{seed}" + ("" if name == "split" else f"-{name}")


def base_cells(left: Sequence[Cell], out: str, common: Mapping[str, str]) -> list[Cell]:
    """What these cells share, each after what it shares itself: runs that are made up to the stage `policy`."""
    made: dict[str, Cell] = {}

    def add(task: str, seed: int, name: str) -> None:
        shares, stage, variables = BASES[name]
        if shares:
            add(task, seed, shares)
        run, source = base_run(out, task, seed, name), base_run(out, task, seed, shares) if shares else ""
        made.setdefault(run, Cell("details", task, seed, name, stage, run, source, {**common, **variables}))

    for cell in left:
        add(cell.task, cell.seed, BY_NAME[cell.variant].shares)
    return list(made.values())


def waves(every: Sequence[Cell]) -> list[list[Cell]]:
    """The cells in two parts: those with flipped labels share nothing with the others, and come last."""
    noisy = [cell for cell in every if BY_NAME[cell.variant].shares == "noisy"]
    return [[cell for cell in every if cell not in noisy], noisy]


def cells(out: str, task: str, seeds: Sequence[int], common: Mapping[str, str], prompts: int) -> list[Cell]:
    """All cells, variant by variant, so that an interrupted grid has complete variants."""
    return [
        Cell(
            *("details", task, seed, v.name, policy, f"{out}/details-{task}-{seed}-{v.name}"),
            base_run(out, task, seed, v.shares),
            {**common, **v.all_variables},
            prompts,
            v.patch,
            made=True,
        )
        for v in VARIANTS
        for seed in seeds
        for policy in v.policies
    ]


def hours(left: Iterable[Cell]) -> float:
    """About how long these cells take on one core."""
    runs = {cell.run: cell for cell in left}.values()
    return (sum(SECONDS[BY_NAME[c.variant].shares] for c in runs) + BASE_SECONDS * len({c.seed for c in runs})) / 3600


# --- the page ---------------------------------------------------------------------------------------

Row = Mapping[str, Any]
Rows = Mapping[tuple[str, str], Mapping[int, Row]]  # (variant, policy) -> seed -> row


def by_variant(rows: Iterable[Row], task: str = "hh") -> Rows:
    """The rows of the page's world, by variant and policy."""
    grouped: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        if row["task"] == task:
            grouped.setdefault((row["variant"], row["policy"]), {})[row["seed"]] = row
    return grouped


def gold_difference(rows: Rows, variant: Variant, policy: str) -> list[float]:
    """Gold of a policy less that of the variant it is compared with, on each seed that both have."""
    ours, theirs = rows.get((variant.name, policy), {}), rows.get((variant.against, policy), {})
    return [float(np.mean(ours[s]["golds"]) - np.mean(theirs[s]["golds"])) for s in sorted(ours.keys() & theirs.keys())]


def reading(differences: Sequence[float]) -> str:
    """In a word or two, what a difference in gold says: its 95 % interval decides."""
    if len(differences) < 2:
        return "too few seeds to say"
    mean, half = t_interval(differences)
    if mean + half < 0:
        return "**worse**"
    if mean - half > 0:
        return "**better**"
    if abs(mean) + half <= SMALL:
        return "makes no difference here"
    return f"open, but {SMALL:g} or more worse on each seed" if max(differences) <= -SMALL else "open"


def difference_text(differences: Sequence[float]) -> str:
    """The mean difference with half its interval: "-0.31 ± 0.12"."""
    if len(differences) < 2:
        return "".join(f"{d:+.2f}" for d in differences)
    mean, half = t_interval(differences)
    return f"{mean:+.2f} ± {half:.2f}"


def _mean(rows: Mapping[int, Row], name: str, seeds: Iterable[int], scale: float = 1.0) -> float:
    return scale * float(
        np.mean([row["rm"]["accuracy"] if name == "rm" else row[name] for s, row in rows.items() if s in seeds])
    )


COLUMNS = {
    "gold": ("gold", 2, 1.0),
    "KL to SFT": ("kl", 2, 1.0),
    "words": ("words", 1, 1.0),
    "EOS %": ("eos", 0, 100.0),
}
ACCURACY = {"RM accuracy %": ("rm", 1, 100.0)}


def measured(rows: Rows, names: Sequence[str]) -> str:
    """The table of some variants. In parentheses: the mean of what each is compared with, on the same seeds."""
    shown = [BY_NAME[name] for name in names]
    new_rm = any(v.shares in ("tokenizer", "sft", "noisy") for v in shown)
    columns = COLUMNS | (ACCURACY if new_rm else {})
    lines = []
    for v in shown:
        for policy in v.policies:
            ours, theirs = rows.get((v.name, policy), {}), rows.get((v.against, policy), {})
            seeds = ours.keys() & theirs.keys()
            line = [v.says + (f", against {BY_NAME[v.against].says}" if v.against != "default" else ""), policy]
            if not seeds:
                lines.append([*line, "0", "not measured yet", *[""] * (1 + len(columns))])
                continue
            differences = gold_difference(rows, v, policy)
            line += [str(len(seeds)), difference_text(differences), reading(differences)]
            for name, digits, scale in columns.values():
                mine, other = (_mean(side, name, seeds, scale) for side in (ours, theirs))
                line.append(f"{mine:.{digits}f} ({other:.{digits}f})")
            lines.append(line)
    return table(["without it", "policy", "seeds", "gold, difference", "reading", *columns], lines)


def headings(template: str) -> dict[str, tuple[int, str]]:
    """Variant -> number and title of the detail that shows it."""
    found: dict[str, tuple[int, str]] = {}
    number, title = 0, ""
    for line in template.splitlines():
        if heading := re.match(r"### (\d+)\. (.*)", line):
            number, title = int(heading[1]), heading[2]
        elif names := re.fullmatch(r"\{measured: (.*)\}", line):
            found |= dict.fromkeys(names[1].split(), (number, title))
    return found


def anchor(number: int, title: str) -> str:
    """GitHub's anchor of a heading."""
    kept = re.sub(r"[^\w\- ]", "", f"{number}. {title}".lower())
    return "#" + kept.replace(" ", "-")


def ordered(rows: Rows, template: str) -> list[tuple[Variant, list[float]]]:
    """Every variant that is measured, with the differences of its last policy; the most harmful first."""
    shown = headings(template)
    measured_ = [(v, gold_difference(rows, v, v.policies[-1])) for v in VARIANTS if v.name in shown]
    return sorted(((v, d) for v, d in measured_ if d), key=lambda item: float(np.mean(item[1])))


def overview(rows: Rows, template: str) -> str:
    """Every variant's last policy, from the most harmful to the most helpful."""
    where, lines = headings(template), []
    for v, differences in ordered(rows, template):
        number, title = where[v.name]
        texts = difference_text(differences), reading(differences)
        lines.append([f"[{number}]({anchor(number, title)})", v.says, v.policies[-1], *texts])
    missing = [v.name for v in VARIANTS if v.name in where and not gold_difference(rows, v, v.policies[-1])]
    text = table(["detail", "without it", "policy", "gold, difference", "reading"], lines)
    return text + (f"\n\nNot measured yet: {'; '.join(BY_NAME[name].says for name in missing)}." if missing else "")


def provenance(rows: Sequence[Row]) -> str:
    """How much was measured, where, and of which code."""
    if not rows:
        return "Nothing has been measured yet."
    machines, commits = (", ".join(sorted({row[name] for row in rows})) for name in ("machine", "commit"))
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    return f"{len(rows)} policies, on the seeds {seeds}; machine: {machines}, one thread; commits: {commits}."


def page(template: str, results: Sequence[Row]) -> str:
    """The page: its template, with tables in the place of what stands in braces."""
    rows = by_variant(results)
    text = re.sub(r"^\{measured: (.*)\}$", lambda m: measured(rows, m[1].split()), template, flags=re.MULTILINE)
    text = text.replace("{overview}", overview(rows, template))
    return text.replace("{provenance}", provenance(results)).replace("{small}", f"{SMALL:g}")


def write() -> None:
    """Write docs/details.md."""
    write_text(PAGE, page(TEMPLATE.read_text(encoding="utf-8"), read_results(RESULTS)))


def draw() -> bool:
    """Draw the figure of the overview, where matplotlib is there and something has been measured on several seeds."""
    rows, template = by_variant(read_results(RESULTS)), TEMPLATE.read_text(encoding="utf-8")
    lines = {v.says: differences for v, differences in ordered(rows, template) if len(differences) > 1}
    if not (lines and figures.available()):
        return False
    figures.differences({name: (*t_interval(d), d) for name, d in lines.items()}, SMALL, FIGURE)
    return True


if __name__ == "__main__":
    write()
    print(f"page: {PAGE}" + (f"\nfigure: {FIGURE}" if draw() else ""))
