"""What an update of PPO changes, and what it checks before it changes anything."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch

from mpo.config import PPOConfig
from mpo.data.batches import Pair
from mpo.data.rows import Row
from mpo.model.checkpoint import save_model
from mpo.model.generate import Sampling
from mpo.model.llama import scalar_from
from mpo.ppo.learner import load_learner
from mpo.ppo.rewards import assign_credit
from mpo.ppo.rollout import prompt_batches, roll_out
from mpo.ppo.update import Experience, update
from mpo.runtime.errors import InputError
from mpo.runtime.seeding import generator
from tests.conftest import small_model

PROMPTS = [[1, 5], [1, 7, 9], [1, 4], [1, 30, 31, 32]]


@pytest.fixture
def config(tmp_path) -> PPOConfig:
    """Flags of a small PPO stage, whose models are there."""
    save_model(tmp_path / "policy", small_model())
    save_model(tmp_path / "rm", scalar_from(small_model(seed=2), generator(0, "head")))
    models = {name: str(tmp_path / "policy") for name in ("model", "ref")} | {"rm": str(tmp_path / "rm")}
    sizes = {"iterations": 8, "batch": 4, "minibatch": 4, "microbatch": 4, "critic_warmup": 3}
    return PPOConfig(out="", prompts="", **models, **sizes)


def experience_of(learner, config) -> Experience:
    critic = learner.critic.model
    rollout = roll_out(learner.policy, learner.ref, critic, critic, PROMPTS, Sampling(6, 1.0, 2), generator(0, "r"), 4)
    return Experience(rollout, assign_credit(rollout, config.kl_coef, config), config.kl_coef)


def weights_of(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def test_only_the_critic_changes_while_it_warms_up(config):
    learner = load_learner(config)
    experience = experience_of(learner, config)
    policy, critic = weights_of(learner.policy), weights_of(learner.critic.model)
    update(learner, experience, 2, config)  # the last rollout of the warm-up
    assert torch.equal(weights_of(learner.policy), policy)
    assert not torch.equal(weights_of(learner.critic.model), critic)
    update(learner, experience, 3, config)
    assert not torch.equal(weights_of(learner.policy), policy)


def test_the_first_update_of_a_rollout_is_checked(config):
    learner = load_learner(config)
    experience = experience_of(learner, config)
    shifted = replace(experience.rollout, logp=experience.rollout.logp + 0.01 * experience.rollout.mask)
    before = weights_of(learner.policy)
    with pytest.raises(InputError, match=r"the rollout and its first update differ by 0\.01"):
        update(learner, replace(experience, rollout=shifted), 3, config)
    assert torch.equal(weights_of(learner.policy), before)
    assert update(learner, experience, 3, config)["ratio"] == pytest.approx(1, abs=1e-5)


def test_both_optimisers_of_ppo_have_its_customary_epsilon(config):
    learner = load_learner(config)
    groups = learner.optimiser.param_groups + learner.critic.optimiser.param_groups
    assert [group["eps"] for group in groups] == [1e-5] * len(groups)


def test_every_prompt_comes_once_before_any_comes_again(config):
    rows = [Pair(Row(str(i), "", "", ""), [1, i], [2], [2]) for i in range(10)]
    batches = list(islice(prompt_batches(rows, config), 5))  # 20 prompts
    ids = [pair.row.id for batch in batches for pair in batch]
    assert sorted(ids[:10]) == sorted(ids[10:]) == [str(i) for i in range(10)]
    assert ids[:10] != ids[10:]
