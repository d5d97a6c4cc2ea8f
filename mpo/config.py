"""One frozen dataclass per stage. Its fields are the flags of the stage's script; see mpo/runtime/flags.py.

The defaults are those of the built-in world's `hh` task. What a task or a variable of make changes is in make/tasks.mk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every stage takes."""

    # The run
    out: str  # the folder that this stage writes
    seed: int = 1  # every random choice is keyed by (seed, purpose, step)
    overwrite: bool = False  # replace a finished stage in --out
    threads: int = 0  # CPU threads; 0: OMP_NUM_THREADS where that is set, else one per core


@dataclass(frozen=True, kw_only=True)
class Limits(Common):
    """What every stage that runs a model takes."""

    # Lengths, in tokens
    max_prompt: int = 384  # of a prompt with BOS; a longer dialogue loses its oldest turns
    max_response: int = 128  # of a response with EOS; a row with a longer response is dropped

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
    lr: float = 1e-3  # peak learning rate
    warmup: float = 0.05  # share of the steps in which the learning rate rises
    final_lr: float = 0.1  # learning rate of the last step as a share of the peak (cosine)
    weight_decay: float = 0.0  # of matrices only
    grad_clip: float = 1.0  # largest norm of the gradient
    optimiser: Literal["adamw", "adafactor"] = "adamw"  # adafactor needs hardly any memory of its own
    batch: int = 32  # rows of one optimiser step
    microbatch: int = 32  # rows computed at once; must divide batch

    # LoRA
    lora_rank: int = 0  # rank of the low-rank adapters, which alone are trained; 0: train all weights
    lora_alpha: float = 16.0  # their scale times their rank
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # the matrices that get an adapter

    # Device, precision, memory
    recompute: bool = False  # compute activations again in the backward pass instead of keeping them
    compile: bool = False  # torch.compile every layer: slow to start, faster on GPUs

    # Saves
    save_every: float = 60.0  # seconds between saves, from which a stopped stage goes on; 0: after every step


@dataclass(frozen=True, kw_only=True)
class DataConfig(Common):
    """Bring preference data into rows: {"id", "prompt", "chosen", "rejected"}."""

    # Data
    task: Literal["hh", "tldr"] = "hh"  # which of the paper's two tasks
    data: str = "builtin"  # builtin, a folder in the task's official layout, or a file of pairs (docs/data.md)
    test_data: str = ""  # a file of pairs that becomes the test split
    train: int = 28000  # training pairs of the built-in world; of other data at most so many, 0 for all
    test: int = 1600  # test pairs, in the same way
    noise: float = 0.0  # built-in world: share of the training labels to flip, besides the annotators' errors
    held_out: float = 0.1  # share of a single file that becomes the test split, without --test_data


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Common):
    """Train a sentencepiece tokenizer on the training split, or take the one of a model."""

    # Data and model
    data: str  # folder of the data stage
    model: str = ""  # a model folder, whose tokenizer is taken as it is, or the name of a preset
    vocab: int = 4096  # pieces at most; a small corpus yields fewer


@dataclass(frozen=True, kw_only=True)
class SFTConfig(Training):
    """Supervised fine-tuning on the chosen responses, from scratch or from a model."""

    # Data and model
    data: str  # folder of the data stage
    tokenizer: str  # folder with tokenizer.model or tokenizer.json
    model: str = "tiny"  # a preset (trained from scratch) or a folder in the Hugging Face layout

    # Optimisation
    epochs: float = 3.0  # passes over the training rows
    lr: float = 2e-3  # peak learning rate
    weight_decay: float = 0.1  # of matrices only


@dataclass(frozen=True, kw_only=True)
class RMConfig(Training):
    """Train a reward model: a scalar head on the SFT model's trunk, with the Bradley-Terry loss."""

    # Data and model
    data: str  # folder of the data stage
    model: str  # folder of the SFT model

    # Loss
    use_margin: bool = False  # ask for r(chosen) - r(rejected) >= the row's margin (Llama 2)
    label_smoothing: float = 0.0  # share of the labels assumed to be wrong
    centring: float = 0.0  # weight of (r_w + r_l)^2, which keeps raw rewards around 0

    # Optimisation
    epochs: float = 2.0  # passes over the training pairs
    lr: float = 3e-4  # peak learning rate
    weight_decay: float = 0.1  # of matrices only


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
    batch: int = 64  # pairs scored at once

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
    beta: float = 0.5  # strength of the pull towards the reference

    # Optimisation
    epochs: float = 1.0  # passes over the pairs
    steps: int = 0  # optimiser steps, in place of epochs; 0: as many as the epochs make
    lr: float = 5e-5  # peak learning rate
    keep: int = 0  # also keep N intermediate models, equally spaced, in folders step-N


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Training):
    """PPO on prompts (those of the hard pairs in MPO) with a KL penalty towards the reference model."""

    # Prompts and models
    prompts: str  # a row file, of which only the prompts are used
    model: str  # folder of the model to train
    ref: str  # folder of the KL reference: the DPO model for MPO, the SFT model for vanilla PPO
    rm: str  # folder of the reward model; its weights also initialise the critic
    limit: int = 0  # use only the first N prompts; 0: all

    # Rollout
    iterations: int = 50  # rollouts, each followed by `epochs` passes over it
    batch: int = 128  # responses of one rollout
    max_new: int = 64  # response tokens; a response without EOS by then is unfinished
    temperature: float = 1.0  # divides the logits, in sampling and in every log-prob alike
    group: int = 1  # responses to each prompt of a rollout; must divide batch

    # Reward and advantage
    kl_coef: float = 0.05  # beta: the price of one nat of KL to the reference, charged at each token
    missing_eos_penalty: float = 1.0  # subtracted from the score of an unfinished response
    kl_in: Literal["reward", "loss"] = "reward"  # where the KL is charged
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"  # how the KL of a token is estimated
    kl_target: float = 0.0  # KL per response that an adaptive kl_coef aims at; 0: kl_coef stays fixed
    kl_horizon: float = 10000.0  # how slowly it adapts, in responses
    advantage: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce++"] = "gae"  # all but gae do without a critic
    gamma: float = 1.0  # discount
    lam: float = 0.95  # lambda of GAE

    # Optimisation
    epochs: int = 2  # passes over a rollout
    minibatch: int = 64  # rows of one optimiser step; must divide batch
    microbatch: int = 16  # rows computed at once; must divide minibatch
    lr: float = 2e-4  # peak learning rate of the policy
    clip: float = 0.2  # the policy ratio is clipped to [1 - clip, 1 + clip]
    keep: int = 0  # also keep N intermediate models, equally spaced, in folders step-N

    # Critic
    critic_lr: float = 5e-4  # peak learning rate of the critic
    critic_warmup: int = 3  # first rollouts, which train the critic only
    value_clip: float = 0.2  # how far new values may move from the old ones
    shared_critic: bool = False  # the critic is a head on the policy's trunk instead of a model of its own
    value_coef: float = 0.1  # weight of the value loss where the critic shares the trunk


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Limits):
    """Sample every policy on held-out prompts; report win rates, KL, lengths, and gold where it is known."""

    # Data and models
    data: str  # folder of the data stage
    rm: str  # folder of the reward model
    split: str = ""  # folder of the split, for the gap histogram in the report
    policies: str = ""  # name=folder,name=folder,...; the first one is the baseline

    # Sampling
    prompts: int = 400  # held-out prompts, equally from every domain
    batch: int = 100  # prompts sampled at once
    max_new: int = 64  # response tokens
    temperature: float = 1.0  # divides the logits
    samples: int = 4  # prompts whose responses the report shows side by side


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Type to a model."""

    # The model
    model: str  # folder of any stage's model
    data: str = ""  # folder of the data stage, for prompts in the form of its rows; without it, a dialogue
    max_new: int = 96  # response tokens
    temperature: float = 0.7  # divides the logits; 0: always the likeliest token
    seed: int = 1  # of the sampling
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda, cuda:1, mps
