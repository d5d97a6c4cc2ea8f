"""Tables, histogram and samples from what the stages wrote: for the terminal and report.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo.config import EvalConfig
from mpo.evaluation import stratified
from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, write_text
from mpo.runtime.tables import interval, percent, table

NAMES = {"sft": "SFT", "dpo": "DPO", "mpo": "MPO", "ppo": "PPO", "chosen": "data set's chosen"}

MOST_KINDS = 8  # domains that fit in a table


@dataclass(frozen=True)
class Report:
    """The same content twice."""

    terminal: str
    markdown: str


def write_responses(path: Path, responses: Sequence[Mapping[str, Any]]) -> None:
    """Every response with its scores, one JSON object a line."""
    lines = [json.dumps({k: v for k, v in r.items() if k != "ids"}, ensure_ascii=False) for r in responses]
    write_text(path, "".join(line + "\n" for line in lines))


def result_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a policy: true reward where known, RM reward, win rates, KL, form."""
    with_gold = "gold" in next(iter(results.values()))
    judge = "gold" if with_gold else "reward"
    header = ["policy", *(["gold reward", "of best"] if with_gold else []), "RM reward"]
    header += [f"win vs SFT % ({judge})", "at equal length", f"win vs chosen % ({judge})"]
    header += ["KL to SFT", "words", "EOS %", "distinct-1/2"]
    rows = []
    for name, r in results.items():
        row = [NAMES.get(name, name)]
        if with_gold:
            row += [interval(r["gold"]), f"{100 * r['share_of_best']:.0f} %"]
        row += [interval(r["reward"]), percent(r[f"{judge}_win_sft"])]
        row += [f"{100 * r[f'{judge}_win_sft_length_controlled']:.0f}", percent(r[f"{judge}_win_chosen"])]
        row += [f"{r['kl'][0]:.1f}" if "kl" in r else "-", f"{r['words']:.0f}", f"{100 * r['eos_rate']:.0f}"]
        rows.append([*row, f"{r['distinct_1']:.2f}/{r['distinct_2']:.2f}"])
    return table(header, rows)


def kinds_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Mean reward by kind of prompt, and the refusal rate on benign prompts."""
    first = next(iter(results.values()))
    kinds = [k for k in first if "/" in k]
    if len(kinds) > MOST_KINDS:
        return f"The test set has {len(kinds)} domains: results.json gives the mean reward of each."
    refusals = "refusals_benign" in first
    rows = []
    for name, r in results.items():
        row = [NAMES.get(name, name), *(f"{r[k]:.2f}" for k in kinds)]
        rows.append(row + ([f"{100 * r['refusals_benign']:.0f} %"] if refusals else []))
    header = [
        "policy",
        *(k.replace("/", ": ") for k in kinds),
        *(["refusals of benign prompts"] if refusals else []),
    ]
    return table(header, rows)


def bars(histogram: Sequence[Sequence[float]], width: int = 48) -> str:
    """The reward-gap histogram as text: bin, bar, share of the pairs."""
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
    """The same prompts at every evaluation, one per domain in turn: (prompt, [(who, response)])."""
    first = next(iter(responses.values()))
    picked = stratified([str(r["domain"]) for r in first], count)
    out = []
    for i in picked:
        said = []
        for name, rows in responses.items():
            gold = f" (gold {rows[i]['gold']:+.1f})" if "gold" in rows[i] else ""
            said.append((NAMES.get(name, name) + gold, str(rows[i]["response"]).strip() or "(nothing)"))
        out.append((str(first[i]["prompt"]).strip(), said))
    return out


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else "..." + text[-most:]


def probe_table(probe: Sequence[Mapping[str, Any]]) -> str:
    """Share of right answers the reward model puts above a spoilt one, per mistake and kind."""
    kinds = list(dict.fromkeys(p["kind"] for p in probe))
    mistakes = list(dict.fromkeys(p["mistake"] for p in probe))
    share = {(p["kind"], p["mistake"]): p["right_above"] for p in probe}
    rows = [[m, *(f"{share[k, m]:.2f}" if (k, m) in share else "-" for k in kinds)] for m in mistakes]
    return table(["mistake", *kinds], rows)


def make_report(
    config: EvalConfig,
    results: Mapping[str, Mapping[str, Any]],
    responses: Mapping[str, Sequence[Mapping[str, Any]]],
    counts: Mapping[str, int],
) -> Report:
    """Put the whole run on a page."""
    data, rm = (read_json(Path(folder) / "manifest.json")["results"] for folder in (config.data, config.rm))
    source = "the built-in world" if data["source"] == "builtin" else data["source"]
    held_out = rm["held_out"]
    facts = [
        f"Task {data['task']}, data: {source}; {counts['kept']} held-out prompts, one response each at "
        f"temperature {config.temperature:g}, seed {config.seed}; 95 % bootstrap intervals over prompts.",
        f"Reward model: held-out label accuracy {percent(held_out['accuracy'])} %, log-loss "
        f"{held_out['log_loss']:.3f}, calibration error {held_out['calibration_error']:.3f}.",
    ]
    sections = [("Results", result_table(results)), ("By kind of prompt", kinds_table(results))]
    if config.split:
        split = read_json(Path(config.split) / "manifest.json")["results"]
        facts.append(
            f"Split: gamma {split['gamma']:.2f}, "
            + "{easy} easy, {hard} hard, {contradicted} contradicted pairs; ".format(**split["sizes"])
            + "DPO gets {pairs} pairs, PPO {prompts} prompts".format(**split["sizes"])
            + f"; {100 * split['share_gap_in_0_1']:.0f} % of the training pairs have a gap in [0, 1]."
        )
        sections.append(("Reward gap r(chosen) - r(rejected) of the training pairs", bars(split["histogram"])))
    if (probe := Path(config.rm) / "probe.json").exists():
        title = "Probe sheet: share of right answers scored above a spoilt one, before PPO"
        sections.append((title, probe_table(read_json(probe))))
    shown = samples(responses, config.samples)
    terminal = [*facts]
    markdown = ["# Report", *facts]
    for title, body in sections:
        terminal += ["", title, body]
        markdown += [f"## {title}", f"```\n{body}\n```" if body.startswith(("<", "[")) else body]
    terminal += ["", "Samples"]
    markdown.append("## Samples")
    for prompt, said in shown:
        terminal += [_shorten(prompt, 400), *(f"  {who}: {_shorten(text, 300)}" for who, text in said), ""]
        markdown += [f"```\n{prompt}\n```", "\n".join(f"- **{who}**: {text}" for who, text in said)]
    return Report("\n".join(terminal), "\n\n".join(markdown) + "\n")


def stage_table(run: Path) -> str:
    """What each stage of a run cost, from the manifests, in the order in which they ended."""
    rows = []
    for path in sorted(run.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime):
        manifest = read_json(path)
        rows.append([path.parent.name, f"{manifest['seconds']:.0f}", f"{manifest['peak_memory_mb']:.0f}"])
    total = sum(float(row[1]) for row in rows)
    return table(["stage", "seconds", "peak memory, MB"], [*rows, ["total", f"{total:.0f}", ""]])


def main(argv: list[str]) -> None:
    """Print the report of a run folder: python -m mpo.tools.report runs/hh"""
    if len(argv) != 1:
        raise InputError("usage: python -m mpo.tools.report RUN")
    page = Path(argv[0]) / "eval" / "report.txt"
    if not page.exists():
        raise InputError(f"{page}: no such file; has the run finished?")
    print(page.read_text(encoding="utf-8"))
    print(f"{stage_table(Path(argv[0]))}\n\nThe whole report: {page.with_suffix('.md')}")


if __name__ == "__main__":
    run_plain(main)
