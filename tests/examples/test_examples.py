"""The files of examples/ compute what the stages compute: the same losses and, after a step, the same weights."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from mpo.config import PPOConfig
from mpo.data.batches import Batch, Pair, make_batch
from mpo.data.rows import Row
from mpo.model.llama import Llama, LlamaConfig, ScalarModel
from mpo.model.logprobs import compare, response_hidden, response_logprobs
from mpo.model.scoring import score_chosen, score_pairs, state_values
from mpo.ppo.learner import ADAM_EPS, Critic, Learner
from mpo.ppo.rewards import assign_credit
from mpo.ppo.rollout import Rollout
from mpo.ppo.update import Experience, update
from mpo.preference.logps import pair_logps, reference_logps
from mpo.preference.losses import bradley_terry
from mpo.preference.objective import parse_objective
from mpo.preference.split import split_by_gap, threshold
from mpo.training.loop import accumulate
from mpo.training.optimisers import make_optimiser, optimiser_step
from tests.support.scripts import ROOT
from train_rm import normalise

NAMES = ("reward_model", "dpo", "ppo", "mpo")
FILES = {name: ROOT / "examples" / f"{name}_in_one_file.py" for name in NAMES}
LR = 1e-3
EPS = 1e-5  # Adam's first step is g / (|g| + eps): with a smaller one, a gradient of nothing but rounding would count


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FILES[name])
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def examples() -> dict[str, Any]:
    """All of them."""
    torch.manual_seed(0)
    return {name: load(name) for name in NAMES}


LAYER = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def here(name: str) -> str:
    """The name that a weight of an example has in mpo.model.llama."""
    name = name.removeprefix("trunk.")
    if name.startswith("layers."):
        _, number, part, kind = name.split(".")
        return f"model.layers.{number}.{LAYER[part]}.{kind}"
    return name if name.startswith("score.") else "model." + name.replace("embed.", "embed_tokens.")


def twin(model: nn.Module, kind: type[Llama] | type[ScalarModel], example: Any) -> Any:
    """A model of this project with the weights of an example's."""
    config = LlamaConfig(
        vocab_size=len(example.VOCABULARY),
        hidden_size=example.WIDTH,
        intermediate_size=example.FFN,
        num_hidden_layers=example.LAYERS,
        num_attention_heads=example.HEADS,
        num_key_value_heads=example.KV_HEADS,
        head_dim=example.WIDTH // example.HEADS,
    )
    same = kind(config)
    missing, unexpected = same.load_state_dict(
        {here(n): t.clone() for n, t in model.state_dict().items()}, strict=False
    )
    assert set(missing) <= {"lm_head.weight", "score_mean", "score_std"}
    assert not unexpected
    return same


def assert_same_weights(model: nn.Module, same: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Both have the same weights, up to rounding, and every matrix has changed."""
    theirs = dict(same.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(
            weight, theirs[here(name)], rtol=0, atol=0.02 * LR, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert not torch.equal(weight, before[name]), f"{name} has not changed"


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def as_pairs(rows: Any) -> list[Pair]:
    """Pairs of an example as pairs of this project."""
    return [
        Pair(Row(str(i), "", chosen="", rejected=""), chosen[0], chosen[1], rejected[1])
        for i, (chosen, rejected) in enumerate(rows)
    ]


def one_step(model: Any, pairs: list[Pair], losses_of: Any, units: Any) -> float:
    """A step of the loop that SFT, reward model and DPO share; returns the loss."""
    optimiser = make_optimiser(model, LR, 0.0, EPS)
    loss = accumulate(model, pairs, losses_of, units, len(pairs))["loss"]
    optimiser_step(optimiser, model, LR, 1.0)
    return loss


@pytest.mark.parametrize("name", ["dpo", "ppo", "mpo"])
def test_sft_takes_the_step_of_train_sft(examples, name):
    example = examples[name]
    model = example.Llama()
    same, before, rows = twin(model, Llama, example), copied(model), example.pairs("train")[:8]

    def losses_of(part):
        batch = make_batch([(p.prompt, p.chosen) for p in part])
        return -response_logprobs(same, batch).logp.sum(1), {}

    loss = example.sft_loss(model, [chosen for chosen, _ in rows])
    example.step(model, example.adamw(model, EPS), loss, LR)
    theirs = one_step(same, as_pairs(rows), losses_of, lambda pair: len(pair.chosen))
    assert loss.item() == pytest.approx(theirs, abs=1e-5)
    assert_same_weights(model, same, before)


@pytest.mark.parametrize("name", ["dpo", "mpo"])
def test_dpo_takes_the_step_of_train_dpo(examples, name):
    example = examples[name]
    policy, ref = example.Llama(), example.Llama()
    same, before, rows = twin(policy, Llama, example), copied(policy), example.pairs("train")[:8]
    pairs, objective = as_pairs(rows), parse_objective("sigmoid", 0.5)
    cache = reference_logps(twin(ref, Llama, example), pairs, 8)
    loss, D = example.dpo_loss(policy, ref, rows, 0.5)
    example.step(policy, example.adamw(policy, EPS), loss, LR)
    theirs = one_step(same, pairs, lambda part: (objective.losses(pair_logps(same, part, cache)), {}), lambda pair: 1.0)
    assert loss.item() == pytest.approx(theirs, abs=1e-5)
    assert float(D.abs().min()) > 1e-3  # policy and reference differ, so that all four log-probs count
    assert_same_weights(policy, same, before)


@pytest.mark.parametrize("name", ["reward_model", "mpo"])
def test_the_reward_model_takes_the_step_of_train_rm_and_is_normalised_alike(examples, name):
    example = examples[name]
    rm = example.RewardModel(example.Llama())
    same, before, rows = twin(rm, ScalarModel, example), copied(rm), example.pairs("train")[:8]

    def losses_of(part):
        return bradley_terry(*score_pairs(same, part)), {}

    loss, _ = example.bradley_terry_loss(rm, rows)
    example.step(rm, example.adamw(rm, EPS), loss, LR)
    theirs = one_step(same, as_pairs(rows), losses_of, lambda pair: 1.0)
    assert loss.item() == pytest.approx(theirs, abs=1e-5)
    assert_same_weights(rm, same, before)

    example.normalise(rm, rows)
    normalise(same, as_pairs(rows), 4)
    chosen = rm([chosen for chosen, _ in rows])
    torch.testing.assert_close(chosen, score_chosen(same, as_pairs(rows), 4), rtol=0, atol=0.02)


def measured(batch: Batch, policy: Llama, ref: Llama, critic: ScalarModel, scores: torch.Tensor) -> Rollout:
    """What roll_out of this project says of given responses."""
    with torch.no_grad():
        hidden = response_hidden(policy, batch)
        tokens = compare(policy, ref, batch, 1.0, hidden)
        values = state_values(critic, batch, hidden)
    finished = torch.tensor([response[-1] == 1 for _, response in batch.sequences])
    columns = tokens.logp, tokens.ref_logp, tokens.kl, tokens.entropy, values
    return Rollout(batch, batch.response_mask, *columns, scores, finished)


@pytest.mark.parametrize("name", ["ppo", "mpo"])
def test_ppo_takes_the_iteration_of_train_ppo(examples, name):
    example = examples[name]
    policy, ref, critic = example.Llama(), example.Llama(), example.Critic(example.Llama())
    nn.init.normal_(critic.score.weight, std=0.1)  # a head of zeros would hide the trunk
    prompts = [prompt for (prompt, _), _ in example.pairs("train")[:8]]
    raw = torch.randn(8)
    torch.manual_seed(3)
    rollout = example.roll_out(policy, ref, critic, prompts, lambda prompts, responses: raw)
    torch.manual_seed(3)
    responses = example.sample(policy, prompts)
    same, same_ref = twin(policy, Llama, example), twin(ref, Llama, example)
    same_critic = twin(critic, ScalarModel, example)
    batch = make_batch(list(zip(prompts, responses, strict=True)))
    theirs = measured(batch, same, same_ref, same_critic, raw)
    mask = rollout.mask
    for ours, other in (
        (rollout.logp, theirs.logp),
        (rollout.ref_logp, theirs.ref_logp),
        (rollout.values, theirs.values),
    ):
        torch.testing.assert_close(ours[mask], other[theirs.mask], rtol=0, atol=2e-5)

    config = PPOConfig(
        out="", prompts="", model="", ref="", rm="", batch=8, minibatch=8, microbatch=8, iterations=10, lr=LR,
        critic_lr=LR, critic_warmup=0, kl_coef=example.KL_PRICE, missing_eos_penalty=example.EOS_PENALTY,
        lam=example.LAMBDA, clip=example.CLIP, value_clip=example.CLIP,
    )  # fmt: skip
    credit = assign_credit(theirs, config.kl_coef, config)
    assert credit.returns is not None
    advantages, returns = example.advantages_and_returns(rollout)
    torch.testing.assert_close(advantages[mask], credit.loss_advantages[theirs.mask], rtol=0, atol=1e-4)
    torch.testing.assert_close(returns[mask], credit.returns[theirs.mask], rtol=0, atol=1e-4)

    before, before_critic = copied(policy), copied(critic)
    losses = example.ppo_losses(policy, critic, rollout, advantages, returns, torch.arange(8))
    example.step(policy, example.adamw(policy, ADAM_EPS), losses[0], LR)
    example.step(critic, example.adamw(critic, ADAM_EPS), losses[1], LR)
    learner = Learner(
        same,
        make_optimiser(same, LR, 0.0, ADAM_EPS),
        same_ref,
        Critic(same_critic, make_optimiser(same_critic, LR, 0.0, ADAM_EPS)),
    )
    metrics = update(learner, Experience(theirs, credit, config.kl_coef), 0, config)
    assert losses[0].item() == pytest.approx(metrics["policy_loss"], abs=1e-5)
    assert losses[1].item() == pytest.approx(metrics["value_loss"], abs=1e-5)
    assert_same_weights(policy, same, before)
    assert_same_weights(critic, same_critic, before_critic)


def test_the_split_is_that_of_split_data(examples):
    example = examples["mpo"]
    rm, rows = example.RewardModel(example.Llama()), example.pairs("train")[:60]
    parts = example.split_by_gap(rm, rows)
    same = twin(rm, ScalarModel, example)
    with torch.no_grad():
        chosen, rejected = score_pairs(same, as_pairs(rows))
    split = split_by_gap(chosen - rejected, threshold(chosen - rejected, "q0.5"))
    assert {name: [rows.index(pair) for pair in part] for name, part in parts.items()} == split.parts
    assert all(parts.values())


def definitions(path: Path) -> dict[str, str]:
    """The text of each function and class of a file, by name."""
    text = path.read_text(encoding="utf-8")
    nodes = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef))
    return {node.name: ast.get_source_segment(text, node) or "" for node in nodes}


def test_what_several_examples_define_is_the_same_in_all():
    texts: dict[str, set[str]] = {}
    for path in FILES.values():
        for name, text in definitions(path).items():
            texts.setdefault(name, set()).add(text)
    assert {name for name, versions in texts.items() if len(versions) > 1} == {"main", "show"}


def test_examples_import_torch_and_the_built_in_world_alone():
    allowed = {"copy", "re", "collections.abc", "dataclasses", "torch", "torch.nn.functional"}
    allowed |= {"mpo.world.build", "mpo.world.gold"}
    for path in FILES.values():
        imports = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imports |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imports.add(node.module or "")
        assert imports <= allowed, path


@pytest.mark.parametrize("name", NAMES)
def test_every_example_runs_to_its_end_on_a_few_rows(examples, name, monkeypatch, capsys):
    example = examples[name]
    few = {"train": example.DATA["train"][:128], "test": example.DATA["test"][:4]}
    monkeypatch.setattr(example, "DATA", few)
    monkeypatch.setattr(example, "MAX_NEW", 4, raising=False)
    if hasattr(example, "train_ppo"):
        everything = example.train_ppo
        monkeypatch.setattr(example, "train_ppo", lambda *args, rollouts: everything(*args, rollouts=2))
    example.main()
    printed = capsys.readouterr().out
    assert {"reward_model": "held out", "dpo": "DPO: gold", "ppo": "PPO: gold", "mpo": "MPO: gold"}[name] in printed
