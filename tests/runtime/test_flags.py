"""The command line, which is generated from the dataclasses of mpo/config.py."""

from __future__ import annotations

import dataclasses

import pytest

from mpo import config
from mpo.config import DPOConfig, SplitConfig
from mpo.runtime.errors import InputError
from mpo.runtime.flags import exact_div, headings, parse
from tests.support.scripts import run_script

NEEDED = ["--data", "d", "--model", "m", "--out", "o"]
STAGES = [c for c in vars(config).values() if isinstance(c, type) and c.__name__.endswith("Config")]


def test_flags_have_types_defaults_and_two_spellings():
    c = parse(DPOConfig, [*NEEDED, "--lr=0.5", "--max-prompt", "7", "--overwrite", "true"])
    assert (c.lr, c.max_prompt, c.overwrite, c.beta) == (0.5, 7, True, DPOConfig(data="", model="", out="").beta)


def test_a_negative_number_is_read_as_a_value():
    assert parse(SplitConfig, ["--data", "d", "--rm", "r", "--out", "o", "--gamma=-1"]).gamma == "-1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bta", "1"], "unknown flag --bta; did you mean --beta?"),
        (["--frobnicate", "1"], r"unknown flag --frobnicate \(--help"),
        (["--lr", "fast"], "--lr fast: not a number"),
        (["--batch", "1.5"], "--batch 1.5: not a whole number"),
        (["--overwrite", "maybe"], "expected true or false, found 'maybe'"),
        (["--lr"], "argument --lr: expected one argument"),
    ],
)
def test_the_message_names_the_wrong_flag(flags, message):
    with pytest.raises(InputError, match=message):
        parse(DPOConfig, [*NEEDED, *flags])


def test_missing_flags_and_unknown_choices_are_refused():
    with pytest.raises(InputError, match="required: --data, --model, --out"):
        parse(DPOConfig, [])
    with pytest.raises(InputError, match=r"unknown flag --bta; did you mean --beta\?"):
        parse(DPOConfig, ["--bta", "1"])
    with pytest.raises(InputError, match="--hard: invalid choice: 'x'"):
        parse(SplitConfig, ["--data", "d", "--rm", "r", "--out", "o", "--hard", "x"])


@pytest.mark.parametrize("cls", STAGES, ids=lambda c: c.__name__)
def test_every_field_has_a_comment(cls):
    comments = [name for group in headings(cls).values() for name in group]
    assert sorted(f.name for f in dataclasses.fields(cls)) == sorted(comments)
    assert cls.__doc__


def test_help_is_grouped_and_starts_with_the_flags_that_the_stage_itself_declares():
    groups = headings(config.PPOConfig)
    assert list(groups)[:5] == ["Prompts and models", "Rollout", "Reward and advantage", "Optimisation", "Critic"]
    assert list(groups)[-1] == "The run"
    assert "lr" in groups["Optimisation"]  # PPOConfig declares it again, with another comment
    assert groups["Optimisation"]["lr"] == "peak learning rate of the policy"
    assert {"warmup", "grad_clip"} <= set(groups["Optimisation"])  # inherited, and shown under the same heading
    text = run_script("train_ppo.py", "--help").stdout
    positions = [text.index(f"\n{heading}:\n") for heading in groups]
    assert positions == sorted(positions)
    assert text.startswith("usage: train_ppo.py --prompts PROMPTS --model MODEL --ref REF --rm RM")


def test_a_division_with_a_remainder_is_refused():
    assert exact_div(8, 2, "--a", "--b") == 4
    with pytest.raises(InputError, match=r"^--a 7 must be a multiple of --b 2$"):
        exact_div(7, 2, "--a", "--b")
    with pytest.raises(InputError, match="--a 0 and --b 2 must both be positive"):
        exact_div(0, 2, "--a", "--b")


SCRIPTS = """prepare_data.py train_tokenizer.py train_sft.py train_rm.py split_data.py
    train_dpo.py train_ppo.py eval.py chat.py"""


@pytest.mark.parametrize("script", SCRIPTS.split())
def test_every_script_has_a_help_text_with_defaults(script):
    text = run_script(script, "--help").stdout
    assert "--seed" in text
    assert "(default: 1)" in text


def test_bad_input_gives_one_line_and_exit_status_2(tmp_path):
    done = run_script("train_dpo.py", "--data", "none.jsonl", "--model", "m", "--out", tmp_path / "o", expect=2)
    assert done.stderr.startswith("train_dpo.py: error: --data none.jsonl: no such file or folder")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()
