"""The learning half of PPO: minibatch updates of policy and critic on one rollout."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpo import device, parallel, ppo
from mpo.config import PPOConfig
from mpo.data.batches import Batch
from mpo.guards import agree_finite, not_finite
from mpo.logprobs import compare, response_hidden, response_logprobs
from mpo.lora import BaseOf
from mpo.model import Llama, ScalarModel, ValueHead
from mpo.optimisers import learning_rate, optimiser_step
from mpo.randomness import generator
from mpo.rollout import Rollout, check_agreement, state_values
from mpo.training import microbatches


@dataclass(frozen=True)
class Update:
    """What an update learns from: a rollout, its advantages and (for a critic) its returns, (B, R)."""

    rollout: Rollout
    advantages: Tensor
    returns: Tensor  # 0 without a critic
    kl_coef: float  # the price of KL, where it is part of the loss


@dataclass(frozen=True)
class Critic:
    """What values states, with its optimiser: a model of its own, or a head on the policy's trunk."""

    model: ScalarModel | ValueHead
    optimiser: torch.optim.Optimizer
    weight: float = 1.0  # of its loss; a trunk that is shared has to serve both


@dataclass(frozen=True)
class Learner:
    """What learns (policy and, for GAE, critic), and the reference it is held to."""

    policy: Llama
    optimiser: torch.optim.Optimizer
    ref: Llama | BaseOf
    critic: Critic | None

    @property
    def models(self) -> list[nn.Module]:
        """Those that learn."""
        return [self.policy, self.critic.model] if self.critic else [self.policy]


def policy_terms(
    learner: Learner, data: Update, index: Tensor, batch: Batch, hidden: Tensor, first: bool, config: PPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy's loss per token (b, R) on some rows of the rollout, with metrics.

    `first`: no weight has changed since the rollout, so its log-probs must come out again and every
    ratio be 1.
    """
    R = batch.response_mask.shape[1]
    old = data.rollout.tokens
    mask, old_logp, ref_logp = old.mask[index, :R], old.logp[index, :R], old.ref_logp[index, :R]
    in_loss = config.kl_in == "loss"
    if in_loss and config.kl_estimator == "exact":
        tokens = compare(learner.policy, learner.ref, batch, config.temperature, hidden)
        logp, kl = tokens.logp, tokens.kl
    else:
        logp = response_logprobs(learner.policy, batch, config.temperature, hidden).logp
        kl = ppo.kl_estimate(logp, ref_logp, config.kl_estimator) if in_loss else torch.zeros_like(logp)
    if first:
        check_agreement(logp.detach()[mask], old_logp[mask], "the rollout and its first update")
    losses, metrics = ppo.policy_losses(logp, old_logp, data.advantages[index, :R], config.clip)
    metrics["policy_loss"] = losses.detach()
    return losses + data.kl_coef * kl, metrics


def value_terms(critic: Critic, data: Update, index: Tensor, batch: Batch, hidden: Tensor, config: PPOConfig) -> Tensor:
    """The critic's loss per token (b, R) on some rows of the rollout."""
    R = batch.response_mask.shape[1]
    assert data.rollout.values is not None
    old_values, returns = data.rollout.values[index, :R], data.returns[index, :R]
    return ppo.value_losses(state_values(critic.model, batch, hidden), old_values, returns, config.value_clip)


def accumulate(
    learner: Learner, data: Update, index: Tensor, weights: Tensor, first: bool, config: PPOConfig
) -> tuple[dict[str, float], list[int]]:
    """Add the gradient of one microbatch; `weights` (b, R) are its tokens' shares of the minibatch's mean.

    Returns metrics summed with the same weights, and the rows whose loss is not finite.
    """
    batch = data.rollout.batch.rows(index.tolist())
    hidden = response_hidden(learner.policy, batch)  # (M, D)
    total, metrics = policy_terms(learner, data, index, batch, hidden, first, config)
    if critic := learner.critic:  # one backward serves both
        value_losses = value_terms(critic, data, index, batch, hidden, config)
        metrics["value_loss"] = value_losses.detach()
        total = total + critic.weight * value_losses
    weights = weights[:, : total.shape[1]]
    losses = total * weights
    (losses.sum() * parallel.count()).backward()  # the processes' gradients are averaged
    return {name: float((value * weights).sum()) for name, value in metrics.items()}, not_finite(losses, index.tolist())


def step(
    learner: Learner, data: Update, chosen: Tensor, lrs: tuple[float, float], first: bool, config: PPOConfig
) -> dict[str, float]:
    """One optimiser step (of policy and critic) on some rows of the rollout; returns its metrics.

    Errors: NotFinite, before a weight is touched.
    """
    weights = ppo.token_weights(data.rollout.tokens.mask[chosen], config.advantage, config.max_new)
    sums: Counter[str] = Counter()  # of floats
    bad = list[int]()
    for index in microbatches(len(chosen), config.microbatch, learner.models):
        at = torch.tensor(index).to(chosen.device)
        metrics, worse = accumulate(learner, data, chosen[at], weights[at], first, config)
        sums.update(metrics)
        bad += worse
    agree_finite("the loss", bad)
    found = {name: value / float(weights.sum()) for name, value in parallel.sums(sums).items()}
    found["policy_grad_norm"] = optimiser_step(learner.optimiser, learner.policy, lrs[0], config.grad_clip)
    if critic := learner.critic:
        found["critic_grad_norm"] = optimiser_step(critic.optimiser, critic.model, lrs[1], config.grad_clip)
    return found


def update(learner: Learner, data: Update, iteration: int, config: PPOConfig) -> dict[str, float]:
    """`epochs` passes over a rollout in minibatches; returns metrics averaged over the steps."""
    for model in learner.models:
        model.train()
    share = learning_rate(iteration, config.iterations, 1.0, config.warmup, config.final_lr)
    policy_lr = 0.0 if learner.critic and iteration < config.critic_warmup else share * config.lr
    sums: Counter[str] = Counter()  # of floats
    steps = 0
    for epoch in range(config.epochs):
        order = torch.randperm(config.batch, generator=generator(config.seed, f"minibatches/{iteration}", epoch))
        for chosen in order.to(device.here()).split(config.minibatch):
            sums.update(step(learner, data, chosen, (policy_lr, share * config.critic_lr), steps == 0, config))
            steps += 1
    return {name: value / steps for name, value in sums.items()}
