"""The page of details: its cells, its tables, and that the functions and tests it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments import ablate, details
from experiments.details import BASES, BY_NAME, PAGE, RESULTS, TEMPLATE, VARIANTS
from experiments.grid import read_results
from experiments.patches import COLD, CUT, DROPOUT, HEAD, PATCHES, TOP_P
from mpo.config import DPOConfig, PPOConfig
from mpo.ppo.learner import ADAM_EPS
from mpo.runtime.errors import InputError
from mpo.runtime.flags import parse
from tests.support.scripts import ROOT

TEXT = TEMPLATE.read_text()
SECTIONS = re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:]
# The stage that is trained first with other flags, by make variable; and the base that has all stages before it.
BEFORE = {"train_sft.py": "tokenizer", "train_rm.py": "sft", "train_dpo.py": "split", "train_ppo.py": "dpo"}
SCRIPTS = {"SFT_FLAGS": "train_sft.py", "RM_FLAGS": "train_rm.py", "DPO_FLAGS": "train_dpo.py", "LOSS": "train_dpo.py"}
SCRIPTS |= {"PPO_FLAGS": "train_ppo.py"}


def row(variant: str, seed: int, golds: list[float], policy: str = "mpo", **more: object) -> dict:
    numbers = {"gold": sum(golds) / len(golds), "kl": 1.0, "words": 10.0, "eos": 1.0, "rm": {"accuracy": 0.7}}
    where = {"commit": "c", "machine": "m"}
    return {"task": "hh", "variant": variant, "policy": policy, "seed": seed, "golds": golds} | numbers | where | more


# --- cells ------------------------------------------------------------------------------------------


def test_a_variant_shares_exactly_the_stages_before_the_one_that_it_changes():
    """A base with the changed stage in it would be taken as it is, since make does not know of patches."""
    order = list(BEFORE.values())
    for v in VARIANTS[1:]:
        changed = ([PATCHES[v.patch].script] if v.patch else []) + [SCRIPTS[name] for name in v.variables]
        first = min((BEFORE[script] for script in changed), key=order.index, default="noisy")
        assert v.shares == (first if v.shares != "noisy" else "noisy"), v.name
    assert BASES["noisy"][2] == {"DATA_FLAGS": "--noise 0.3"}


def test_names_are_unique_and_every_patch_is_measured():
    assert len(BY_NAME) == len(VARIANTS)
    assert {v.patch for v in VARIANTS} - {""} == PATCHES.keys()
    for v in VARIANTS:
        assert set(v.policies) <= set(BY_NAME[v.against].policies), v.name
        assert v.against == "default" or BY_NAME[v.against].against == "default"


def test_the_grid_has_a_cell_of_each_policy_and_seed_and_fits_into_four_hours():
    cells = ablate.cells_of(parse(ablate.AblateConfig, ["--grid", "details"]))
    assert {c.seed for c in cells} == {21, 22, 23}
    assert len({c.key for c in cells}) == len(cells) == 3 * sum(len(v.policies) for v in VARIANTS)
    assert {c.variables.get("DATA_FLAGS") for c in cells if c.variant.startswith("noisy")} == {"--noise 0.3"}
    assert len({(c.run, c.policy) for c in cells}) == len(cells)
    assert all(c.made for c in cells)
    assert 1 < details.hours(cells) < 4
    assert details.hours([]) == 0
    assert [len(wave) for wave in details.waves(cells)] == [len(cells) - 9, 9]


def test_a_base_is_made_after_what_it_shares_and_only_where_it_is_needed():
    cells = ablate.cells_of(parse(ablate.AblateConfig, ["--grid", "details", "--seeds", "4,5"]))
    bases = details.base_cells([c for c in cells if c.variant == "low_beta"], "out", {"QUICK": "1"})
    assert [(b.run, b.source, b.policy) for b in bases] == [
        ("out/hh-4-tokenizer", "", "tokenizer"),
        ("out/hh-4-sft", "out/hh-4-tokenizer", "sft"),
        ("out/hh-4", "out/hh-4-sft", "split"),
        ("out/hh-5-tokenizer", "", "tokenizer"),
        ("out/hh-5-sft", "out/hh-5-tokenizer", "sft"),
        ("out/hh-5", "out/hh-5-sft", "split"),
    ]
    assert {b.variables["QUICK"] for b in bases} == {"1"}
    noisy = details.base_cells([c for c in cells if c.variant == "noisy_dear"], "out", {})
    assert [(b.run, b.source, b.variables) for b in noisy] == [
        (f"out/hh-{seed}-noisy", "", {"DATA_FLAGS": "--noise 0.3"}) for seed in (4, 5)
    ]


def test_rows_of_changed_cells_are_kept_apart_from_those_of_the_page():
    def results(*flags: str) -> Path:
        return ablate.results_of(parse(ablate.AblateConfig, list(flags)), "details")

    assert results("--grid", "details") == RESULTS
    assert results("--make", "QUICK=1") == Path("runs/ablate/details-hh.jsonl")
    assert results("--out", "elsewhere") == Path("elsewhere/details-hh.jsonl")


def test_the_grid_of_details_has_policies_of_its_own():
    with pytest.raises(InputError, match="--policy dpo: the grid details has its own"):
        ablate.cells_of(parse(ablate.AblateConfig, ["--grid", "details", "--policy", "dpo"]))


# --- tables -----------------------------------------------------------------------------------------


def test_the_reading_follows_from_the_interval():
    assert details.reading([-0.5, -0.6, -0.4]) == "**worse**"  # -0.5 ± 0.25
    assert details.reading([0.5, 0.6, 0.4]) == "**better**"
    assert details.reading([0.01, -0.02, 0.0]) == "makes no difference here"
    assert details.reading([0.3, -0.3, 0.0]) == "open"
    assert details.reading([-0.3, -0.5, -1.7]) == "open, but 0.2 or more worse on each seed"  # -0.83 ± 1.88
    assert details.reading([-0.1, -0.5, -1.7]) == "open"
    assert details.reading([0.3]) == "too few seeds to say"
    assert details.difference_text([-0.5, -0.6, -0.4]) == "-0.50 ± 0.25"
    assert details.difference_text([0.3]) == "+0.30"


def test_a_table_pairs_seeds_and_says_what_is_missing():
    rows = details.by_variant(
        [
            *(row("default", seed, [2.0, 3.0], kl=0.5) for seed in (1, 2, 3)),
            *(row("no_whitening", seed, [1.0, 2.0 - 0.2 * seed], words=20.0) for seed in (1, 2)),
            row("no_whitening", 9, [9.0, 9.0]),  # a seed without a default
            row("no_whitening", 1, [9.0, 9.0]) | {"task": "tldr"},
        ]
    )
    # differences: -1.1 and -1.2; their deviation is 0.0707, and t 12.706: half an interval is 0.635
    header, _, whitening, padding = details.measured(rows, ["no_whitening", "whitened_padding"]).splitlines()
    assert [c.strip() for c in whitening.split("|")[1:-1]] == [
        *(
            "advantages not whitened",
            "mpo",
            "2",
            "-1.15 ± 0.64",
            "**worse**",
            "1.35 (2.50)",
            "1.00 (0.50)",
            "20.0 (10.0)",
            "100 (100)",
        )
    ]
    assert [c.strip() for c in padding.split("|")[1:-1]][:5] == [
        "advantages whitened over padding, too",
        "mpo",
        "0",
        "not measured yet",
        "",
    ]
    assert "RM accuracy" not in header
    assert "RM accuracy" in details.measured(rows, ["new_trunk"])


def test_a_variant_may_be_compared_with_another_than_the_default():
    rows = details.by_variant([row("noisy", 1, [1.0]), row("noisy_dear", 1, [1.5]), row("default", 1, [9.0])])
    assert details.gold_difference(rows, BY_NAME["noisy_dear"], "mpo") == [0.5]
    assert "the same, four times the price of KL, against 30 % of the labels flipped" in details.measured(
        rows, ["noisy_dear"]
    )


def test_the_overview_begins_with_the_most_harmful_and_links_to_the_details():
    rows = [row("default", s, [2.0]) for s in (1, 2)] + [row("no_kl", s, [1.9]) for s in (1, 2)]
    rows += [row("top_p", s, [1.0 + s]) for s in (1, 2)] + [row("last_column", s, [0.5]) for s in (1, 2)]
    lines = details.overview(details.by_variant(rows), TEXT).splitlines()
    number, title = details.headings(TEXT)["last_column"]
    assert lines[2].startswith(f"| [{number}](#{number}-the-score-is-added-at-the-last-real-token)")
    assert details.anchor(number, title) == f"#{number}-the-score-is-added-at-the-last-real-token"
    order = [line.split("|")[2].strip() for line in lines[2:5]]
    assert order == ["score in the last column", "no price of KL", "sampled with top-p 0.9"]
    assert "Not measured yet: " in lines[-1]
    assert "sampled at 0.7, scored at 1" in lines[-1]


def test_the_figure_has_every_variant_with_two_seeds(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(details, "read_results", lambda path: rows)
    monkeypatch.setattr(details, "FIGURE", tmp_path / "details.png")
    monkeypatch.setattr(details.figures, "save", lambda figure, path: drawn.append((figure, path)))
    rows = [row("default", s, [2.0]) for s in (1, 2)]
    assert not details.draw()
    rows += [row("no_kl", s, [1.0 + 0.2 * s]) for s in (1, 2)] + [row("top_p", 1, [1.0])]
    assert details.draw()
    (figure, path) = drawn[0]
    assert path == tmp_path / "details.png"
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["no price of KL"]


# --- the page ---------------------------------------------------------------------------------------


def test_the_details_are_numbered_and_each_variant_is_shown_once():
    assert [int(section.split(".")[0]) for section in SECTIONS] == list(range(1, len(SECTIONS) + 1))
    assert len(SECTIONS) >= 30
    shown = [name for names in re.findall(r"^\{measured: (.*)\}$", TEXT, re.MULTILINE) for name in names.split()]
    assert sorted(shown) == sorted(BY_NAME.keys() - {"default"})


def test_every_detail_says_where_it_comes_from_where_it_is_and_what_keeps_it():
    for section in SECTIONS:
        text = section.split("\n## ")[0]
        for part in ("Source: ", "Code:", "Test: ", "{measured: "):
            assert part in text, (part, text[:60])
        tests = re.findall(r"\[(\w+)\]\(\.\./(tests/[^)]+)\)", text)
        code = re.findall(r"\[(\w+)\]\(\.\./((?!tests/)[^)]+\.py)\)", text)
        assert tests, text[:60]
        assert code, text[:60]
        prose = [line for line in text.splitlines()[1:] if line and not line.startswith(("Source", "{"))]
        assert len(prose) <= 8, text[:60]


def test_every_function_and_every_test_that_the_page_names_exists():
    named = re.findall(r"\[(\w+)\]\(\.\./([^)]+\.py)\)", TEXT)
    assert len(named) > 60
    for name, path in named:
        defined = rf"^(def|class) {name}\b|^{name}\b.* = "
        assert re.search(defined, (ROOT / path).read_text(), re.MULTILINE), (name, path)


def test_the_page_is_what_its_template_and_the_rows_give():
    written = details.page(TEXT, read_results(RESULTS))
    assert PAGE.read_text() == written, "run python -m experiments.details"
    assert not re.search(r"^\{|\{(overview|provenance|small)\}", written, re.MULTILINE)


def test_formulas_survive_markdown():
    """GitHub removes a backslash before a punctuation mark, also within $...$."""
    formulas = re.findall(r"\$[^$]+\$", TEXT)
    assert len(formulas) > 20
    assert [f for f in formulas if re.search(r"\\[^a-zA-Z ]", f) or "\n" in f] == []
    assert TEXT.count("$") == 2 * len(formulas)


def test_the_numbers_in_the_prose_are_those_of_the_code():
    prose, tasks = " ".join(TEXT.split()), (ROOT / "make" / "tasks.mk").read_text()
    assert (COLD, TOP_P, DROPOUT, HEAD, CUT) == (0.7, 0.9, 0.1, 10, 16)
    assert "sampled at 0.7" in BY_NAME["cold_sampler"].says
    for words in ("cut at 16 tokens", "dropout of 0.1", "Measured: ten times as large"):
        assert words in prose
    ppo, dpo = PPOConfig, DPOConfig
    assert "scratch_rm = --lr 5e-4" in " ".join(tasks.split())
    assert (dpo.lr, "Here it is a tenth of the reward model's" in prose) == (5e-5, True)
    assert (dpo.beta, "Here $\\beta$ is 0.5" in prose) == (0.5, True)
    assert (ppo.missing_eos_penalty, "So 1 is subtracted from its score" in prose) == (1.0, True)
    assert (ppo.critic_warmup, "In the first three rollouts" in prose) == (3, True)
    assert (ppo.gamma, ppo.lam, "Gamma is 1, lambda 0.95" in prose) == (1.0, 0.95, True)
    assert (ADAM_EPS, "Adam's epsilon is 1e-5" in prose) == (1e-5, True)
    assert (ppo.warmup, ppo.final_lr, "rises in the first 5 % of the steps and then falls to 0" in prose) == (
        0.05,
        0,
        True,
    )
    assert (ppo.clip, "clipped to $1 \\pm 0.2$" in prose) == (0.2, True)
    assert (ppo.value_clip, ppo.grad_clip, "by 0.2, gradients have a norm of at most 1" in prose) == (0.2, 1.0, True)
    assert (ppo.epochs, "here there is one" in prose) == (1, True)
    assert (ppo.batch, "rollouts of 32 responses in place of 128" in prose) == (128, True)
