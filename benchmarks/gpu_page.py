"""The page of `make gpu-check`, docs/gpu.md, from what gpu.json holds. Parts that are missing or failed say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mpo.runtime.output import table

Row = dict[str, Any]
Entries = Mapping[str, Row]

NAMES = {
    "sft": "SFT step",
    "dpo-best": "DPO step, reference cached",
    "dpo": "DPO step, reference computed in the step",
    "reward": "reward-model step",
    "generate": "generation",
    "ppo": "PPO iteration",
}
INTRODUCTION = """# On a GPU

`make gpu-check` wrote this page and [`benchmarks/gpu.json`](../benchmarks/gpu.json), which has every single time
([hardware.md](hardware.md) says what the command does).

{warning}{about}

{parts}
"""
REHEARSED = """**This is a rehearsal on a CPU at the smallest sizes. No number on this page means anything**, and
the texts describe the real check.

"""
WORKLOAD = """The workload is that of [benchmarks.md](benchmarks.md) in a size that keeps a GPU busy: a Llama of 6
layers of width 1024 with random weights, a vocabulary of 32,768 tokens, prompts of 256 tokens and responses of 128. A
step has 32 pairs, of which SFT uses the chosen responses; generation and an iteration of PPO have 64 prompts. The
times are medians of a few steps; the first step does not count. "bf16" is `--precision bf16-mixed`. The memory is
what a step needs besides what was held before it.
"""
TEXTS = {
    "kernels": (
        "The Triton kernels against float64",
        """The tests of [tests/kernels](../tests/kernels) on the GPU itself, not in Triton's interpreter. They cover the
log-probs, exact KL, entropy and samples of the head, with their gradients, also with the vocabularies of real models;
the products of bf16-mixed; and the layers, which are torch's own operations here.""",
    ),
    "stages": (
        "Every stage on the GPU and on the CPU",
        """The tests of [test_device.py](../tests/runtime/test_device.py). Each stage is run on both, and must end
with the same weights and the same responses, up to rounding. One stage is killed on the GPU, and goes on there.""",
    ),
    "hh": ("A tiny `make hh`", "`make hh QUICK=1` on the GPU. Most of a stage's time is its start."),
    "speed": ("Steps in fp32 and in bf16", WORKLOAD),
    "plan": (
        "The memory plan against the measured peak",
        """The total of `--plan true`, and the most memory that torch's tensors took on the GPU
(`torch.cuda.max_memory_allocated`). The model is a random one of the preset `small`, and the rows have full length.""",
    ),
    "head": (
        "From hidden states to log-probs",
        """4,096 hidden states of width 1024, and a vocabulary of 32,000. *ours* is the Triton kernel, *plain* the
textbook's formula in torch, *product* the matrix product alone. *backward* adds the gradients, *pair* a reference model
and the exact KL. In the columns of bf16, hidden states and weights are bf16.""",
    ),
    "deterministic": (
        "The price of `--deterministic true`",
        """Some of the steps above, with operations that give the same bytes each time. The line below the table says
whether three steps of DPO, done three times, ended with the same bytes.""",
    ),
    "compile": (
        "`--compile true`",
        """Some of the steps above, with every layer compiled by torch. The first step includes the compilation; the
second case of a precision uses what the first one has compiled.""",
    ),
    "peers": (
        "Beside trl and transformers",
        """The same workload, one program after the other. The peers compute in bf16 as their users do: trl by autocast,
`generate` with weights in bf16. Ours uses `--precision bf16-mixed`.""",
    ),
}
"""The parts in the order of the page: title, and what stands above the result."""


def ms(row: Row | None) -> str:
    """A measured time, or what there is in its place."""
    if not row:
        return "-"
    if "seconds" not in row:
        return "failed" if "error" in row else "-"
    return f"{1e3 * row['seconds']:,.1f}"


def mib(row: Row | None, key: str = "mib") -> str:
    """A measured peak of memory."""
    return f"{row[key]:,.0f}" if row and row.get(key) is not None else "-"


def ratio(one: Row | None, other: Row | None) -> str:
    """How many times the second one's time the first one takes."""
    both = one and other and "seconds" in one and "seconds" in other
    return f"{one['seconds'] / other['seconds']:.2f}" if both and one and other else "-"


def names(rows: Row) -> list[str]:
    """The cases without their precisions, in order."""
    return list(dict.fromkeys(name.removesuffix("-bf16") for name in rows if name != "same bytes"))


# --- one function a part: from its result and those of the others to Markdown ----------------------


def of_tests(result: Row, entries: Entries) -> str:
    """The outcomes of tests."""
    failed = "".join(f"\n- `{name}`: {message}" for name, message in result.get("failed", {}).items())
    return f"{result['passed']} passed, {len(result['failed'])} failed, {result['skipped']} did not apply.{failed}"


def of_pipeline(result: Row, entries: Entries) -> str:
    """Seconds and memory of each stage."""
    rows = [
        [stage, f"{row['seconds']:.1f}", mib(row, "peak_memory_mb"), mib(row, "peak_device_memory_mb")]
        for stage, row in result.items()
    ]
    return table(["stage", "seconds", "memory, MB", "memory of the GPU, MB"], rows)


def of_speed(result: Row, entries: Entries) -> str:
    """Both precisions of each case."""
    rows = []
    for name in names(result):
        fp32, bf16 = result.get(name), result.get(f"{name}-bf16")
        rows.append([NAMES[name], ms(fp32), ms(bf16), ratio(fp32, bf16), mib(fp32), mib(bf16)])
    return table(["what", "fp32, ms", "bf16, ms", "bf16: times as fast", "fp32, MiB", "bf16, MiB"], rows)


def of_plan(result: Row, entries: Entries) -> str:
    """Planned and measured memory."""
    rows = []
    for name, row in result.items():
        done = bool(row.get("measured")) and "planned" in row
        share = f"{row['planned'] / row['measured']:.2f}" if done else "failed"
        rows.append([name, mib(row, "planned"), mib(row, "measured"), share])
    return table(["stage", "planned, MB", "measured, MB", "planned / measured"], rows)


def of_head(result: Row, entries: Entries) -> str:
    """Times and memory of each way."""
    rows = []
    for name in names(result):
        fp32, bf16 = result.get(name), result.get(f"{name}-bf16")
        rows.append([name, ms(fp32), ms(bf16), mib(fp32), mib(bf16)])
    return table(["way", "fp32, ms", "bf16, ms", "fp32, MiB", "bf16, MiB"], rows)


def against_speed(column: str, first: bool) -> Callable[[Row, Entries], str]:
    """A part whose cases are those of `speed`, computed in another way, which `column` names."""

    def render(result: Row, entries: Entries) -> str:
        usual = entries.get("speed", {}).get("result", {})
        rows = []
        for name in (n for n in result if n != "same bytes"):
            words = NAMES[name.removesuffix("-bf16")] + (", bf16" if name.endswith("-bf16") else "")
            start = [f"{result[name]['first']:.1f}"] if first and "first" in result[name] else ["-"] * first
            one, other = result[name], usual.get(name)
            rows.append([words, ms(other), ms(one), ratio(one, other), *start])
        text = table(["what", "usual, ms", f"{column}, ms", "times as long", *["first step, s"] * first], rows)
        if "same bytes" in result:
            yes = {True: "yes", False: "no", None: "not measured"}
            ways = (usual.get("same bytes", {}).get("same"), result["same bytes"].get("same"))
            text += f"\n\nThe same bytes each time: usual {yes[ways[0]]}, {column} {yes[ways[1]]}.\n"
        return text

    return render


def of_peers(result: Row, entries: Entries) -> str:
    """Ours, from the part `speed`, beside theirs."""
    usual = entries.get("speed", {}).get("result", {})
    rows, missing = [], dict[str, list[str]]()
    for name, theirs in result.items():
        words = NAMES[name.removesuffix("-bf16")] + (", bf16" if name.endswith("-bf16") else "")
        if "skipped" in theirs:
            missing.setdefault(theirs["skipped"], []).append(words)
            continue
        both = [ms(usual.get(name)), ms(theirs), ratio(theirs, usual.get(name))]
        rows.append([words, *both, mib(usual.get(name)), mib(theirs, "step_mib")])
    header = ["what", "ours, ms", "peer, ms", "times as fast", "ours, MiB", "peer, MiB"]
    why = [f"Not measured, since {reason}: {'; '.join(words)}." for reason, words in missing.items()]
    return "\n\n".join([table(header, rows)] * bool(rows) + why)


TABLES: dict[str, Callable[[Row, Entries], str]] = {
    "kernels": of_tests,
    "stages": of_tests,
    "hh": of_pipeline,
    "speed": of_speed,
    "plan": of_plan,
    "head": of_head,
    "deterministic": against_speed("deterministic", first=False),
    "compile": against_speed("compiled", first=True),
    "peers": of_peers,
}


def section(name: str, entries: Entries) -> str:
    """The text of one part."""
    title, text = TEXTS[name]
    entry = entries.get(name)
    words = [f"## {title}", text.rstrip()]
    if entry is None:
        return "\n\n".join([*words, "Not run yet."])
    if "error" in entry:
        words.append(f"**Failed or not finished**: {entry['error'].rstrip('.')}.")
    if "skipped" in entry:
        words.append(f"Skipped: {entry['skipped'].rstrip('.')}.")
    for row_name, row in entry["result"].items():
        if isinstance(row, dict) and "error" in row:
            words.append(f"- {row_name}: {row['error']}")
    if entry["result"]:
        words.append(TABLES[name](entry["result"], entries).rstrip())
    return "\n\n".join(words)


def page(about: Row, entries: Entries, rehearsal: bool) -> str:
    """The whole page."""
    gpu = about["device"] + (f", compute capability {about['capability']}" if "capability" in about else "")
    gpu += f", {about['mib'] / 1024:.0f} GiB" if "mib" in about else ""
    known = {name: about[name] for name in ("driver", "torch", "cuda", "triton") if about[name]}
    versions = ", ".join(f"{name} {version}" for name, version in known.items()).replace("cuda", "CUDA")
    facts = f"GPU: {gpu}. Machine: {about['machine']}. Versions: {versions}. Commit: {about['commit']}. "
    if about.get("lacks"):
        facts += f"**No Triton kernel ran**: {about['lacks']}. "
    facts += f"All parts together took {sum(entry['seconds'] for entry in entries.values()):.0f} s."
    parts = "\n\n".join(section(name, entries) for name in TEXTS)
    return INTRODUCTION.format(warning=REHEARSED if rehearsal else "", about=facts, parts=parts)
