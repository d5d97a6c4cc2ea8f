"""The command line, which is generated from the dataclasses of mpo/config.py."""

from __future__ import annotations

import dataclasses
import math
import re
import typing

import pytest

from benchmarks.run import BenchConfig
from benchmarks.scaling import ScalingConfig
from experiments.ablate import AblateConfig
from experiments.claims import ClaimsConfig
from mpo import config
from mpo.config import DataConfig, DPOConfig, PPOConfig, Range, RMConfig, SplitConfig
from mpo.runtime.errors import InputError
from mpo.runtime.flags import exact_div, headings, parse
from tests.support.scripts import run_script

NEEDED = ["--data", "d", "--model", "m", "--out", "o"]
STAGES = [c for c in vars(config).values() if isinstance(c, type) and c.__name__.endswith("Config")]
CONFIGS = [*STAGES, AblateConfig, ClaimsConfig, BenchConfig, ScalingConfig]

# Every number that is a flag, and the values it takes: ] and [ include a bound, ) and ( do not. oo is no bound.
INTERVALS = {
    "[0, oo)": "seed lora_rank microbatch train test limit critic_warmup samples weight_decay grad_clip save_every "
    "centring kl_coef missing_eos_penalty kl_target value_coef EvalConfig.temperature ChatConfig.temperature",
    "[1, oo)": "max_prompt batch minibatch iterations max_new group prompts repeats PPOConfig.epochs "
    "ScoreConfig.microbatch",
    "[2, oo)": "max_response",  # at least one token and EOS
    "[268, oo)": "vocab",  # 256 bytes, 4 special tokens, 7 strings with a token each, and one piece that is learnt
    "[0, 1000]": "threads keep jobs",
    "[0, 1000000]": "steps",
    "[0, 1]": "warmup final_lr gamma lam",
    "[0, 1)": "noise",
    "[0, 0.5)": "label_smoothing",
    "(0, 1)": "held_out",
    "(0, oo)": "lr lora_alpha beta kl_horizon clip critic_lr value_clip PPOConfig.temperature",
    "(0, 10000]": "SFTConfig.epochs RMConfig.epochs DPOConfig.epochs",
}
INTERVAL_OF = {name: interval for interval, names in INTERVALS.items() for name in names.split()}


def numbers() -> list[tuple[type, str, type]]:
    """Every numeric field of every config: (config, field, int or float)."""
    result = []
    for cls in CONFIGS:
        for name, kind in typing.get_type_hints(cls).items():
            result += [(cls, name, kind)] if kind in (int, float) else []
    return result


def ends(interval: str, kind: type) -> tuple[list[int | float], list[int | float]]:
    """The values at and next to the bounds of an interval: those inside, and those outside."""
    inside, outside = [], []
    for text, closed, outwards in zip(
        interval[1:-1].split(", "), (interval[0] == "[", interval[-1] == "]"), (-1, 1), strict=True
    ):
        if text == "oo":
            inside.append(2**31 - 1 if kind is int else 1e30)
            outside += [2**31, 10**400] if kind is int else []
            continue
        at = kind(text)
        beyond = at + outwards if kind is int else math.nextafter(at, outwards * math.inf)
        within = at - outwards if kind is int else math.nextafter(at, -outwards * math.inf)
        inside += [at, within] if closed else [within]
        outside += [beyond] if closed else [beyond, at]
    return inside, outside


def given(cls: type, name: str, value: object) -> object:
    """What a config has for a flag that is given as --name=value and as --name value, besides the flags it needs."""
    needed = [f"--{f.name}=x" for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    both = [
        getattr(parse(cls, [*needed, *words]), name) for words in ([f"--{name}={value}"], [f"--{name}", f"{value}"])
    ]
    assert both[0] == both[1]
    return both[0]


def refusal(cls: type, name: str, value: object) -> str:
    """The line with which a value of a flag is refused."""
    with pytest.raises(InputError) as error:
        given(cls, name, value)
    return str(error.value)


@pytest.mark.parametrize(("cls", "name", "kind"), numbers(), ids=lambda x: getattr(x, "__name__", x))
def test_a_number_is_taken_within_its_range_and_refused_outside(cls, name, kind):
    interval = INTERVAL_OF.get(f"{cls.__name__}.{name}") or INTERVAL_OF[name]
    inside, outside = ends(interval, kind)
    for value in inside:
        assert given(cls, name, value) == value
    for value in outside:
        line = refusal(cls, name, value)
        assert line.startswith(f"--{name} {value}"[:100])
        assert ": must be " in line
    for word in ("nan", "inf", "-inf", "word", "", *(["1e3", "3.0", "0.5"] if kind is int else ["1,5"])):
        assert refusal(cls, name, word).startswith(f"--{name} {word or repr(word)}: ")


@pytest.mark.parametrize(("cls", "name", "kind"), numbers(), ids=lambda x: getattr(x, "__name__", x))
def test_the_default_of_a_number_is_in_its_range(cls, name, kind):
    default = next(f.default for f in dataclasses.fields(cls) if f.name == name)
    assert given(cls, name, default) == default


@dataclasses.dataclass(frozen=True, kw_only=True)
class Careless:
    """A config with a number that has no range."""

    rows: int = 3  # how many


def test_a_number_without_a_range_is_an_error_of_the_program():
    with pytest.raises(TypeError, match=r"Careless.rows: a number needs a range"):
        parse(Careless, [])


def test_a_range_in_words_and_its_bounds():
    words = [str(r) for r in (Range(0, 1), Range(0, below=1), Range(above=0), Range(above=0, high=10_000), Range(268))]
    assert words == ["from 0 to 1", "at least 0 and below 1", "above 0", "above 0 and at most 10,000", "at least 268"]
    assert not any(Range().has(x) for x in (math.nan, math.inf, -math.inf))


@pytest.mark.parametrize(
    ("cls", "name", "value", "line"),
    [
        (DPOConfig, "lr", "-0.001", "--lr -0.001: must be above 0"),
        (DPOConfig, "lr", "-1e-3", "--lr -1e-3: must be above 0"),
        (DPOConfig, "beta", "nan", "--beta nan: must be a finite number"),
        (DPOConfig, "seed", "-1", "--seed -1: must be at least 0"),
        (DPOConfig, "seed", "2147483648", "--seed 2147483648: must be below 2^31"),
        (DPOConfig, "batch", "1e3", "--batch 1e3: not a whole number in digits"),
        (PPOConfig, "temperature", "0", "--temperature 0: must be above 0"),
        (DataConfig, "noise", "1.7", "--noise 1.7: must be at least 0 and below 1"),
        (RMConfig, "label_smoothing", "2", "--label_smoothing 2: must be at least 0 and below 0.5"),
        (DPOConfig, "keep", "-2", "--keep -2: must be from 0 to 1,000"),
    ],
)
def test_a_number_outside_its_range_is_refused_in_words(cls, name, value, line):
    assert refusal(cls, name, value) == line


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda c: c.__name__)
def test_help_shows_the_range_and_the_default_of_every_number(cls, capsys):
    with pytest.raises(SystemExit):
        parse(cls, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for _, name, _ in (n for n in numbers() if n[0] is cls):
        assert re.search(rf"--{name} (INT|FLOAT) [^-].*?\((above|at least|from) [^()]*; default: [\d.e-]+\)", text), (
            name
        )
    assert cls is not PPOConfig or "--gamma FLOAT discount (from 0 to 1; default: 1.0) --lam" in text
    assert cls is not DPOConfig or "--lr FLOAT peak learning rate (above 0; default: 5e-05) --keep" in text


def test_what_starts_with_one_dash_is_a_value_and_with_two_a_flag():
    split = ["--data", "d", "--rm", "r", "--out", "o"]
    for words in (["--gamma=-1"], ["--gamma", "-1"], ["--gamma", "-1e-3"], ["--gamma", "-q"]):
        assert parse(SplitConfig, [*split, *words]).gamma == words[-1].removeprefix("--gamma=")
    with pytest.raises(InputError, match="argument --gamma: expected one argument"):
        parse(SplitConfig, ["--gamma", *split])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bta", "1"], "unknown flag --bta; did you mean --beta?"),
        (["--frobnicate", "1"], r"unknown flag --frobnicate \(--help"),
        (["--lr", "fast"], "--lr fast: not a number"),
        (["--batch", "1.5"], "--batch 1.5: not a whole number"),
        (["--overwrite", "maybe"], "expected true or false, found 'maybe'"),
        (["--lr"], "argument --lr: expected one argument"),
        (["--bta=1"], "unknown flag --bta; did you mean --beta?"),
        (["1e-3"], r"unknown flag 1e-3 \(--help"),
        (["-lr", "1"], "unknown flag -lr; did you mean --lr?"),
        (["--data", "caf\udce9"], r"^caf\\udce9: not valid UTF-8$"),
    ],
)
def test_the_message_names_the_wrong_flag(flags, message):
    with pytest.raises(InputError, match=message):
        parse(DPOConfig, [*NEEDED, *flags])


def test_missing_flags_and_unknown_choices_are_refused():
    with pytest.raises(InputError, match="required: --data, --model, --out"):
        parse(DPOConfig, [])
    with pytest.raises(InputError, match=r"required: --out \("):
        parse(DPOConfig, [*NEEDED, "--out", ""])
    with pytest.raises(InputError, match=r"unknown flag --bta; did you mean --beta\?"):
        parse(DPOConfig, ["--bta", "1"])
    with pytest.raises(InputError, match="--hard: invalid choice: 'x'"):
        parse(SplitConfig, ["--data", "d", "--rm", "r", "--out", "o", "--hard", "x"])


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda c: c.__name__)
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
    assert "(at least 0; default: 1)" in " ".join(text.split())


def test_bad_input_gives_one_line_and_exit_status_2(tmp_path):
    done = run_script("train_dpo.py", "--data", "none.jsonl", "--model", "m", "--out", tmp_path / "o", expect=2)
    assert done.stderr.startswith("train_dpo.py: error: --data none.jsonl: no such file or folder")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()
