"""Stage 6: PPO on prompts; in MPO, on the hard ones, from the DPO model and with it as reference.

`--ref` is the MPO switch: the DPO model for MPO, the SFT model for vanilla PPO.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from kernels import Advantages
from mpo import device, parallel, ppo
from mpo.checkpoint import load_model, load_scalar, save_model, scalar_from
from mpo.config import PPOConfig, exact_div
from mpo.data.batches import Pair, encode
from mpo.data.rows import read_rows
from mpo.errors import InputError
from mpo.guards import NotFinite, collapses, failure
from mpo.lora import BaseOf, adapters_of, critic_on
from mpo.model import Llama, ScalarModel, ValueHead, configure_layers
from mpo.optimisers import make_optimiser
from mpo.ppo_update import Critic, Learner, Update, update
from mpo.program import run
from mpo.progress import note, progress
from mpo.randomness import generator
from mpo.rollout import Rollout, roll_out, rollout_metrics
from mpo.sampling import Sampling
from mpo.saves import Part, Saves
from mpo.stage import Stage
from mpo.tokenizer import Tokenizer, load_tokenizer
from mpo.training import milestones, setup_torch


def prompt_batches(pairs: Sequence[Pair], config: PPOConfig) -> Iterator[list[Pair]]:
    """Batches of rows without end, each row `group` times: every one before any comes again."""
    each = exact_div(config.batch, config.group, "--batch and --group")
    epoch, waiting = 0, list[int]()
    while True:
        while len(waiting) < each:
            waiting += torch.randperm(len(pairs), generator=generator(config.seed, "prompts", epoch)).tolist()
            epoch += 1
        yield [pairs[i] for i in waiting[:each] for _ in range(config.group)]
        waiting = waiting[each:]


def penalised(rollout: Rollout, config: PPOConfig) -> Tensor:
    """The reward model's scores (B,), less the price of a response without an end, and clipped where that is wanted."""
    score = rollout.scores - config.missing_eos_penalty * ~rollout.finished
    return score.clamp(-config.clip_score, config.clip_score) if config.clip_score else score


def advantages_of(rollout: Rollout, score: Tensor, kl_coef: float, config: PPOConfig) -> Advantages:
    """From a rollout and its scores (B,) to advantages and (with a critic) returns, (B, R)."""
    t = rollout.tokens
    exact = config.kl_estimator == "exact"
    kl = t.kl if exact else ppo.kl_estimate(t.logp, t.ref_logp, config.kl_estimator)
    price = kl_coef if config.kl_in == "reward" else 0.0
    if rollout.values is not None:
        rest = config.gamma, config.lam, config.whiten_rewards
        return kernels.advantages(score, kl, rollout.values, t.mask, price, *rest)
    rewards = ppo.shape_rewards(score, kl, t.mask, price)
    if config.whiten_rewards:
        rewards = ppo.whiten(rewards, t.mask, keep_mean=True)
    found = ppo.GROUP_ESTIMATORS[config.advantage](rewards, t.mask, config.group)
    return Advantages(found, torch.zeros_like(found), found)


def check(config: PPOConfig) -> None:
    """Refuse flags that contradict each other, before anything is loaded."""
    exact_div(config.batch, config.minibatch, "--batch and --minibatch")
    exact_div(config.minibatch, config.microbatch, "--minibatch and --microbatch")
    exact_div(config.batch, config.group, "--batch and --group")
    if config.advantage in ("rloo", "grpo", "dr_grpo") and config.group < 2:
        raise InputError(f"--advantage {config.advantage}: compares responses to one prompt; set --group to 2 or more")
    if config.temperature <= 0:
        raise InputError(f"--temperature {config.temperature}: must be above 0; PPO learns from varied samples")
    if config.lora_rank and config.ref_rate:
        raise InputError(
            f"--ref_rate {config.ref_rate}: with adapters the reference is their base, which does not move"
        )
    if not 0 <= config.ref_rate <= 1:
        raise InputError(f"--ref_rate {config.ref_rate}: must be between 0 and 1")


def warn(stage: Stage, iteration: int, state: dict[str, Any]) -> dict[str, str]:
    """Say once of each sign of collapse that it has come; returns all so far, by name."""
    new = {k: v for k, v in collapses(state["last"], state["first"]).items() if k not in state["warnings"]}
    for words in new.values():
        note(f"\n{stage.name}: warning: rollout {iteration}: {words}")
    return state["warnings"] | {k: f"rollout {iteration}: {v}" for k, v in new.items()}


@torch.no_grad()
def follow(ref: nn.Module, policy: nn.Module, rate: float) -> None:
    """Move the reference towards the policy: ref <- (1 - rate) ref + rate policy."""
    parallel.settle(ref)
    parallel.settle(policy)
    for r, p in zip(ref.parameters(), policy.parameters(), strict=True):
        r.lerp_(p, rate)


def load_critic(config: PPOConfig, policy: Llama) -> Critic | None:
    """A model that starts as the reward model, with LoRA one on the policy's base, or a head on the policy's trunk."""
    if config.advantage != "gae":
        return None
    if config.shared_critic:
        model: ScalarModel | ValueHead = ValueHead(policy.config.hidden_size).to(device.here())
    elif (adapters := adapters_of(config, config.model)) and config.shard:  # two models cannot share sharded weights
        model = scalar_from(config.model, generator(config.seed, "critic"), adapters)
        nn.init.zeros_(model.score.weight)
    elif adapters:
        model = critic_on(policy, adapters)
    else:
        model = load_scalar(config.rm)
    parallel.learns(model)
    weight = config.value_coef if config.shared_critic else 1.0
    return Critic(model, make_optimiser(model, config.critic_lr, 0.0, 1e-5, config.optimiser), weight)


def load_learner(config: PPOConfig) -> Learner:
    """Policy, reference and critic, with their optimisers; with LoRA they share what does not learn."""
    policy = load_model(config.model, adapters_of(config, config.model))
    same = policy.adapters and Path(config.ref).resolve() == Path(config.model).resolve()
    ref = BaseOf(policy) if same else load_model(config.ref).requires_grad_(False)
    parallel.learns(policy)
    learner = Learner(
        policy, make_optimiser(policy, config.lr, 0.0, 1e-5, config.optimiser), ref, load_critic(config, policy)
    )
    for model in [*learner.models, ref]:
        configure_layers(model, config.recompute, config.compile)
    return learner


def load_prompts(config: PPOConfig, tokenizer: Tokenizer) -> tuple[list[Pair], dict[str, int]]:
    """The rows whose prompts are sampled from, and how many were left out, by reason."""
    everything = read_rows(config.prompts)
    rows = everything[: config.limit or None]
    pairs, counts = encode(rows, tokenizer, config.max_prompt, config.max_response)
    beyond = len(everything) - len(rows)
    return pairs, counts | ({"dropped: beyond --limit": beyond} if beyond else {})


def parts_of(learner: Learner, config: PPOConfig) -> dict[str, Part]:
    """What a save has to hold; the reference only where it moves."""
    parts = {"policy": Part(learner.policy, learner.optimiser)}
    if critic := learner.critic:
        parts["critic"] = Part(critic.model, critic.optimiser)
    return parts | ({"ref": Part(learner.ref)} if config.ref_rate else {})


def main(config: PPOConfig) -> None:
    """Load; then rollout, score, advantages, minibatch updates; save."""
    setup_torch(config)
    check(config)
    inputs = {"prompts": config.prompts, "model": config.model, "ref": config.ref, "rm": config.rm}
    stage = Stage(config, inputs, config.out, config.overwrite)
    tokenizer, learner, rm = load_tokenizer(config.model), load_learner(config), load_scalar(config.rm)
    policy, ref, critic = learner.policy, learner.ref, learner.critic.model if learner.critic else None
    pairs, counts = load_prompts(config, tokenizer)
    print(f"{stage.name}: prompts {counts}")
    sampling = Sampling(config.max_new, config.temperature, tokenizer.eos)
    kept = milestones(config.iterations, config.keep)
    saves = Saves(stage, config, parts_of(learner, config))
    start = {"kl_coef": config.kl_coef, "first": {}, "last": {}, "warnings": {}}
    done, state = saves.restore(start)  # what one iteration leaves to the next, besides weights

    bar = progress(range(done, config.iterations), stage.name, done)
    batches = itertools.islice(prompt_batches(pairs, config), done, None)
    for iteration, batch in zip(bar, batches, strict=False):
        kl_coef, untouched = state["kl_coef"], True
        try:
            # 1. rollout and scores (with the self-check that sampling and scoring agree)
            draw, prompts = generator(config.seed, "rollout", iteration), [p.prompt for p in batch]
            rollout = roll_out(policy, ref, rm, critic, prompts, sampling, draw, config.microbatch)
            score = penalised(rollout, config)
            # 2. rewards (KL to the reference per token, the score at the last one) and advantages
            found = advantages_of(rollout, score, kl_coef, config)
            metrics = rollout_metrics(rollout, found) | {"kl_coef": kl_coef}
            # 3. updates
            untouched = False
            metrics |= update(learner, Update(rollout, found.whitened, found.returns, kl_coef), iteration, config)
        except NotFinite as e:
            ids = [{"id": p.row.id, "prompt": p.prompt} for p in batch]
            raise failure(stage, iteration, e, ids, saves.before(iteration, state) if untouched else None) from None
        # 4. the price of KL, and the reference, for the next rollout
        kl_coef = ppo.next_kl_coef(kl_coef, metrics["kl_k1"], config.kl_target, config.kl_horizon, config.batch)
        if config.ref_rate:
            follow(ref, policy, config.ref_rate)
        stage.log(iteration, metrics)
        if iteration + 1 in kept:
            save_model(stage.out / kept[iteration + 1], policy)
        state = {"kl_coef": kl_coef, "first": state["first"] or metrics, "last": metrics, "warnings": state["warnings"]}
        state["warnings"] = warn(stage, iteration, state)
        saves.behind(iteration + 1, state, last=iteration + 1 == config.iterations)
        shown = ("score", "kl_exact", "length", "eos_rate", "entropy")
        bar.set_postfix({name: f"{metrics[name]:.2f}" for name in shown}, refresh=False)

    last = state["last"]
    reached = f"score {last['score']:.3f}, exact KL to the reference {last['kl_exact']:.2f} nats a response"
    print(f"{stage.name}: {reached}")
    save_model(stage.out, policy)
    tokenizer.save(stage.out)
    stage.finish(iterations=config.iterations, last=last, prompts=counts, warnings=state["warnings"])


if __name__ == "__main__":
    run(main, PPOConfig)
