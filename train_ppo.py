"""Stage 6: PPO on prompts; in MPO, on the hard ones, from the DPO model and with it as reference.

`--ref` is the MPO switch: the DPO model for MPO, the SFT model for vanilla PPO.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import kernels
from kernels import Advantages
from mpo import ppo
from mpo.artifacts import Stage
from mpo.checkpoint import load_model, load_scalar, save_model
from mpo.config import PPOConfig, exact_div, run
from mpo.data.batches import encode
from mpo.data.rows import read_rows
from mpo.errors import InputError
from mpo.model import Llama, ValueHead
from mpo.ppo_update import Critic, Learner, Update, update
from mpo.progress import progress
from mpo.randomness import generator
from mpo.rollout import Rollout, roll_out, rollout_metrics
from mpo.sampling import Sampling
from mpo.tokenizer import load_tokenizer
from mpo.training import adamw, milestones, setup_torch


def prompt_batches(prompts: list[list[int]], config: PPOConfig) -> Iterator[list[list[int]]]:
    """Batches of prompts without end, each prompt `group` times: every one before any comes again."""
    each = exact_div(config.batch, config.group, "--batch and --group")
    epoch, waiting = 0, list[int]()
    while True:
        while len(waiting) < each:
            waiting += torch.randperm(len(prompts), generator=generator(config.seed, "prompts", epoch)).tolist()
            epoch += 1
        yield [prompts[i] for i in waiting[:each] for _ in range(config.group)]
        waiting = waiting[each:]


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
    if not 0 <= config.ref_rate <= 1:
        raise InputError(f"--ref_rate {config.ref_rate}: must be between 0 and 1")


@torch.no_grad()
def follow(ref: Llama, policy: Llama, rate: float) -> None:
    """Move the reference towards the policy: ref <- (1 - rate) ref + rate policy."""
    for r, p in zip(ref.parameters(), policy.parameters(), strict=True):
        r.lerp_(p, rate)


def main(config: PPOConfig) -> None:
    """Load; then rollout, score, advantages, minibatch updates; save."""
    check(config)
    setup_torch(config)
    inputs = {"prompts": config.prompts, "model": config.model, "ref": config.ref, "rm": config.rm}
    stage = Stage(config, inputs, config.out, config.overwrite)
    tokenizer = load_tokenizer(config.model)
    policy, ref, rm = load_model(config.model), load_model(config.ref), load_scalar(config.rm)
    ref.requires_grad_(False)
    critic = None
    if config.advantage == "gae":
        value_model = ValueHead(policy.config.hidden_size) if config.shared_critic else load_scalar(config.rm)
        weight = config.value_coef if config.shared_critic else 1.0
        critic = Critic(value_model, adamw(value_model, config.critic_lr, 0.0, eps=1e-5), weight)
    learner = Learner(policy, adamw(policy, config.lr, 0.0, eps=1e-5), ref, critic)
    rows = read_rows(config.prompts)[: config.limit or None]
    pairs, counts = encode(rows, tokenizer, config.max_prompt, config.max_response)
    print(f"{stage.out.name}: prompts {counts}")
    batches = prompt_batches([p.prompt for p in pairs], config)
    sampling = Sampling(config.max_new, config.temperature, tokenizer.eos)
    kl_coef, kept = config.kl_coef, milestones(config.iterations, config.keep)

    bar = progress(range(config.iterations), stage.out.name)
    for iteration in bar:
        # 1. rollout and scores (with the self-check that sampling and scoring agree)
        draw = generator(config.seed, "rollout", iteration)
        values = critic.model if critic else None
        rollout = roll_out(policy, ref, rm, values, next(batches), sampling, draw, config.microbatch)
        score = rollout.scores - config.missing_eos_penalty * ~rollout.finished
        if config.clip_score:
            score = score.clamp(-config.clip_score, config.clip_score)
        # 2. rewards (KL to the reference per token, the score at the last one) and advantages
        found = advantages_of(rollout, score, kl_coef, config)
        metrics = rollout_metrics(rollout, found) | {"kl_coef": kl_coef}
        # 3. updates
        metrics |= update(learner, Update(rollout, found.whitened, found.returns, kl_coef), iteration, config)
        # 4. the price of KL, and the reference, for the next rollout
        kl_coef = ppo.next_kl_coef(kl_coef, metrics["kl_k1"], config.kl_target, config.kl_horizon, config.batch)
        if config.ref_rate:
            follow(ref, policy, config.ref_rate)
        stage.log(iteration, metrics)
        if iteration + 1 in kept:
            save_model(stage.out / kept[iteration + 1], policy)
        shown = ("score", "kl_exact", "length", "eos_rate", "entropy")
        bar.set_postfix({name: f"{metrics[name]:.2f}" for name in shown}, refresh=False)

    reached = f"score {metrics['score']:.3f}, exact KL to the reference {metrics['kl_exact']:.2f} nats a response"
    print(f"{stage.out.name}: {reached}")
    save_model(stage.out, policy)
    tokenizer.save(stage.out)
    stage.finish(iterations=config.iterations, last=metrics, prompts=counts)


if __name__ == "__main__":
    run(main, PPOConfig)
