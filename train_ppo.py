"""Stage 7: PPO on prompts; in MPO, on those of the hard pairs, from the DPO model and with it as reference.

`--ref` makes it MPO or not: the DPO model for MPO, the SFT model for vanilla PPO.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from mpo.config import PPOConfig
from mpo.data.batches import Pair, encode_for_each
from mpo.data.rows import read_rows
from mpo.data.tokenizer import Tokenizer, shared_tokenizer
from mpo.model.checkpoint import load_scalar, save_model
from mpo.model.generate import Sampling
from mpo.model.lengths import check_lengths
from mpo.model.lora import adapters_of
from mpo.model.scoring import rm_tokenizer, score, scorer_between
from mpo.ppo.equations import next_kl_coef
from mpo.ppo.learner import load_learner
from mpo.ppo.monitor import collapses, rollout_metrics
from mpo.ppo.rewards import assign_credit
from mpo.ppo.rollout import prompt_batches, roll_out
from mpo.ppo.update import Experience, update
from mpo.runtime.entry import run
from mpo.runtime.errors import InputError
from mpo.runtime.flags import exact_div
from mpo.runtime.output import counts_text, note, progress
from mpo.runtime.saves import Saves
from mpo.runtime.seeding import generator
from mpo.runtime.setup import setup_torch
from mpo.runtime.stage import Stage
from mpo.tools import memory
from mpo.training.guards import NotFinite, failure
from mpo.training.loop import milestones


def check(config: PPOConfig) -> None:
    """Refuse flags that contradict each other."""
    exact_div(config.batch, config.minibatch, "--batch", "--minibatch")
    exact_div(config.minibatch, config.microbatch or 1, "--minibatch", "--microbatch")
    exact_div(config.batch, config.group, "--batch", "--group")
    adapters_of(config, config.model)
    if config.advantage == "gae" and config.critic_warmup >= config.iterations:
        raise InputError(
            f"--critic_warmup {config.critic_warmup}: leaves none of the {config.iterations} iterations to the policy"
        )
    if config.advantage in ("rloo", "grpo", "dr_grpo") and config.group < 2:
        raise InputError(f"--advantage {config.advantage}: compares responses to one prompt; set --group to 2 or more")
    if config.kl_target and next_kl_coef(1.0, 0.0, config.kl_target, config.kl_horizon, config.batch) <= 0:
        least = f"a fifth of --batch {config.batch}"  # a rollout then changes the price by less than all of it
        raise InputError(f"--kl_horizon {config.kl_horizon:g}: must be above {least}, or the price of KL falls below 0")


def load_prompts(config: PPOConfig, tokenizers: Sequence[Tokenizer]) -> tuple[list[list[Pair]], dict[str, int]]:
    """The rows whose prompts are sampled from, encoded by each tokenizer, and how many were left out, by reason."""
    everything = read_rows(config.prompts, prompts_alone=True)
    rows = everything[: config.limit or None]
    encoded, counts = encode_for_each(rows, tokenizers, config.max_prompt, config.max_response, prompts_alone=True)
    beyond = len(everything) - len(rows)
    return encoded, counts | ({"dropped: beyond --limit": beyond} if beyond else {})


def warn(stage: Stage, iteration: int, state: dict[str, Any]) -> dict[str, str]:
    """Print each sign of collapse the first time that it appears; returns all signs so far, by name."""
    new = {k: v for k, v in collapses(state["last"], state["first"]).items() if k not in state["warnings"]}
    for words in new.values():
        note(f"\n{stage.name}: warning: rollout {iteration}: {words}")
    return state["warnings"] | {k: f"rollout {iteration}: {v}" for k, v in new.items()}


def main(config: PPOConfig) -> None:
    """Load; then rollout, rewards and advantages, minibatch updates; save."""
    setup_torch(config)
    inputs = {"prompts": config.prompts, "model": config.model, "ref": config.ref, "rm": config.rm}
    stage = Stage(config, inputs, config.out, config.overwrite)
    models, rms = [("--model", config.model), ("--ref", config.ref)], [("--rm", config.rm)]
    tokenizer, reads = shared_tokenizer(models), rm_tokenizer(config.rm)
    (pairs, judged), counts = load_prompts(config, [tokenizer, reads])
    for folders, of_folders in ((models, pairs), (rms, judged)):
        check_lengths(folders, ((len(p.prompt), config.max_new) for p in of_folders), "--max_new")
    scorer = scorer_between(tokenizer, reads, pairs, judged)
    learner, rm = load_learner(config, same_ids=scorer is score), load_scalar(config.rm)
    policy, ref, critic = learner.policy, learner.ref, learner.critic.model if learner.critic else None
    config = memory.with_microbatch(config, policy.config)
    print(f"{stage.name}: prompts: {counts_text(counts)}")
    if scorer is not score:
        print(f"{stage.name}: the reward model has a tokenizer or chat template of its own, and gets responses as text")
    way = memory.way_to_sample(config, policy.config)
    sampling = Sampling(config.max_new, config.temperature, tokenizer.eos, way.whole, way.rows)
    kept = milestones(config.iterations, config.keep)
    saves = Saves(stage, config, learner.parts)
    start = {"kl_coef": config.kl_coef, "first": {}, "last": {}, "warnings": {}}
    done, state = saves.restore(start, config.iterations)  # what one iteration passes to the next, besides weights

    bar = progress(range(done, config.iterations), stage.name, done)
    batches = itertools.islice(prompt_batches(pairs, config), done, None)
    for iteration, batch in zip(bar, batches, strict=False):
        kl_coef, unchanged = state["kl_coef"], True  # unchanged: no weight has been updated yet
        try:
            # 1. Sample responses, and score them with every model; check that sampling and scoring agree.
            draw, prompts = generator(config.seed, "rollout", iteration), [p.prompt for p in batch]
            rollout = roll_out(policy, ref, rm, critic, prompts, sampling, draw, config.microbatch, scorer)
            # 2. Rewards: minus the KL to the reference at each token, plus the score at the last. Then advantages.
            credit = assign_credit(rollout, kl_coef, config)
            metrics = rollout_metrics(rollout, credit) | {"kl_coef": kl_coef}
            # 3. Update policy and critic in minibatches.
            unchanged = False
            metrics |= update(learner, Experience(rollout, credit, kl_coef), iteration, config)
        except NotFinite as e:
            ids = [{"id": p.row.id, "prompt": p.prompt} for p in batch]
            raise failure(stage, iteration, e, ids, saves.before(iteration, state) if unchanged else None) from None
        # 4. Adapt the price of KL for the next rollout.
        kl_coef = next_kl_coef(kl_coef, metrics["kl_k1"], config.kl_target, config.kl_horizon, config.batch)
        stage.log(iteration, metrics)
        if iteration + 1 in kept:
            save_model(stage.out / kept[iteration + 1], policy, tokenizer)
        state = {"kl_coef": kl_coef, "first": state["first"] or metrics, "last": metrics, "warnings": state["warnings"]}
        state["warnings"] = warn(stage, iteration, state)
        saves.after(iteration + 1, state, last=iteration + 1 == config.iterations)
        shown = ("score", "kl_exact", "length", "eos_rate", "entropy")
        bar.set_postfix({name: f"{metrics[name]:.2f}" for name in shown}, refresh=False)

    last = state["last"]
    reached = f"score {last['score']:.3f}, exact KL to the reference {last['kl_exact']:.2f} nats per response"
    print(f"{stage.name}: {reached}")
    save_model(stage.out, policy, tokenizer)
    stage.finish(iterations=config.iterations, last=last, prompts=counts, warnings=state["warnings"])


if __name__ == "__main__":
    run(main, PPOConfig, check, memory.show)
