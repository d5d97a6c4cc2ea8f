"""This project's cases of the benchmark: python -m benchmarks.ours CASE THREADS"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from benchmarks import turns
from benchmarks import workload as w
from mpo.config import PPOConfig
from mpo.data.batches import Pair
from mpo.data.rows import Row
from mpo.model.generate import Sampling, generate
from mpo.model.llama import Llama, LlamaConfig, ValueHead, initialise, scalar_from
from mpo.model.scoring import score_pairs
from mpo.ppo.learner import Critic, Learner
from mpo.ppo.rewards import assign_credit
from mpo.ppo.rollout import roll_out
from mpo.ppo.update import Experience, update
from mpo.preference.logps import pair_logps, reference_logps
from mpo.preference.losses import PREFERENCE_LOSSES, bradley_terry
from mpo.runtime.setup import setup_torch
from mpo.training.optimisers import make_optimiser, optimiser_step


def model(seed: int) -> Llama:
    """The workload's model with random weights."""
    llama = Llama(LlamaConfig(**w.SHAPE))
    initialise(llama, torch.Generator().manual_seed(seed))
    return llama


def pairs() -> list[Pair]:
    """The pairs of one step."""
    rows = enumerate(w.pairs(w.PAIRS))
    return [Pair(Row(str(i), "", "", ""), r["prompt"], r["chosen"], r["rejected"]) for i, r in rows]


def dpo(cached: bool) -> Callable[[], object]:
    """A DPO step. The reference's log-probs are computed once in advance (`cached`), or in every step."""
    policy, ref = model(0), model(0)
    optimiser, rows = make_optimiser(policy, w.LR, 0.0), pairs()
    cache = reference_logps(ref, rows, w.PAIRS)

    def step() -> None:
        ref_logps = cache if cached else reference_logps(ref, rows, w.PAIRS)
        logps = pair_logps(policy, rows, ref_logps)
        PREFERENCE_LOSSES["sigmoid"](logps, w.BETA).mean().backward()
        optimiser_step(optimiser, policy, w.LR, 1.0)

    return step


def reward() -> Callable[[], object]:
    """A training step of the reward model."""
    rm = scalar_from(model(0), torch.Generator().manual_seed(1))
    optimiser, rows = make_optimiser(rm, w.LR, 0.0), pairs()

    def step() -> None:
        bradley_terry(*score_pairs(rm, rows), 0.0, 0.0).mean().backward()
        optimiser_step(optimiser, rm, w.LR, 1.0)

    return step


def ppo(shared: bool) -> Callable[[], object]:
    """An iteration of PPO: rollout, scores, advantages, and the updates of policy and critic.

    `shared`: the critic is a head on the policy's trunk instead of a model of its own.
    """
    policy, ref = model(0), model(0).requires_grad_(False)
    rm, own = (scalar_from(model(i), torch.Generator().manual_seed(i)) for i in (1, 2))
    value_model = ValueHead(policy.config.hidden_size) if shared else own
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
