"""One frozen dataclass per stage. Its fields are the flags of the stage's script; see mpo/runtime/flags.py.

The type of a number says which values it takes: `Positive` is a float above 0. flags.py refuses any other, and --help
shows the range.

The defaults are those of the built-in world's `hh` task. What a task or a variable of make changes is in make/tasks.mk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple


class Range(NamedTuple):
    """The numbers that a flag or a constant takes: from `low` to `high`, or above `above`, or below `below`."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def has(self, number: float) -> bool:
        """Whether a number is in the range. NaN and the infinities are in none."""
        return math.isfinite(number) and self.low <= number <= self.high and self.above < number < self.below

    def __str__(self) -> str:
        """In words: "above 0", "from 0 to 1", "at least 0 and below 1"."""
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"from {self.low:,.12g} to {self.high:,.12g}"
        words = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(f"{word} {bound:,.12g}" for word, bound in words.items() if math.isfinite(bound))


Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Fraction = Annotated[float, Range(0, below=1)]  # less than all
LabelNoise = Annotated[float, Range(0, below=0.5)]  # the probability that a label is wrong; at 1/2 it says nothing
Passes = Annotated[float, Range(above=0, high=10_000)]
Size = Annotated[int, Range(1)]
Count = Annotated[int, Range(0)]
Few = Annotated[int, Range(0, 1_000)]  # of threads, processes, folders: more than that is a slip


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every stage takes."""

    # The run
    out: str  # the folder that this stage writes
    seed: Count = 1  # every random choice is keyed by (seed, purpose, step)
    overwrite: bool = False  # discard what is in --out, if it was made with other flags or inputs
    threads: Few = 0  # CPU threads; 0: OMP_NUM_THREADS where that is set, else one per core it may use


@dataclass(frozen=True, kw_only=True)
class Limits(Common):
    """What every stage that runs a model takes."""

    # Lengths, in tokens
    max_prompt: Size = 384  # of a prompt with BOS; a longer dialogue loses its oldest turns
    max_response: Annotated[int, Range(2)] = 128  # of a response with EOS; a row with a longer response is dropped

    # Device, precision, memory
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda, cuda:1, mps
    precision: Literal["fp32", "bf16-mixed", "bf16"] = "fp32"  # bf16-mixed: matrix products in bf16; bf16: weights, too
    deterministic: bool = False  # the same bytes each time on a GPU as well, more slowly
    shard: bool = False  # with several processes, split every weight among them (FSDP2) instead of copying it (DDP)
    plan: bool = False  # print how much memory the stage will take, and stop


@dataclass(frozen=True, kw_only=True)
class Training(Limits):
    """What SFT, reward model, DPO and PPO share."""

    # Optimisation
    lr: Positive = 1e-3  # peak learning rate
    warmup: Share = 0.05  # share of the steps in which the learning rate rises
    final_lr: Share = 0.0  # learning rate at the end as a share of the peak, towards which it falls along a line
    weight_decay: NonNegative = 0.0  # of matrices only
    grad_clip: NonNegative = 1.0  # a gradient of a larger norm is scaled down to it; 0: never
    optimiser: Literal["adamw", "muon", "adafactor"] = "adamw"  # muon: fewer steps from scratch; adafactor: less memory
    batch: Size = 32  # rows of one optimiser step
    microbatch: Count = 0  # rows computed at once; must divide batch; 0: what fits in memory, at most 32

    # LoRA
    lora_rank: Count = 0  # rank of the low-rank adapters, which alone are trained; 0: train all weights
    lora_alpha: Positive = 16.0  # their scale times their rank
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # the matrices that get an adapter

    # Device, precision, memory
    recompute: bool = False  # compute activations again in the backward pass instead of keeping them
    compile: bool = False  # torch.compile every layer: slow to start, faster on GPUs

    # Saves
    save_every: NonNegative = 60.0  # seconds between saves, from which a stopped stage goes on; 0: after every step

    # Metrics
    log: Literal["none", "tensorboard", "trackio", "wandb"] = "none"  # show them there, too, while the stage runs


@dataclass(frozen=True, kw_only=True)
class DataConfig(Common):
    """Bring preference data into rows: {"id", "prompt", "chosen", "rejected"}."""

    # Data
    task: Literal["hh", "tldr"] = "hh"  # which of the paper's two tasks
    data: str = "builtin"  # builtin, a folder in the task's official layout, or a file of pairs (docs/data.md)
    test_data: str = ""  # a file of pairs that becomes the test split
    train: Count = 28000  # training pairs of the built-in world; of other data at most so many, 0 for all
    test: Count = 1600  # test pairs, in the same way
    noise: Fraction = 0.0  # built-in world: share of the training labels to flip, besides the annotators' errors
    held_out: Annotated[float, Range(above=0, below=1)] = 0.1  # share of a file that becomes the test split


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Common):
    """Train a sentencepiece tokenizer on the training split, or take the one of a model."""

    # Data and model
    data: str  # folder of the data stage
    model: str = ""  # a model folder, whose tokenizer is taken as it is, or the name of a preset
    template: Literal["auto", "none"] = "auto"  # none: write dialogues without the model's chat template
    vocab: Annotated[int, Range(268)] = 4096  # pieces at most, 267 of them fixed; a small corpus yields fewer


@dataclass(frozen=True, kw_only=True)
class SFTConfig(Training):
    """Supervised fine-tuning on the chosen responses, from scratch or from a model."""

    # Data and model
    data: str  # folder of the data stage
    tokenizer: str  # folder with tokenizer.model or tokenizer.json
    model: str = "tiny"  # a preset (trained from scratch) or a folder in the Hugging Face layout

    # Optimisation
    epochs: Passes = 3.0  # passes over the training rows
    lr: Positive = 2e-3  # peak learning rate
    weight_decay: NonNegative = 0.1  # of matrices only


@dataclass(frozen=True, kw_only=True)
class RMConfig(Training):
    """Train a reward model: a scalar head on the SFT model's trunk, with the Bradley-Terry loss."""

    # Data and model
    data: str  # folder of the data stage
    model: str  # folder of the SFT model

    # Loss
    use_margin: bool = False  # ask for r(chosen) - r(rejected) >= the row's margin (Llama 2)
    label_smoothing: LabelNoise = 0.0  # share of the labels assumed to be wrong
    centring: NonNegative = 0.0  # weight of (r_w + r_l)^2, which keeps raw rewards around 0

    # Optimisation
    epochs: Passes = 2.0  # passes over the training pairs
    lr: Positive = 3e-4  # peak learning rate
    weight_decay: NonNegative = 0.1  # of matrices only


Use = Literal["dpo", "flip", "smooth", "ppo", "drop"]


@dataclass(frozen=True, kw_only=True)
class SplitConfig(Limits):
    """Score every training pair and split by reward gap: easy, hard, contradicted.

    What a part is used for: dpo trains on its pairs; flip does so with the labels swapped; smooth does so with the
    reward model's doubt of each label, for --loss cdpo, robust or exo_pair, and swaps the labels that are more likely
    wrong; ppo takes its prompts; drop leaves it out.
    """

    # Data and models
    data: str  # folder of the data stage
    rm: str  # folder of the reward model, or folder,folder,... of an ensemble, whose scores are averaged
    microbatch: Count = 0  # pairs scored at once; 0: what fits in memory, at most 64

    # Split
    gamma: str = "q0.5"  # the threshold: a number, or qX for the X quantile of |gap|
    by: Literal["gap", "uncertainty"] = "gap"  # uncertainty: the ensemble's mean gap over its standard error
    easy: Use = "dpo"  # what pairs with gap >= gamma are used for
    hard: Use = "ppo"  # what pairs with |gap| < gamma are used for
    contradicted: Use = "ppo"  # what pairs with gap <= -gamma are used for


@dataclass(frozen=True, kw_only=True)
class DPOConfig(Training):
    """Preference optimisation on pairs (the easy ones in MPO) against a frozen reference."""

    # Data and models
    data: str  # a row file, such as pairs.jsonl of the split
    model: str  # folder of the model to train
    ref: str = ""  # folder of the reference model; without it, the untrained model is the reference

    # Loss
    loss: str = "sigmoid"  # a loss, a sum such as sigmoid+0.1*sft, or with constants: simpo:gamma=0.5
    beta: Positive = 0.5  # strength of the pull towards the reference

    # Optimisation
    epochs: Passes = 1.0  # passes over the pairs
    steps: Annotated[int, Range(0, 1_000_000)] = 0  # optimiser steps, in place of epochs; 0: as many as the epochs make
    lr: Positive = 5e-5  # peak learning rate
    keep: Few = 0  # also keep N intermediate models, equally spaced, in folders step-N


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Training):
    """PPO on prompts (those of the hard pairs in MPO) with a KL penalty towards the reference model."""

    # Prompts and models
    prompts: str  # a row file, of which only the prompts are used; its rows need no responses
    model: str  # folder of the model to train
    ref: str  # folder of the KL reference: the DPO model for MPO, the SFT model for vanilla PPO
    rm: str  # folder of the reward model; its weights also initialise the critic
    limit: Count = 0  # use only the first N prompts; 0: all

    # Rollout
    iterations: Size = 50  # rollouts, each followed by `epochs` passes over it
    batch: Size = 128  # responses of one rollout
    max_new: Size = 64  # response tokens; a response without EOS by then is unfinished
    temperature: Positive = 1.0  # divides the logits, in sampling and in every log-prob alike
    group: Size = 1  # responses to each prompt of a rollout; must divide batch

    # Reward and advantage
    kl_coef: NonNegative = 0.05  # beta: the price of one nat of KL to the reference, charged at each token
    missing_eos_penalty: NonNegative = 1.0  # subtracted from the score of an unfinished response
    kl_in: Literal["reward", "loss"] = "reward"  # where the KL is charged
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"  # how the KL of a token is estimated
    kl_target: NonNegative = 0.0  # KL per response that an adaptive kl_coef aims at; 0: kl_coef stays fixed
    kl_horizon: Positive = 10000.0  # how slowly it adapts, in responses
    advantage: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce++"] = "gae"  # all but gae do without a critic
    gamma: Share = 1.0  # discount
    lam: Share = 0.95  # lambda of GAE

    # Optimisation
    epochs: Size = 1  # passes over a rollout
    minibatch: Size = 64  # rows of one optimiser step; must divide batch
    microbatch: Count = 0  # rows computed at once; must divide minibatch; 0: what fits in memory, at most 16
    lr: Positive = 3e-4  # peak learning rate of the policy
    clip: Positive = 0.2  # the policy ratio is clipped to [1 - clip, 1 + clip]
    keep: Few = 0  # also keep N intermediate models, equally spaced, in folders step-N

    # Critic
    critic_lr: Positive = 5e-4  # peak learning rate of the critic
    critic_warmup: Count = 3  # first rollouts, which train the critic only
    value_clip: Positive = 0.2  # how far new values may move from the old ones
    shared_critic: bool = False  # the critic is a head on the policy's trunk instead of a model of its own
    value_coef: NonNegative = 0.1  # weight of the value loss where the critic shares the trunk


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Limits):
    """Sample every policy on held-out prompts; report win rates, KL, lengths, and gold where it is known."""

    # Data and models
    data: str  # folder of the data stage
    rm: str  # folder of the reward model
    split: str = ""  # folder of the split, for the gap histogram in the report
    policies: str = ""  # name=folder,name=folder,...; the first one is the baseline

    # Sampling
    prompts: Size = 400  # held-out prompts, equally from every domain
    batch: Size = 100  # prompts sampled at once
    max_new: Size = 64  # response tokens
    temperature: NonNegative = 1.0  # divides the logits
    samples: Count = 4  # prompts whose responses the report shows side by side


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Limits):
    """Score a file of preference pairs with a reward model, and print its accuracy by category."""

    # Data and model
    data: str  # a file of pairs, in any format of docs/data.md; RewardBench's is one of them
    rm: str  # folder of the reward model
    microbatch: Size = 8  # pairs scored at once

    # Lengths, in tokens
    max_prompt: Size = 2048  # of a prompt with BOS; a longer dialogue loses its oldest turns
    max_response: Annotated[int, Range(2)] = 2048  # of a response with EOS; a row with a longer response is dropped


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Type to a model."""

    # The model
    model: str  # folder of any stage's model
    data: str = ""  # folder of the data stage, for prompts in the form of its rows; without it, a dialogue
    max_new: Size = 96  # response tokens
    temperature: NonNegative = 0.7  # divides the logits; 0: always the likeliest token
    seed: Count = 1  # of the sampling
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda, cuda:1, mps


STAGES: dict[str, type] = {
    "prepare_data": DataConfig,
    "train_tokenizer": TokenizerConfig,
    "train_sft": SFTConfig,
    "train_rm": RMConfig,
    "split_data": SplitConfig,
    "train_dpo": DPOConfig,
    "train_ppo": PPOConfig,
    "eval": EvalConfig,
}
"""A stage's script -> its flags, in the order of a run."""
