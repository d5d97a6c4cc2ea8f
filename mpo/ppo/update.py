"""The learning half of PPO: minibatch updates of policy and critic on one rollout."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from mpo.config import PPOConfig
from mpo.data.batches import Batch
from mpo.model.logprobs import compare, response_hidden, response_logprobs
from mpo.model.scoring import state_values
from mpo.ppo.equations import kl_estimate, policy_losses, token_weights, value_losses
from mpo.ppo.learner import Critic, Learner
from mpo.ppo.rewards import Credit
from mpo.ppo.rollout import Rollout, check_agreement
from mpo.runtime import device, distributed
from mpo.runtime.seeding import generator
from mpo.training.guards import agree_finite, not_finite
from mpo.training.loop import microbatches
from mpo.training.optimisers import learning_rate, optimiser_step


@dataclass(frozen=True)
class Experience:
    """What an update learns from."""

    rollout: Rollout
    credit: Credit
    kl_coef: float  # the price of KL, used here where it is part of the loss


def policy_terms(
    learner: Learner,
    experience: Experience,
    index: Tensor,
    batch: Batch,
    hidden: Tensor,
    first: bool,
    config: PPOConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy's loss of each token (b, R) in some rows of the rollout, with metrics.

    With `first`, no weight has changed since the rollout. The log-probs computed here must then equal the rollout's,
    and every ratio must be 1.
    """
    R = batch.response_mask.shape[1]
    rollout = experience.rollout
    mask, old_logp, ref_logp = rollout.mask[index, :R], rollout.logp[index, :R], rollout.ref_logp[index, :R]
    in_loss = config.kl_in == "loss"
    if in_loss and config.kl_estimator == "exact":
        tokens = compare(learner.policy, learner.ref, batch, config.temperature, hidden)
        logp, kl = tokens.logp, tokens.kl
    else:
        logp = response_logprobs(learner.policy, batch, config.temperature, hidden).logp
        kl = kl_estimate(logp, ref_logp, config.kl_estimator) if in_loss else torch.zeros_like(logp)
    if first:
        check_agreement(logp.detach()[mask], old_logp[mask], "the rollout and its first update")
    losses, metrics = policy_losses(logp, old_logp, experience.credit.loss_advantages[index, :R], config.clip)
    metrics["policy_loss"] = losses.detach()  # without the KL
    return losses + experience.kl_coef * kl, metrics


def value_terms(
    critic: Critic, experience: Experience, index: Tensor, batch: Batch, hidden: Tensor, config: PPOConfig
) -> Tensor:
    """The critic's loss of each token (b, R) in some rows of the rollout."""
    R = batch.response_mask.shape[1]
    old_values, returns = experience.rollout.values, experience.credit.returns
    assert old_values is not None
    assert returns is not None
    values = state_values(critic.model, batch, hidden)
    return value_losses(values, old_values[index, :R], returns[index, :R], config.value_clip)


def accumulate(
    learner: Learner, experience: Experience, index: Tensor, weights: Tensor, first: bool, config: PPOConfig
) -> tuple[dict[str, float], list[int]]:
    """Add the gradient of one microbatch; `weights` (b, R) are its tokens' weights in the minibatch's mean.

    Returns metrics summed with the same weights, and the rows whose loss is not finite.
    """
    batch = experience.rollout.batch.rows(index.tolist())
    hidden = response_hidden(learner.policy, batch)  # (M, D)
    total, metrics = policy_terms(learner, experience, index, batch, hidden, first, config)
    if critic := learner.critic:  # a single backward pass serves both
        of_values = value_terms(critic, experience, index, batch, hidden, config)
        metrics["value_loss"] = of_values.detach()
        total = total + critic.weight * of_values
    weights = weights[:, : total.shape[1]]
    losses = total * weights
    (losses.sum() * distributed.world_size()).backward()  # the processes' gradients are averaged, not added
    return {name: float((value * weights).sum()) for name, value in metrics.items()}, not_finite(losses, index.tolist())


def step(
    learner: Learner, experience: Experience, chosen: Tensor, lrs: tuple[float, float], first: bool, config: PPOConfig
) -> dict[str, float]:
    """One optimiser step of policy and critic on some rows of the rollout; returns its metrics.

    Raises NotFinite before any weight is changed.
    """
    weights = token_weights(experience.rollout.mask[chosen], config.advantage, config.max_new)
    sums: Counter[str] = Counter()  # of floats
    bad = list[int]()
    for index in microbatches(len(chosen), config.microbatch, learner.models):
        at = torch.tensor(index).to(chosen.device)
        metrics, worse = accumulate(learner, experience, chosen[at], weights[at], first, config)
        sums.update(metrics)
        bad += worse
    agree_finite("the loss", bad)
    means = {name: value / float(weights.sum()) for name, value in distributed.all_sum(sums).items()}
    means["policy_grad_norm"] = optimiser_step(learner.optimiser, learner.policy, lrs[0], config.grad_clip)
    if critic := learner.critic:
        means["critic_grad_norm"] = optimiser_step(critic.optimiser, critic.model, lrs[1], config.grad_clip)
    return means


def update(learner: Learner, experience: Experience, iteration: int, config: PPOConfig) -> dict[str, float]:
    """`epochs` passes over a rollout in minibatches; returns metrics averaged over the steps."""
    for model in learner.models:
        model.train()
    share = learning_rate(iteration, config.iterations, 1.0, config.warmup, config.final_lr)
    # While only the critic learns, the policy's steps have size 0: Adam's moments fill, and the weights stay.
    policy_lr = 0.0 if learner.critic and iteration < config.critic_warmup else share * config.lr
    sums: Counter[str] = Counter()  # of floats
    steps = 0
    for epoch in range(config.epochs):
        order = torch.randperm(config.batch, generator=generator(config.seed, f"minibatches/{iteration}", epoch))
        for chosen in order.to(device.current()).split(config.minibatch):
            sums.update(step(learner, experience, chosen, (policy_lr, share * config.critic_lr), steps == 0, config))
            steps += 1
    return {name: value / steps for name, value in sums.items()}
