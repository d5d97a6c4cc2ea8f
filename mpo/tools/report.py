"""The report of a run: tables, the histogram of reward gaps, and samples; for the terminal and as Markdown.

`python -m mpo.tools.report RUN` prints the report that eval.py wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo.config import EvalConfig
from mpo.data.dialogue import ASSISTANT
from mpo.evaluation import stratified
from mpo.runtime.entry import one_argument, run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, write_text
from mpo.runtime.manifest import MANIFEST, is_stage, read_manifest
from mpo.runtime.output import fitting_table, interval, percent, table

NAMES = {"sft": "SFT", "dpo": "DPO", "mpo": "MPO", "ppo": "PPO", "chosen": "data set's chosen"}

MOST_KINDS = 8  # domains that fit into one table


@dataclass(frozen=True)
class Report:
    """The same content in two forms."""

    terminal: str
    markdown: str


def write_responses(path: Path, responses: Sequence[Mapping[str, Any]]) -> None:
    """Write every response with its scores, one JSON object a line."""
    lines = [json.dumps({k: v for k, v in r.items() if k != "ids"}, ensure_ascii=False) for r in responses]
    write_text(path, "".join(line + "\n" for line in lines))


def judge_of(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What decides who wins: the gold reward where it is known, else the reward model's."""
    return "gold" if "gold" in next(iter(results.values())) else "reward"


def result_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each policy: gold reward where it is known, RM reward, KL, win rates, length and variety."""
    judge = judge_of(results)
    with_gold = judge == "gold"
    header = ["policy", *(["gold reward", "of best"] if with_gold else []), "RM reward", "KL to SFT"]
    header += ["win vs SFT %", "equal length %", "win vs chosen %", "words", "EOS %", "distinct"]
    rows = []
    for name, r in results.items():
        row = [NAMES.get(name, name)]
        if with_gold:
            share = r["share_of_best"]
            row += [interval(r["gold"]), f"{100 * share:.0f} %" if share >= 0 else "-"]
        row += [interval(r["reward"]), f"{r['kl'][0]:.1f}" if "kl" in r else "-"]
        row += [percent(r[f"{judge}_win_sft"]), f"{100 * r[f'{judge}_win_sft_length_controlled']:.0f}"]
        row += [percent(r[f"{judge}_win_chosen"]), f"{r['words']:.0f}", f"{100 * r['eos_rate']:.0f}"]
        rows.append([*row, f"{r['distinct_1']:.2f}/{r['distinct_2']:.2f}"])
    return fitting_table(header, rows)


def kinds_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each policy: mean reward by kind of prompt and, in the built-in world, refusals of benign prompts."""
    first = next(iter(results.values()))
    kinds = [k for k in first if "/" in k]
    if len(kinds) > MOST_KINDS:
        return f"The test set has {len(kinds)} domains; results.json has the mean reward of each."
    refusals = "refusals_benign" in first
    rows = []
    for name, r in results.items():
        row = [NAMES.get(name, name), *(f"{r[k]:.2f}" for k in kinds)]
        rows.append(row + ([f"{100 * r['refusals_benign']:.0f} %"] if refusals else []))
    header = [
        "policy",
        *(k.replace("/", ": ") for k in kinds),
        *(["benign refused"] if refusals else []),
    ]
    return fitting_table(header, rows)


def bars(histogram: Sequence[Sequence[float]], width: int = 48) -> str:
    """A histogram of reward gaps as text: for each bin its limits, a bar, and its share of the pairs."""
    total = sum(n for _, n in histogram) or 1
    most = max(n for _, n in histogram) or 1
    step = histogram[1][0] - histogram[0][0]
    lines = []
    for i, (left, n) in enumerate(histogram):
        label = f"[{left:+.1f}, {left + step:+.1f})"
        if i == 0:
            label = f"< {left + step:+.1f}".ljust(len(label))
        elif i == len(histogram) - 1:
            label = f">= {left:+.1f}".ljust(len(label))
        lines.append(f"{label} {'#' * round(width * n / most):{width}} {100 * n / total:5.1f} %")
    return "\n".join(lines)


def samples(
    responses: Mapping[str, Sequence[Mapping[str, Any]]], count: int
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Prompts with the response of every policy: (prompt, [(name, response), ...]).

    They come from all domains equally, and are the same ones in every evaluation.
    """
    first = next(iter(responses.values()))
    picked = stratified([str(r["domain"]) for r in first], count)
    out = []
    for i in picked:
        answers = []
        for name, rows in responses.items():
            gold = f" (gold {rows[i]['gold']:+.1f})" if "gold" in rows[i] else ""
            answers.append((NAMES.get(name, name) + gold, str(rows[i]["response"]).strip() or "(empty)"))
        out.append((str(first[i]["prompt"]).strip(), answers))
    return out


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else "..." + text[-most:]


def probe_table(probe: Sequence[Mapping[str, Any]]) -> str:
    """For each mistake and kind of prompt: the share of right answers that the reward model scores above wrong ones."""
    kinds = list(dict.fromkeys(p["kind"] for p in probe))
    mistakes = list(dict.fromkeys(p["mistake"] for p in probe))
    share = {(p["kind"], p["mistake"]): p["right_above"] for p in probe}
    rows = [[m, *(f"{share[k, m]:.2f}" if (k, m) in share else "-" for k in kinds)] for m in mistakes]
    return fitting_table(["mistake", *kinds], rows)


def split_text(gamma: float, sizes: Mapping[str, int], share_gap_in_0_1: float) -> str:
    """One sentence on a split: its threshold, its parts, and what DPO and PPO get."""
    return (
        f"gamma {gamma:.2f}: {sizes['easy']} easy, {sizes['hard']} hard, {sizes['contradicted']} contradicted pairs; "
        f"DPO gets {sizes['pairs']} pairs, PPO {sizes['prompts']} prompts; "
        f"{100 * share_gap_in_0_1:.0f} % of the pairs have a gap in [0, 1]"
    )


def about_rm(folder: Path) -> str:
    """One sentence on a reward model: what train_rm.py measured, if it comes from there."""
    results = read_manifest(folder / MANIFEST)["results"] if is_stage(folder) and (folder / MANIFEST).exists() else {}
    if "held_out" not in results:
        return f"Reward model: {folder}, which was not trained here."
    held_out = results["held_out"]
    return (
        f"Reward model: held-out label accuracy {percent(held_out['accuracy'])} %, log-loss "
        f"{held_out['log_loss']:.3f}, calibration error {held_out['calibration_error']:.3f}."
    )


def make_report(
    config: EvalConfig,
    results: Mapping[str, Mapping[str, Any]],
    responses: Mapping[str, Sequence[Mapping[str, Any]]],
    counts: Mapping[str, int],
) -> Report:
    """Make the report of a run from its results, its responses, and the manifests of its stages."""
    data = read_json(Path(config.data) / "manifest.json")["results"]
    source = "the built-in world" if data["source"] == "builtin" else data["source"]
    facts = [
        f"Task {data['task']}, data: {source}; {counts['kept']} held-out prompts, one response each at "
        f"temperature {config.temperature:g}, seed {config.seed}; 95 % bootstrap intervals over prompts.",
        about_rm(Path(config.rm)),
    ]
    judged = "gold reward" if judge_of(results) == "gold" else "the reward model"
    sections = [
        (f"Results (wins are judged by {judged})", result_table(results)),
        ("By kind of prompt", kinds_table(results)),
    ]
    if config.split:
        split = read_json(Path(config.split) / "manifest.json")["results"]
        facts.append(
            f"Split of the training pairs at {split_text(split['gamma'], split['sizes'], split['share_gap_in_0_1'])}."
        )
        sections.append(("Reward gap r(chosen) - r(rejected) of the training pairs", bars(split["histogram"])))
    if (probe := Path(config.rm) / "probe.json").exists():
        title = "Probe sheet: share of right answers that the reward model scores above wrong ones"
        sections.append((title, probe_table(read_json(probe))))
    shown = samples(responses, config.samples)
    terminal = [*facts]
    markdown = ["# Report", *facts]
    for title, body in sections:
        terminal += ["", title, body]
        markdown += [f"## {title}", f"```\n{body}\n```" if body.startswith(("<", "[")) else body]
    terminal += ["", "Samples", ""]
    markdown.append("## Samples")
    for prompt, answers in shown:
        question = prompt.removesuffix(ASSISTANT)  # of a dialogue; the answers follow
        terminal += [_shorten(question, 400), *(f"  {name}: {_shorten(text, 300)}" for name, text in answers), ""]
        markdown += [f"```\n{prompt}\n```", "\n".join(f"- **{name}**: {text}" for name, text in answers)]
    return Report("\n".join(terminal), "\n\n".join(markdown) + "\n")


def stage_table(run: Path) -> str:
    """The time and memory that each stage of a run took, in the order in which they finished."""
    rows = []
    for path in sorted(run.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime):
        manifest = read_json(path)
        rows.append([path.parent.name, f"{manifest['seconds']:.0f}", f"{manifest['peak_memory_mb']:.0f}"])
    total = sum(float(row[1]) for row in rows)
    return table(["stage", "seconds", "peak memory, MB"], [*rows, ["total", f"{total:.0f}", ""]])


def main(argv: list[str]) -> None:
    """Print the report of the run folder argv[0]. Raises InputError where there is none."""
    run = Path(one_argument(argv, "python -m mpo.tools.report RUN"))
    page = run / "eval" / "report.txt"
    if not page.exists():
        raise InputError(f"{page}: no such file; has the run finished?")
    print(page.read_text(encoding="utf-8"))
    print(f"What each stage took\n{stage_table(run)}\n\nThe full report: {page.with_suffix('.md')}")


if __name__ == "__main__":
    run_plain(main)
