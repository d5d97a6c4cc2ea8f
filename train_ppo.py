"""Stage 6: PPO on prompts; in MPO, on the hard ones, from the DPO model and with it as reference.

`--ref` is the MPO switch: the DPO model for MPO, the SFT model for vanilla PPO.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpo import ppo
from mpo.artifacts import Stage
from mpo.checkpoint import load_model, load_scalar, save_model
from mpo.config import PPOConfig, exact_div, run
from mpo.data.batches import encode
from mpo.data.rows import read_rows
from mpo.errors import InputError
from mpo.logprobs import response_logprobs
from mpo.model import Llama, ScalarModel
from mpo.progress import progress
from mpo.randomness import generator
from mpo.rollout import Rollout, check_agreement, roll_out, state_values
from mpo.sampling import Sampling
from mpo.tokenizer import load_tokenizer
from mpo.training import adamw, learning_rate, milestones, optimiser_step, setup_torch


def prompt_batches(prompts: list[list[int]], config: PPOConfig) -> Iterator[list[list[int]]]:
    """Batches of prompts without end: every prompt once before any comes again."""
    epoch, waiting = 0, list[int]()
    while True:
        while len(waiting) < config.batch:
            waiting += torch.randperm(len(prompts), generator=generator(config.seed, "prompts", epoch)).tolist()
            epoch += 1
        yield [prompts[i] for i in waiting[: config.batch]]
        waiting = waiting[config.batch :]


@dataclass(frozen=True)
class Update:
    """What an update learns from: a rollout, its whitened advantages and its returns, (B, R)."""

    rollout: Rollout
    advantages: Tensor
    returns: Tensor


def rollout_metrics(rollout: Rollout, advantages: Tensor, returns: Tensor, kl_coef: float) -> dict[str, float]:
    """What to watch in PPO, over the whole rollout (docs/metrics.md)."""
    t, mask = rollout.tokens, rollout.tokens.mask
    k1 = t.logp - t.ref_logp
    k3 = torch.exp(-k1) - 1 + k1  # zero where the mask is False, since both log-probs are zero there
    length = mask.sum(1).float()
    together = torch.stack((rollout.scores, length))
    correlation = torch.corrcoef(together)[0, 1] if float(together.std(1).min()) > 0 else torch.zeros(())
    return {
        "score": float(rollout.scores.mean()),
        "score_std": float(rollout.scores.std()),
        "kl_k1": float(k1.sum(1).mean()),
        "kl_k3": float(k3.sum(1).mean()),
        "kl_exact": float(t.kl.sum(1).mean()),
        "entropy": float(ppo.masked_mean(t.entropy, mask)),
        "length": float(length.mean()),
        "eos_rate": float(rollout.finished.float().mean()),
        "score_length_correlation": float(correlation),
        "explained_variance": ppo.explained_variance(rollout.values, returns, mask),
        "return": float(ppo.masked_mean(returns, mask)),
        "advantage_std": float(advantages[mask].std()),
        "kl_coef": kl_coef,
    }


@dataclass(frozen=True)
class Learner:
    """The two models that learn, each with its optimiser."""

    policy: Llama
    critic: ScalarModel
    policy_optimiser: torch.optim.AdamW
    critic_optimiser: torch.optim.AdamW


def accumulate(
    learner: Learner, data: Update, index: Tensor, tokens: int, first: bool, config: PPOConfig
) -> dict[str, float]:
    """Add the gradient of one microbatch, its losses divided by the minibatch's `tokens`.

    Returns metrics as shares of the minibatch's mean. `first`: no weight has changed since the
    rollout, so its log-probs must come out again and every ratio be 1.
    """
    rollout, batch = data.rollout, data.rollout.batch.rows(index)
    R = int(batch.response_len.max())
    mask, old_logp = rollout.tokens.mask[index, :R], rollout.tokens.logp[index, :R]
    logp = response_logprobs(learner.policy, batch, config.temperature).logp
    if first:
        check_agreement(logp.detach()[mask], old_logp[mask], "the rollout and its first update")
    losses, metrics = ppo.policy_losses(logp, old_logp, data.advantages[index, :R], config.clip)
    values = state_values(learner.critic, batch)
    value_losses = ppo.value_losses(values, rollout.values[index, :R], data.returns[index, :R], config.value_clip)
    # policy and critic share no weights, so one backward serves both
    ((losses + value_losses) * mask).sum().div(tokens).backward()
    metrics |= {"policy_loss": losses.detach(), "value_loss": value_losses.detach()}
    return {name: float((value * mask).sum()) / tokens for name, value in metrics.items()}


def update(learner: Learner, data: Update, iteration: int, config: PPOConfig) -> dict[str, float]:
    """`epochs` passes over a rollout in minibatches; returns metrics averaged over the steps."""
    learner.policy.train()
    learner.critic.train()
    share = learning_rate(iteration, config.iterations, 1.0, config.warmup, config.final_lr)
    policy_lr = 0.0 if iteration < config.critic_warmup else share * config.lr
    sums: Counter[str] = Counter()
    steps = 0
    for epoch in range(config.epochs):
        order = torch.randperm(config.batch, generator=generator(config.seed, f"minibatches/{iteration}", epoch))
        for chosen in order.split(config.minibatch):
            tokens = int(data.rollout.tokens.mask[chosen].sum())
            for index in chosen.split(config.microbatch):
                sums.update(accumulate(learner, data, index, tokens, steps == 0, config))
            norms = {
                "policy_grad_norm": optimiser_step(
                    learner.policy_optimiser, learner.policy, policy_lr, config.grad_clip
                ),
                "critic_grad_norm": optimiser_step(
                    learner.critic_optimiser, learner.critic, share * config.critic_lr, config.grad_clip
                ),
            }
            sums.update(norms)
            steps += 1
    return {name: value / steps for name, value in sums.items()}


def main(config: PPOConfig) -> None:
    """Load; then rollout, score, shape rewards, GAE, minibatch updates; save."""
    setup_torch(config)
    exact_div(config.batch, config.minibatch, "--batch and --minibatch")
    exact_div(config.minibatch, config.microbatch, "--minibatch and --microbatch")
    if config.temperature <= 0:
        raise InputError(f"--temperature {config.temperature}: must be above 0; PPO learns from varied samples")
    inputs = {"prompts": config.prompts, "model": config.model, "ref": config.ref, "rm": config.rm}
    stage = Stage(config, inputs, config.out, config.overwrite)
    tokenizer = load_tokenizer(config.model)
    policy, ref = load_model(config.model), load_model(config.ref)
    rm, critic = load_scalar(config.rm), load_scalar(config.rm)
    optimisers = adamw(policy, config.lr, 0.0, eps=1e-5), adamw(critic, config.critic_lr, 0.0, eps=1e-5)
    learner = Learner(policy, critic, *optimisers)
    pairs, counts = encode(
        read_rows(config.prompts)[: config.limit or None], tokenizer, config.max_prompt, config.max_response
    )
    print(f"{stage.out.name}: prompts {counts}")
    batches = prompt_batches([p.prompt for p in pairs], config)
    sampling = Sampling(config.max_new, config.temperature, tokenizer.eos, tokenizer.pad)
    kl_coef, kept = config.kl_coef, milestones(config.iterations, config.keep)

    bar = progress(range(config.iterations), stage.out.name)
    for iteration in bar:
        # 1. rollout and scores (with the self-check that sampling and scoring agree)
        draw = generator(config.seed, "rollout", iteration)
        rollout = roll_out(policy, ref, rm, critic, next(batches), sampling, draw)
        tokens = rollout.tokens
        # 2. rewards: KL to the reference per token, the score at the last one
        score = rollout.scores - config.missing_eos_penalty * ~rollout.finished
        rewards = ppo.shape_rewards(score, tokens.logp, tokens.ref_logp, tokens.mask, kl_coef)
        # 3. advantages
        advantages, returns = ppo.gae(rewards, rollout.values, tokens.mask, config.gamma, config.lam)
        metrics = rollout_metrics(rollout, advantages, returns, kl_coef)
        # 4. updates
        whitened = ppo.whiten(advantages, tokens.mask)
        metrics |= update(learner, Update(rollout, whitened, returns), iteration, config)
        # 5. the price of KL for the next rollout
        kl_coef = ppo.next_kl_coef(kl_coef, metrics["kl_k1"], config.kl_target, config.kl_horizon, config.batch)
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
