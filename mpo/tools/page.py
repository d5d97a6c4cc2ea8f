"""The page of a run: one HTML file with figures, tables and samples, which needs nothing but a browser.

`python -m mpo.tools.page RUN` prints the text report, and writes RUN/report.html where matplotlib is installed. A run
that is still going on, or that lacks some stages, gets a page of what it has.

Everything that comes from files is escaped. The page forbids itself to load anything from anywhere, and to run any
script but its own (Content-Security-Policy).
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from mpo.data.dialogue import ASSISTANT
from mpo.evaluation import stratified
from mpo.runtime.entry import one_argument, run_plain
from mpo.runtime.files import read_json, write_text
from mpo.runtime.output import interval, percent
from mpo.tools import page_figures as figures
from mpo.tools import page_svg, report
from mpo.tools.page_run import (
    StageFiles,
    finished_eval,
    of_kind,
    read_responses,
    read_run,
    read_scores,
    warnings_of,
)

TEMPLATE = Path(__file__).with_name("page.html")
PAGE = "report.html"
MOST_SAMPLES = 200  # prompts whose responses the page shows
NEEDS = (
    "With figures, for a browser: make report RUN={run} writes {page}. It needs matplotlib, and installs it where "
    "there is a network (without make: pip install matplotlib)"
)


def escape(value: object) -> str:
    """Any text as HTML, also within quotes. Stand-ins for half a character, which UTF-8 lacks, become a mark."""
    return html.escape(str(value).encode("utf-8", "replace").decode(), quote=True)


def figure(title: str, drawing: str, about: str = "") -> str:
    """A figure with its caption."""
    small = f"<small>{escape(about)}</small>" if about else ""
    words = escape(f"{title}. {about}")
    return (
        f'<figure role="group" aria-label="{words}">\n<figcaption>{escape(title)}{small}</figcaption>\n'
        f"{page_svg.with_variables(drawing, title)}\n</figure>"
    )


def grid(drawn: Sequence[str]) -> str:
    """Figures side by side, as many as fit."""
    return '<div class="figures">\n' + "\n".join(drawn) + "\n</div>"


def beside(left: str, right: str) -> str:
    """Two pieces side by side, on a phone one below the other."""
    return f'<div class="beside">\n{left}\n<div>\n{right}\n</div>\n</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its cells are HTML already. The first cell of each row is the row's name."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in row[1:])
        for row in rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


# --- sections: each returns HTML, or "" where the run has nothing for it ----------------------------


def facts(stages: Sequence[StageFiles]) -> str:
    """What was run: task, data, seed, model, and what the split and the reward model came to."""
    lines = []
    for stage in of_kind(stages, "prepare_data"):
        data = stage.results
        source = {"builtin": "the built-in world", None: "unfinished"}.get(data.get("source"), data.get("source"))
        lines.append(f"Task {stage.flags.get('task', '?')}, data: {source}, seed {stage.flags.get('seed', '?')}.")
    for stage in of_kind(stages, "train_sft"):
        size = f", {stage.results['parameters']:,} parameters" if "parameters" in stage.results else ""
        lines.append(f"Model: {stage.flags.get('model', '?')}{size}.")
    for stage in of_kind(stages, "train_rm"):
        if held_out := stage.results.get("held_out"):
            right = percent(held_out["accuracy"])
            lines.append(f"Reward model {stage.name}: {right} % of the held-out labels right.")
    evaluation = finished_eval(stages)
    if evaluation:
        lines.append(
            f"Evaluation: {evaluation.results['prompts']} held-out prompts, one response each at temperature "
            f"{evaluation.flags.get('temperature', 1):g}. Intervals are 95 % bootstrap intervals over prompts."
        )
    return "\n".join(f"<p>{escape(line)}</p>" for line in lines)


def warnings_box(stages: Sequence[StageFiles]) -> str:
    """Signs of collapse, unfinished stages, stages whose inputs have changed."""
    lines = warnings_of(stages)
    if not lines:
        return '<p class="note" id="warnings">No warnings: no collapse, nothing unfinished or outdated.</p>'
    items = "\n".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="warnings" id="warnings"><strong>Warnings</strong>\n<ul>\n{items}\n</ul></div>'


def result_rows(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The result table of the evaluation."""
    judge = report.judge_of(results)
    header = [
        "policy",
        *(["gold reward"] if judge == "gold" else []),
        "RM reward",
        "KL",
        "win %",
        "win % at equal length",
    ]
    header += ["win % against chosen", "words", "EOS %", "distinct"]
    rows = []
    for name, r in results.items():
        row = [
            escape(figures.name_of(name)),
            *([interval(r["gold"])] if judge == "gold" else []),
            interval(r["reward"]),
        ]
        row += [interval(r["kl"], 1) if "kl" in r else "", _win(r[f"{judge}_win_sft"])]
        row += [f"{100 * r[f'{judge}_win_sft_length_controlled']:.0f}", _win(r[f"{judge}_win_chosen"])]
        row += [f"{r['words']:.0f}", f"{100 * r['eos_rate']:.0f}", f"{r['distinct_1']:.2f}/{r['distinct_2']:.2f}"]
        rows.append(row)
    return table(header, rows)


def _win(rate: Sequence[float]) -> str:
    """A win rate in per cent; "" for a policy against itself."""
    return percent(rate) if len(set(rate)) > 1 or rate[0] != 0.5 else ""


def result_section(stages: Sequence[StageFiles]) -> str:
    """The policies compared on held-out prompts."""
    evaluation = finished_eval(stages)
    if not evaluation:
        return ""
    results = read_json(evaluation.folder / "results.json")["policies"]
    judge, first = report.judge_of(results), figures.name_of(next(iter(results)))
    by = "gold reward, the true reward of the built-in world" if judge == "gold" else "the reward model, which flatters"
    drawn = []
    for opponent, name in (("sft", first), ("chosen", figures.name_of("chosen"))):
        shown = len(results) - 1
        drawing = page_svg.svg(figures.draw_win_rates(results, judge, opponent), figures.rows_height(shown))
        drawn.append(figure(f"Win rate against {name}", drawing, f"judged by {by}; a tie is half a win"))
    for kind, title in (("gold", "Gold reward against KL"), ("reward", "Reward model's score against KL")):
        if kind in next(iter(results.values())):
            about = "each policy on held-out prompts; dashed: the data set's chosen responses"
            drawn.append(figure(title, page_svg.svg(figures.draw_policies(results, kind)), about))
    words = {
        n: [int(r["words"]) for r in rows] for n, rows in read_responses(evaluation, list(results)).items() if rows
    }
    if words:
        about = "dot: median; band: middle half; line: from the 5th to the 95th percentile"
        drawing = page_svg.svg(figures.draw_lengths(words), figures.rows_height(len(words)))
        drawn.append(figure("Lengths", drawing, about))
    note = (
        f"Wins are against {first} unless the column says otherwise, by {by}. KL is to {first}, in nats per response."
    )
    return f'{result_rows(results)}\n<p class="note">{escape(note)}</p>\n{grid(drawn)}'


def ppo_section(stages: Sequence[StageFiles]) -> str:
    """The reward model's score against the KL along PPO."""
    ppo = [s for s in of_kind(stages, "train_ppo") if any("score" in m and "kl_exact" in m for m in s.metrics)]
    if not ppo:
        return ""
    about = "small dots: rollouts; line: their running mean, from the hollow to the filled dot"
    drawing = page_svg.svg(figures.draw_reward_against_kl(ppo), 260)
    note = (
        "A policy that gains score while its KL stays small learns what the reward model rewards close to the "
        "reference. A score that goes on rising with the KL, while the gold reward or the win rate above does not, is "
        "the reward model being exploited. The gold reward is measured only in the evaluation: training never sees it."
    )
    return beside(figure("Score against KL along PPO", drawing, about), f"<p>{note}</p>")


def curves_section(stages: Sequence[StageFiles]) -> str:
    """The learning curves of every stage that trains."""
    drawn = []
    for stage in stages:
        for curve in figures.CURVES.get(stage.kind, ()):
            if any(len(figures.column(stage.metrics, metric)[0]) for metric in curve.lines):
                state = "" if stage.manifest else " (unfinished)"
                title = f"{figures.name_of(stage.name)}{state}: {curve.title}"
                drawn.append(figure(title, figures.learning_curve(stage, curve)))
    about = "Faint: single steps. Strong: their running mean, whose last value is written beside it."
    return f'<p class="note">{about}</p>\n{grid(drawn)}' if drawn else ""


def split_section(stages: Sequence[StageFiles]) -> str:
    """The histogram of reward gaps, with the parts of the split."""
    parts = []
    for stage in of_kind(stages, "split_data"):
        scores = read_scores(stage) if stage.manifest else {}
        if not any(scores.values()):
            continue
        r = stage.results
        by_gap = stage.flags.get("by", "gap") == "gap"
        drawing = page_svg.svg(figures.draw_gaps(scores, float(r["gamma"]) if by_gap else None), 250)
        text = report.split_text(r["gamma"], r["sizes"], r["share_gap_in_0_1"])
        more = "" if by_gap else " The split is by the gap over its uncertainty, so the parts overlap here."
        title = "Reward gaps of the training pairs"
        about = (
            "easy: the reward model agrees with the label, clearly; contradicted: it disagrees, clearly; hard: between"
        )
        parts.append(
            f"<p>{escape(text[0].upper() + text[1:] + '.' + more)}</p>\n{grid([figure(title, drawing, about)])}"
        )
    return "\n".join(parts)


def probe_section(stages: Sequence[StageFiles]) -> str:
    """The probe sheet of every reward model that has one, as a heat map."""
    parts = []
    for stage in of_kind(stages, "train_rm"):
        path = stage.folder / "probe.json"
        if not path.is_file():
            continue
        probe = read_json(path)
        kinds = list(dict.fromkeys(str(p["kind"]) for p in probe))
        mistakes = list(dict.fromkeys(str(p["mistake"]) for p in probe))
        share = {(str(p["kind"]), str(p["mistake"])): float(p["right_above"]) for p in probe}
        rows = [[escape(m.replace("_", " ")), *(_heat(share.get((k, m))) for k in kinds)] for m in mistakes]
        heat = table(["mistake", *map(escape, kinds)], rows).replace("<table>", '<table class="heat">')
        parts.append(f"<h3>{escape(stage.name)}</h3>\n{heat}")
    about = "Share of right answers, in %, which the reward model scores above one with this mistake. 50 is a coin."
    return f"<p>{about}</p>\n" + "\n".join(parts) if parts else ""


def _heat(share: float | None) -> str:
    """A cell of the heat map: the further below 1, the redder."""
    return (
        "<td></td>" if share is None else f'<td style="--wrong:{min(85, 170 * (1 - share)):.0f}">{100 * share:.0f}</td>'
    )


def _scores_line(row: Mapping[str, Any]) -> str:
    numbers = {"gold": "gold {:+.1f}", "reward": "RM {:+.2f}", "kl": "KL {:.1f}", "words": "{:.0f} words"}
    parts = [form.format(row[key]) for key, form in numbers.items() if isinstance(row.get(key), int | float)]
    return ", ".join(parts) + ("" if row.get("finished", True) else ", cut off")


def samples_section(stages: Sequence[StageFiles]) -> str:
    """Responses side by side, with a filter by kind and a search."""
    evaluation = finished_eval(stages)
    policies = list(read_json(evaluation.folder / "results.json")["policies"]) if evaluation else []
    responses = read_responses(evaluation, policies) if evaluation else {}
    first = next(iter(responses.values()), [])
    if not first:
        return ""
    picked = stratified([str(r.get("domain", "")) for r in first], MOST_SAMPLES)
    articles = []
    for i in picked:
        kind = str(first[i].get("domain", ""))
        answers = "\n".join(
            f'<div class="answer"><h4>{escape(figures.name_of(name))}</h4><p>'
            f"{escape(str(rows[i].get('response', '')).strip()) or '<em>(empty)</em>'}</p>"
            f'<p class="note">{escape(_scores_line(rows[i]))}</p></div>'
            for name, rows in responses.items()
        )
        prompt = escape(str(first[i].get("prompt", "")).removesuffix(ASSISTANT).strip())
        articles.append(
            f'<article data-kind="{escape(kind)}">\n<div class="note">{escape(kind)}</div>\n'
            f'<div class="prompt">{prompt}</div>\n<div class="answers">\n{answers}\n</div>\n</article>'
        )
    kinds = sorted({str(first[i].get("domain", "")) for i in picked})
    options = "".join(f'<option value="{escape(k)}">{escape(k)}</option>' for k in kinds)
    controls = (
        f'<div class="controls" hidden><label>kind <select><option value="">all</option>{options}</select></label>\n'
        '<label>search <input type="search"></label> <output></output></div>'
    )
    most = (
        f"{len(picked)} of the {len(first)} prompts, equally from every kind"
        if len(picked) < len(first)
        else "All prompts"
    )
    where = f"every response is in {evaluation.name}/responses-*.jsonl" if evaluation else ""
    return f'<p class="note">{escape(f"{most}; {where}.")}</p>\n{controls}\n' + "\n".join(articles)


def files_section(stages: Sequence[StageFiles]) -> str:
    """What each stage was made from, with hashes; and the time and memory that it took."""
    most = max((float(s.manifest.get("seconds", 0)) for s in stages), default=0) or 1
    rows, total = [], 0.0
    for stage in stages:
        made = stage.manifest
        seconds = float(made.get("seconds", 0))
        total += seconds
        bar = f'<span class="bar" style="width:{6 * seconds / most:.2f}rem"></span>{seconds:,.0f}'
        memory = f"{made['peak_memory_mb']:,.0f}" if "peak_memory_mb" in made else ""
        if "peak_device_memory_mb" in made:
            memory += f" + {made['peak_device_memory_mb']:,.0f} on the GPU"
        state = "finished" if made else "unfinished"
        link = f" (in {stage.folder.resolve().parent})" if stage.folder.is_symlink() else ""
        parents = ", ".join(stage.parents) or "-"
        rows.append([
            escape(stage.name), escape(state + link), bar if made else "", memory,
            f"<code>{escape(stage.model_hash[:12])}</code>", f'<td class="long">{escape(parents)}</td>',
        ])  # fmt: skip
    rows.append(["total", "", f"{total:,.0f}", "", "", ""])
    note = (
        "SHA-256 of each stage's model or, without one, of its result; the first 12 digits. make verify hashes every "
        "file again and compares."
    )
    header = ["stage", "state", "seconds", "peak memory, MB", "SHA-256", "made from"]
    return f'{table(header, rows)}\n<p class="note">{note}</p>'


SECTIONS: dict[str, tuple[str, Callable[[Sequence[StageFiles]], str]]] = {
    "results": ("Results on held-out prompts", result_section),
    "ppo": ("Score against KL along PPO", ppo_section),
    "curves": ("Learning curves", curves_section),
    "split": ("Split by reward gap", split_section),
    "probe": ("Probe sheet of the reward model", probe_section),
    "samples": ("Samples side by side", samples_section),
    "files": ("Stages, time, memory and hashes", files_section),
}


def make_page(run: Path) -> str:
    """The page of a run. Raises InputError for a folder without stages, or a damaged file."""
    stages = read_run(run)
    made = {name: (title, section(stages)) for name, (title, section) in SECTIONS.items()}
    made = {name: (title, content) for name, (title, content) in made.items() if content}
    links = "\n".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in made.items())
    parts = [
        f"<h1>{escape(run.resolve().name)}: Mixed Preference Optimization</h1>",
        facts(stages),
        warnings_box(stages),
    ]
    parts.append(f"<nav>\n{links}\n</nav>")
    parts += [
        f'<section id="{name}">\n<h2>{title}</h2>\n{content}\n</section>' for name, (title, content) in made.items()
    ]
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = escape(run.resolve().name)
    return Template(template).substitute(title=title, body="\n".join(parts), script_hash=digest)


def main(argv: list[str]) -> None:
    """Print the text report of the run folder argv[0], and write its page where matplotlib is installed."""
    run = Path(one_argument(argv, "mpo report RUN"))
    if not page_svg.available() or (run / "eval" / "report.txt").exists():
        report.main([str(run)])
    if not page_svg.available():
        print(NEEDS.format(run=run, page=run / PAGE))
        return
    write_text(run / PAGE, make_page(run))
    print(f"With figures, for a browser: {run / PAGE}")


if __name__ == "__main__":
    run_plain(main)
