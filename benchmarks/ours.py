"""This project's cases of the benchmark: python -m benchmarks.ours CASE THREADS"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeVar

import torch

from benchmarks import turns
from benchmarks import workload as w
from mpo.config import PPOConfig
from mpo.data.batches import Pair, make_batch
from mpo.data.rows import Row
from mpo.model.generate import Sampling, generate
from mpo.model.llama import (
    Adapters,
    Llama,
    LlamaConfig,
    ScalarModel,
    ValueHead,
    configure_layers,
    scalar_from,
)
from mpo.model.logprobs import response_logprobs
from mpo.model.lora import BaseModel, attach, critic_on, first_values
from mpo.model.scoring import score_pairs
from mpo.ppo.learner import Critic, Learner
from mpo.ppo.rewards import assign_credit
from mpo.ppo.rollout import roll_out
from mpo.ppo.update import Experience, update
from mpo.preference.logps import pair_logps, reference_logps
from mpo.preference.losses import PREFERENCE_LOSSES, bradley_terry
from mpo.runtime import device
from mpo.runtime.setup import setup_torch
from mpo.training.optimisers import make_optimiser, optimiser_step

Model = TypeVar("Model", Llama, ScalarModel)


def place(made: Model) -> Model:
    """The same model on the device, with its layers compiled if the workload says so."""
    configure_layers(made, recompute=False, compiled=w.COMPILE)
    return made.to(device.current())


def model(seed: int) -> Llama:
    """The workload's model with random weights."""
    llama = Llama(LlamaConfig(**w.SHAPE))
    llama.load_state_dict({name: torch.from_numpy(value) for name, value in w.weights(seed).items()})
    return place(llama)


def scalar(seed: int) -> ScalarModel:
    """The same with a scalar head."""
    return place(scalar_from(model(seed), torch.Generator().manual_seed(seed + 1)))


def adapters() -> Adapters:
    """The workload's adapters."""
    return Adapters(w.LORA, 16.0, w.TARGETS, seed=0, base="")


def to_train(made: Model) -> Model:
    """The same model, with adapters if the workload trains only these."""
    if w.LORA:
        attach(made, adapters())
        made.load_state_dict(first_values(made, adapters()), strict=False)
    return made.to(device.current())


def pairs() -> list[Pair]:
    """The pairs of one step."""
    rows = enumerate(w.pairs(w.PAIRS))
    return [Pair(Row(str(i), "", "", ""), r["prompt"], r["chosen"], r["rejected"]) for i, r in rows]


def sft() -> Callable[[], object]:
    """A step of SFT on the chosen responses."""
    policy = to_train(model(0))
    optimiser, rows = make_optimiser(policy, w.LR, 0.0), pairs()

    def step() -> float:
        batch = make_batch([(p.prompt, p.chosen) for p in rows])
        loss = -response_logprobs(policy, batch).logp.sum() / sum(len(p.chosen) for p in rows)
        loss.backward()
        optimiser_step(optimiser, policy, w.LR, 1.0)
        return loss.item()

    return step


def dpo(cached: bool, policy: Llama | None = None) -> Callable[[], object]:
    """A DPO step. The reference's log-probs are computed once in advance (`cached`), or in every step."""
    policy = to_train(policy or model(0))
    ref = policy if w.LORA else model(1)  # an untrained adapter changes nothing
    optimiser, rows = make_optimiser(policy, w.LR, 0.0), pairs()
    cache = reference_logps(ref, rows, w.PAIRS)

    def step() -> float:
        ref_logps = cache if cached else reference_logps(ref, rows, w.PAIRS)
        logps = pair_logps(policy, rows, ref_logps)
        loss = PREFERENCE_LOSSES["sigmoid"](logps, w.BETA).mean()
        loss.backward()
        optimiser_step(optimiser, policy, w.LR, 1.0)
        return loss.item()

    return step


def reward() -> Callable[[], object]:
    """A training step of the reward model."""
    rm = to_train(scalar(0))
    optimiser, rows = make_optimiser(rm, w.LR, 0.0), pairs()

    def step() -> None:
        bradley_terry(*score_pairs(rm, rows), 0.0, 0.0).mean().backward()
        optimiser_step(optimiser, rm, w.LR, 1.0)

    return step


def ppo(shared: bool) -> Callable[[], object]:
    """An iteration of PPO: rollout, scores, advantages, and the updates of policy and critic.

    `shared`: the critic is a head on the policy's trunk instead of a model of its own.
    """
    policy = to_train(model(0))
    ref = BaseModel(policy) if w.LORA else model(0).requires_grad_(False)
    rm = scalar(1)
    value_model: ScalarModel | ValueHead
    if shared:
        value_model = ValueHead(policy.config.hidden_size).to(device.current())
    else:
        value_model = place(critic_on(policy, adapters())) if w.LORA else scalar(2)
    config = PPOConfig(
        out="",
        prompts="",
        model="",
        ref="",
        rm="",
        lr=w.LR,
        critic_lr=w.LR,
        batch=w.ROLLOUT,
        minibatch=w.ROLLOUT // w.MINIBATCHES,
        microbatch=w.ROLLOUT,
        epochs=w.EPOCHS,
        max_new=w.RESPONSE,
        critic_warmup=0,
        missing_eos_penalty=0.0,  # no response ends
    )
    critic = Critic(value_model, make_optimiser(value_model, w.LR, 0.0, eps=1e-5))
    learner = Learner(policy, make_optimiser(policy, w.LR, 0.0, eps=1e-5), ref, critic)
    prompts, draw = w.tokens(w.ROLLOUT, w.PROMPT), torch.Generator().manual_seed(0)
    sampling = Sampling(w.RESPONSE, 1.0, eos=-1)  # no token ends a response

    def iteration() -> None:
        rollout = roll_out(policy, ref, rm, critic.model, prompts, sampling, draw, config.microbatch)
        credit = assign_credit(rollout, config.kl_coef, config)
        update(learner, Experience(rollout, credit, config.kl_coef), 0, config)

    return iteration


def generation() -> Callable[[], object]:
    """The generation of a batch of responses, all of full length."""
    policy, prompts = model(0), w.tokens(w.ROLLOUT, w.PROMPT)
    sampling = Sampling(w.RESPONSE, 1.0, eos=-1)  # no token ends a response
    draw = torch.Generator().manual_seed(0)
    return lambda: generate(policy, prompts, sampling, draw)


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "sft": sft,
    "dpo": lambda: dpo(cached=False),
    "dpo-best": lambda: dpo(cached=True),
    "reward": reward,
    "generate": generation,
    "ppo": lambda: ppo(shared=False),
    "ppo-shared": lambda: ppo(shared=True),
}
"""Name -> a function that loads the case and returns its step. On the command line, NAME-bf16 sets bf16 products."""

if __name__ == "__main__":
    case, (threads,) = turns.arguments(
        "python -m benchmarks.ours CASE THREADS", cases=[*CASES, *(f"{c}-bf16" for c in CASES)]
    )
    precision = "bf16-mixed" if case.endswith("-bf16") else "fp32"
    setup_torch(SimpleNamespace(threads=threads, precision=precision))  # type: ignore[arg-type]
    turns.serve(CASES[case.removesuffix("-bf16")]())
