"""One frozen dataclass per stage; the command line is generated from it.

The comment behind a field is its help text. Types are str, int, float, bool and Literal
(a choice). Unknown and mistyped flags fail and name the nearest one.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
import re
import sys
import typing
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

from mpo.errors import InputError

C = TypeVar("C")
SIZES = {"batch", "minibatch", "microbatch", "max_prompt", "max_response", "max_new", "iterations", "group", "saves"}


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every stage takes."""

    out: str  # folder this stage writes
    seed: int = 1  # every random choice is keyed by (seed, purpose, step)
    overwrite: bool = False  # replace a finished stage in --out
    threads: int = 0  # CPU threads; 0: OMP_NUM_THREADS where that is set, else all cores


@dataclass(frozen=True, kw_only=True)
class Limits(Common):
    """What fits in a sequence; rows that do not are cut or dropped, counted and printed."""

    max_prompt: int = 384  # prompt tokens with BOS; the oldest turns of a longer dialogue are cut
    max_response: int = 128  # response tokens with EOS; a row with a longer response is dropped
    bf16: bool = False  # round what matrix products multiply to bf16; weights and sums stay fp32
    dtype: Literal["float32", "bfloat16"] = "float32"  # what weights are held in; bfloat16: half, and less exact
    device: str = "auto"  # auto (a GPU where there is one), cpu, cuda, cuda:1, mps
    deterministic: bool = False  # on a GPU, too: the same bytes each time, more slowly (on a CPU always)
    plan: bool = False  # print how much memory the stage will take, and stop there
    shard: bool = False  # with several processes, each keeps a part of every weight (FSDP2), not a copy (DDP)


@dataclass(frozen=True, kw_only=True)
class Training(Limits):
    """What SFT, reward model, DPO and PPO share."""

    lr: float = 1e-3  # peak learning rate of AdamW
    warmup: float = 0.05  # share of the steps with a rising learning rate
    final_lr: float = 0.1  # learning rate of the last step, as a share of the peak (cosine)
    weight_decay: float = 0.0  # AdamW's, on matrices only
    grad_clip: float = 1.0  # largest norm of the gradient
    batch: int = 32  # rows of one optimiser step
    microbatch: int = 32  # rows that fit in memory at once; must divide batch
    optimiser: Literal["adamw", "adafactor"] = "adamw"  # adafactor: hardly any memory of its own
    recompute: bool = False  # activations in the backward pass, layer by layer, instead of keeping them all
    compile: bool = False  # layers by torch.compile: minutes at first, then faster on GPUs
    lora_rank: int = 0  # of low-rank adapters, which alone learn (LoRA); 0: all weights learn
    lora_alpha: float = 16.0  # their scale times their rank
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # the matrices that get one
    save_every: float = 60.0  # seconds between saves, from which an interrupted stage goes on; 0: behind every step
    saves: int = 2  # so many of the last saves are kept until the stage is finished


@dataclass(frozen=True, kw_only=True)
class DataConfig(Common):
    """Bring preference data into rows: {"id", "prompt", "chosen", "rejected"}."""

    task: Literal["hh", "tldr"] = "hh"  # which of the paper's two tasks
    data: str = "builtin"  # builtin, a folder in the official layout, or a row file (.jsonl, .gz)
    train: int = 28000  # builtin: training pairs; else: at most this many, 0 for all
    test: int = 1600  # builtin: test pairs; else: at most this many, 0 for all
    noise: float = 0.0  # builtin: share of the training labels that are flipped, beyond the annotators' errors
    held_out: float = 0.1  # share of a lone row file that becomes the test split


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Common):
    """Train a sentencepiece tokenizer on the training split, or take the one of a model."""

    data: str  # folder of the data stage
    model: str = ""  # a model folder or preset name; a folder's tokenizer is taken as it is
    vocab: int = 4096  # most pieces; a small corpus gets fewer


@dataclass(frozen=True, kw_only=True)
class SFTConfig(Training):
    """Supervised fine-tuning on the chosen responses, from scratch or from a model."""

    data: str  # folder of the data stage
    tokenizer: str  # folder with tokenizer.model or tokenizer.json
    model: str = "tiny"  # a preset (trained from scratch) or a folder in Hugging Face layout
    loss_on: Literal["response", "all"] = "response"  # which tokens count
    lr: float = 2e-3  # peak learning rate of AdamW
    weight_decay: float = 0.1  # AdamW's, on matrices only
    epochs: float = 3.0  # passes over the training rows


@dataclass(frozen=True, kw_only=True)
class RMConfig(Training):
    """Train a reward model: a scalar head on the SFT trunk, Bradley-Terry loss."""

    data: str  # folder of the data stage
    model: str  # folder of the SFT model
    use_margin: bool = False  # ask for r(chosen) - r(rejected) >= the row's margin (Llama 2)
    label_smoothing: float = 0.0  # share of the labels taken to be wrong
    centring: float = 0.0  # weight of (r_w + r_l)^2, which keeps raw rewards around 0
    lr: float = 3e-4  # peak learning rate of AdamW
    weight_decay: float = 0.1  # AdamW's, on matrices only
    epochs: float = 2.0  # passes over the training pairs


Use = Literal["dpo", "flip", "smooth", "ppo", "drop"]


@dataclass(frozen=True, kw_only=True)
class SplitConfig(Limits):
    """Score every training pair and split by reward gap: easy, hard, contradicted.

    What a part is used for: dpo trains on its pairs; flip does so with the labels turned round;
    smooth with the reward model's doubt of each label, for --loss cdpo, robust or exo_pair; ppo
    takes its prompts; drop leaves it out.
    """

    data: str  # folder of the data stage
    rm: str  # folder of the reward model, or folder,folder,... of an ensemble: mean scores
    by: Literal["gap", "uncertainty"] = "gap"  # uncertainty: the ensemble's mean gap over its standard error
    gamma: str = "q0.5"  # the threshold: a number, or qX: the X quantile of |gap|
    easy: Use = "dpo"  # what pairs with gap >= gamma are used for
    hard: Use = "ppo"  # what pairs with |gap| < gamma are used for
    contradicted: Use = "ppo"  # what pairs with gap <= -gamma are used for
    batch: int = 64  # pairs scored at once


@dataclass(frozen=True, kw_only=True)
class DPOConfig(Training):
    """Preference optimisation on pairs (the easy ones in MPO) against a frozen reference."""

    data: str  # a row file, such as easy.jsonl of the split
    model: str  # folder of the model to train
    ref: str = ""  # folder of the reference model; the model itself where empty
    loss: str = "sigmoid"  # a loss, or a sum such as sigmoid+0.1*sft, or with constants: simpo:gamma=0.5
    beta: float = 0.5  # strength of the pull towards the reference
    lr: float = 5e-5  # peak learning rate of AdamW
    epochs: float = 1.0  # passes over the pairs
    steps: int = 0  # optimiser steps instead of epochs; 0: as many as the epochs make
    keep: int = 0  # also keep this many models on the way, equally far apart, in step-N folders


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Training):
    """PPO on prompts (the hard ones in MPO) with a KL penalty to the reference model."""

    prompts: str  # a row file; only its prompts are read
    model: str  # folder of the model to train
    ref: str  # folder of the KL reference: the DPO model for MPO, the SFT model for vanilla PPO
    rm: str  # folder of the reward model; its weights also start the critic
    limit: int = 0  # only the first so many prompts; 0: all
    iterations: int = 50  # rollouts, each followed by `epochs` passes over it
    keep: int = 0  # also keep this many models on the way, equally far apart, in step-N folders
    batch: int = 128  # prompts of one rollout
    minibatch: int = 64  # rows of one optimiser step; must divide batch
    microbatch: int = 16  # rows that fit in memory at once; must divide minibatch
    epochs: int = 2  # passes over a rollout
    max_new: int = 64  # response tokens; a response without EOS by then is unfinished
    temperature: float = 1.0  # divides the logits in sampling and in every log-prob alike
    lr: float = 2e-4  # peak learning rate of the policy
    shared_critic: bool = False  # the critic is a head on the policy's trunk: half the work, no model of its own
    value_coef: float = 0.1  # weight of the value loss where the critic shares the trunk
    critic_lr: float = 5e-4  # peak learning rate of the critic
    critic_warmup: int = 3  # first rollouts that train the critic alone
    advantage: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce++"] = "gae"  # all but gae need no critic
    group: int = 1  # responses to each prompt of a rollout; must divide batch
    kl_coef: float = 0.05  # beta: price of one nat of KL to the reference, per token
    kl_in: Literal["reward", "loss"] = "reward"  # where that price is paid
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"  # how the KL of a token is measured
    ref_rate: float = 0.0  # share by which the reference follows the policy after each rollout
    clip_score: float = 0.0  # scores are clipped to +- this; 0: not
    whiten_rewards: bool = False  # scale per-token rewards to variance 1 before the advantages
    kl_target: float = 0.0  # adaptive controller's target KL per response; 0: kl_coef stays fixed
    kl_horizon: float = 10000.0  # adaptive controller's horizon, in responses
    gamma: float = 1.0  # discount
    lam: float = 0.95  # lambda of GAE
    clip: float = 0.2  # policy ratio is clipped to [1 - clip, 1 + clip]
    value_clip: float = 0.2  # new values stay this close to the old ones
    missing_eos_penalty: float = 1.0  # subtracted from the score of an unfinished response


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Limits):
    """Sample every policy on held-out prompts; win rates, KL, lengths, gold where known."""

    data: str  # folder of the data stage
    rm: str  # folder of the reward model
    split: str = ""  # folder of the split, for the gap histogram in the report
    policies: str = ""  # name=folder, ...; the first one is the baseline (SFT)
    prompts: int = 400  # held-out prompts, stratified by domain
    batch: int = 100  # prompts sampled at once
    max_new: int = 64  # response tokens
    temperature: float = 1.0  # of the sampling
    samples: int = 4  # prompts shown side by side


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Type to a model."""

    model: str  # folder of any stage's model
    task: Literal["hh", "tldr"] = "hh"  # hh: a dialogue; tldr: paste a post on one line
    max_new: int = 96  # response tokens
    temperature: float = 0.7  # 0: always the likeliest token
    seed: int = 1  # of the sampling
    device: str = "auto"  # auto (a GPU where there is one), cpu, cuda, cuda:1, mps


# --- the command line --------------------------------------------------------------------------


def _comments(cls: type) -> dict[str, str]:
    """The comment behind each field, from the source of the class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        found |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.MULTILINE))
    return found


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return text.lower() == "true"


def parse(cls: type[C], argv: list[str]) -> C:
    """Build a config from flags: --name value or --name=value, underscores or dashes alike.

    Errors: InputError in one line for an unknown flag (naming the nearest), a wrong value or a
    missing one.
    """
    program = Path(sys.argv[0]).name

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message} (--help lists every flag)")

    parser = Parser(prog=program, description=(cls.__doc__ or "").strip(), allow_abbrev=False)
    comments, types = _comments(cls), typing.get_type_hints(cls)
    for field in fields(cls):  # type: ignore[arg-type]
        kind, required = types[field.name], field.default is MISSING
        choices = typing.get_args(kind) or None
        text = comments.get(field.name, "").replace("%", "%%")
        parser.add_argument(
            f"--{field.name}",
            type=_boolean if kind is bool else str if choices else kind,
            choices=choices,
            required=required,
            default=None if required else field.default,
            metavar=None if choices else kind.__name__.upper(),
            help=text + ("" if required else f" (default: {field.default})"),
        )
    argv = [re.sub(r"^--[^=]+", lambda m: m[0].replace("-", "_").replace("__", "--", 1), a) for a in argv]
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-"), [f.name for f in fields(cls)], 1)  # type: ignore[arg-type]
        hint = f"; did you mean --{near[0]}?" if near else " (--help lists every flag)"
        raise InputError(f"unknown flag {unknown[0]}{hint}")
    for name, value in vars(values).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} {value}: must be a finite number")
        if isinstance(value, int) and not (1 if name in SIZES else 0) <= value < 1 << 31:
            raise InputError(
                f"--{name} {value}: must be a {'positive' if name in SIZES else 'whole'} number below 2^31"
            )
    return cls(**vars(values))


def exact_div(whole: int, part: int, names: str) -> int:
    """whole / part, refusing a division that does not come out, or sizes below 1."""
    if part < 1 or whole < 1 or whole % part:
        raise InputError(f"{names}: {whole} is not a multiple of {part}, or not positive")
    return whole // part
