"""What learns in PPO, and how it is loaded: the policy, its reference, and the critic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mpo.config import PPOConfig
from mpo.model.checkpoint import load_as_scalar, load_model, load_scalar
from mpo.model.llama import Llama, ScalarModel, ValueHead, configure_layers
from mpo.model.lora import BaseModel, adapters_of, critic_on
from mpo.runtime import device, distributed
from mpo.runtime.saves import Part
from mpo.runtime.seeding import generator
from mpo.training.optimisers import make_optimiser

ADAM_EPS = 1e-5  # PPO's customary value, as in 2403.17031; Adam's own default is 1e-8


@dataclass(frozen=True)
class Critic:
    """The value model and its optimiser: a model of its own, or a head on the policy's trunk."""

    model: ScalarModel | ValueHead
    optimiser: torch.optim.Optimizer
    weight: float = 1.0  # of its loss; below 1 where the trunk has to serve both


@dataclass(frozen=True)
class Learner:
    """Policy, its reference and, for GAE, the critic."""

    policy: Llama
    optimiser: torch.optim.Optimizer
    ref: Llama | BaseModel
    critic: Critic | None

    @property
    def models(self) -> list[nn.Module]:
        """Those that learn."""
        return [self.policy, self.critic.model] if self.critic else [self.policy]

    @property
    def parts(self) -> dict[str, Part]:
        """What a save has to hold."""
        parts = {"policy": Part(self.policy, self.optimiser)}
        return parts | ({"critic": Part(self.critic.model, self.critic.optimiser)} if self.critic else {})


def load_critic(config: PPOConfig, policy: Llama, same_ids: bool) -> Critic | None:
    """The critic that the flags ask for.

    By default a model that starts as the reward model or, if that reads other ids than the policy writes, as the policy
    with a head of zeros; with LoRA adapters and a head on the policy's base; with --shared_critic only a head on the
    policy's trunk.
    """
    if config.advantage != "gae":
        return None
    if config.shared_critic:
        model: ScalarModel | ValueHead = ValueHead(policy.config.hidden_size).to(device.current())
    elif (adapters := adapters_of(config, config.model)) and not config.shard:
        model = critic_on(policy, adapters)
    elif adapters or not same_ids:  # with --shard: two models cannot share sharded weights
        model = load_as_scalar(config.model, generator(config.seed, "critic"), adapters)
        nn.init.zeros_(model.score.weight)
    else:
        model = load_scalar(config.rm)
    distributed.wrap(model)
    weight = config.value_coef if config.shared_critic else 1.0
    return Critic(model, make_optimiser(model, config.critic_lr, 0.0, ADAM_EPS, config.optimiser), weight)


def load_learner(config: PPOConfig, same_ids: bool = True) -> Learner:
    """Load policy, reference and critic, with their optimisers. With LoRA they share the weights of the base.

    same_ids: the reward model reads the ids that the policy writes, so that the critic can begin as the reward model.
    """
    policy = load_model(config.model, adapters_of(config, config.model))
    same = policy.adapters and Path(config.ref).resolve() == Path(config.model).resolve()
    ref = BaseModel(policy) if same else load_model(config.ref).requires_grad_(False)
    distributed.wrap(policy)
    optimiser = make_optimiser(policy, config.lr, 0.0, ADAM_EPS, config.optimiser)
    learner = Learner(policy, optimiser, ref, load_critic(config, policy, same_ids))
    for model in [*learner.models, ref]:
        configure_layers(model, config.recompute, config.compile)
    return learner
