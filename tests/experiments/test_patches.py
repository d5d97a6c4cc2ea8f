"""Every patch changes what it says, and nothing else; without one, a stage is exactly what its script gives.

A patch that silently does nothing would print a false number in docs/details.md.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_dpo
import train_ppo
import train_rm
import train_sft
from experiments import grid, patches
from experiments.grid import Cell
from experiments.patches import OF_STAGE, PATCHES, Patcher
from mpo.config import PPOConfig
from mpo.data.batches import Pair, encode, make_batch
from mpo.data.rows import Row, read_rows
from mpo.data.tokenizer import load_tokenizer
from mpo.kernels.functions import Packing
from mpo.model import checkpoint
from mpo.model import generate as generation
from mpo.model.checkpoint import load_as_scalar, load_model, load_scalar, save_model
from mpo.model.generate import Samples, Sampling
from mpo.model.llama import Block, scalar_from
from mpo.model.scoring import score
from mpo.ppo import learner, rewards, rollout, update
from mpo.ppo.equations import whiten
from mpo.preference.losses import PairLogps
from mpo.runtime.errors import InputError, RunError
from mpo.runtime.files import read_json, write_json
from mpo.runtime.seeding import generator
from mpo.runtime.stage import Stage
from tests.conftest import SMALL, small_config, small_model
from tests.support.makefile import make
from tests.support.scripts import run_script

SEQUENCES = [([1, 5], [6, 7, 2]), ([1, 9, 9], [4, 2])]
MASK = torch.tensor([[True, True, True], [True, True, False]])
EOS = 2


def batch():
    return make_batch(SEQUENCES)


@pytest.fixture
def apply(monkeypatch):
    """A function that applies a patch until the end of the test."""

    def apply(name: str) -> Patcher:
        patcher = Patcher(monkeypatch.setattr)
        PATCHES[name].apply(patcher)
        return patcher

    return apply


@pytest.fixture
def reward_model():
    return scalar_from(small_model(seed=2), generator(0, "head")).eval()


def value_of(rm, ids) -> float:
    """What a scalar model says at the last of these tokens."""
    return rm(torch.tensor(ids), Packing([len(ids)]))[-1].item()


def logp_of(model, ids, begin: int) -> float:
    """Log-prob of the tokens from `begin` on, from the whole table of logits."""
    logps = model.logits(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(logps[i - 1, ids[i]].item() for i in range(begin, len(ids)))


# --- SFT and the reward model -------------------------------------------------------------------------


def test_no_eos_leaves_the_last_token_out_of_the_loss(apply):
    model = small_model()
    whole = train_sft.response_logprobs(model, batch()).logp
    apply("no_eos")
    masked = train_sft.response_logprobs(model, batch()).logp
    expected = whole.clone()
    expected[0, 2] = expected[1, 1] = 0  # EOS of each
    assert torch.equal(masked, expected)
    assert whole[0, 2] < 0


def test_cut_shortens_chosen_responses_and_takes_their_eos(apply, tokenizer):
    rows = [
        Row("a", "\n\nHuman: Hi\n\nAssistant:", " Hello there." * 20, " No."),
        Row("b", "\n\nHuman: Hi", " Yes.", " No."),
    ]
    whole, _ = encode(rows, tokenizer, 384, 400)
    apply("cut")
    pairs, counts = train_sft.encode(rows, tokenizer, 384, 400)
    assert counts == {"kept": 2}
    assert pairs[0].chosen == whole[0].chosen[:16]
    assert tokenizer.eos not in pairs[0].chosen
    assert pairs[1] == whole[1]


def test_prompt_loss_is_over_every_token_but_bos(apply, monkeypatch):
    seen = []
    monkeypatch.setattr(train_sft, "train", lambda *args: seen.extend(args))
    apply("prompt_loss")
    model, config = small_model(), object()
    train_sft.train(model, ["batches"], "losses of the response", "its units", config, "stage")
    assert (seen[0], seen[1], seen[4], seen[5]) == (model, ["batches"], config, "stage")
    pairs = [
        Pair(Row(str(i), "", "", ""), prompt, response, response) for i, (prompt, response) in enumerate(SEQUENCES)
    ]
    losses, _ = seen[2](pairs)
    assert losses.tolist() == pytest.approx([-logp_of(model, p + r, 1) for p, r in SEQUENCES], rel=1e-4)
    assert [seen[3](pair) for pair in pairs] == [4, 4]


def test_new_trunk_keeps_only_the_head(apply, tmp_path):
    save_model(tmp_path, small_model())
    with_trunk = load_as_scalar(tmp_path, generator(1, "head"))
    apply("new_trunk")
    rm = train_rm.load_as_scalar(tmp_path, generator(1, "head"), None)
    assert torch.equal(rm.score.weight, with_trunk.score.weight)
    assert rm.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert with_trunk.model.embed_tokens.weight.std().item() == pytest.approx(0.16, rel=0.1)  # of small_model
    assert all(bool((p == 1).all()) for p in rm.parameters() if p.dim() == 1)


def test_large_head_is_ten_times_as_large(apply):
    usual = checkpoint.new_score_head(small_config(), generator(1, "head"))
    apply("large_head")
    large = checkpoint.new_score_head(small_config(), generator(1, "head"))
    torch.testing.assert_close(large["score.weight"], 10 * usual["score.weight"])
    assert large["score_std"] == usual["score_std"]


# --- DPO ----------------------------------------------------------------------------------------------


@pytest.fixture
def fixed_logps(monkeypatch):
    """The log-probs that DPO would compute."""
    numbers = {"chosen": -30.3, "rejected": -12.0, "ref_chosen": -33.0, "ref_rejected": -10.6}
    lengths = {"chosen_len": 10.0, "rejected_len": 4.0}
    logps = PairLogps(**{name: torch.tensor([x]) for name, x in (numbers | lengths).items()})
    logps.chosen.requires_grad_()
    monkeypatch.setattr(train_dpo, "pair_logps", lambda *args: logps)
    return logps


def test_mean_logps_are_divided_by_the_length(apply, fixed_logps):
    apply("mean_logps")
    means = train_dpo.pair_logps(None, [], {})
    values = [getattr(means, name).item() for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
    assert values == pytest.approx([-3.03, -3.0, -3.3, -2.65])
    assert means.chosen_len is fixed_logps.chosen_len


def test_bf16_logps_are_rounded_and_keep_their_gradient(apply, fixed_logps):
    apply("bf16_logps")
    rounded = train_dpo.pair_logps(None, [], {})
    assert rounded.chosen.item() == -30.25  # between 16 and 32, bf16 has every eighth
    assert rounded.ref_rejected.item() == -10.625  # between 8 and 16, every sixteenth
    rounded.chosen.sum().backward()
    assert fixed_logps.chosen.grad.item() == 1


def test_no_reference_gives_log_probs_of_0_and_passes_the_check(apply, fixed_logps):
    pairs = [Pair(Row(i, "", "", ""), [1], [2], [2]) for i in "ab"]
    with pytest.raises(InputError, match="self-check"), torch.no_grad():
        train_dpo.self_check(fixed_logps)
    patcher = apply("no_reference")
    assert train_dpo.reference_logps(None, pairs, 2) == {"a": (0.0, 0.0), "b": (0.0, 0.0)}
    assert patcher.unused == {"train_dpo.self_check"}
    train_dpo.self_check(fixed_logps)
    assert patcher.unused == set()


# --- PPO: rollouts ------------------------------------------------------------------------------------


def samples_of(*responses) -> Samples:
    return Samples(
        [list(r) for r in responses], [[-1.0] * len(r) for r in responses], [r[-1] == EOS for r in responses]
    )


def no_check_left() -> bool:
    """Whether the check of sampling against scoring is off, but that of the first update is not."""
    one, other = torch.tensor([-1.0]), torch.tensor([-2.0])
    with pytest.raises(InputError):
        update.check_agreement(one, other, "the rollout and its first update")
    return rollout.check_agreement(one, other, "sampling and scoring") == 0.0


def test_cold_sampler_samples_at_another_temperature(apply, monkeypatch):
    seen = []
    monkeypatch.setattr(rollout, "generate", lambda *args: seen.append(args) or samples_of([2]))
    apply("cold_sampler")
    rollout.generate("policy", "prompts", Sampling(6, 1.0, EOS, rows=3), "draw")
    assert seen == [("policy", "prompts", Sampling(6, 0.7, EOS, rows=3), "draw")]
    assert no_check_left()


def test_top_p_draws_only_likely_tokens_but_gives_their_true_log_probs(apply):
    apply("top_p")
    probs = torch.tensor([0.05, 0.5, 0.3, 0.15])  # 0.5, 0.3 and 0.15 are needed to reach 0.9
    hidden, weight = torch.ones(1, 1), probs.log()[:, None]
    uniforms = torch.arange(0, 1, 0.001)
    tokens, logps = generation.next_tokens(hidden.expand(1000, 1), weight, uniforms, 1.0)
    counts = tokens.bincount(minlength=4).tolist()
    assert counts == pytest.approx([0, 1000 * 0.5 / 0.95, 1000 * 0.3 / 0.95, 1000 * 0.15 / 0.95], abs=2)
    torch.testing.assert_close(logps, probs[tokens].log())
    assert generation.next_tokens(hidden, torch.tensor([[0.0], [60.0]]), torch.tensor([0.9999999]), 1.0)[0].item() == 1


def test_stale_sampler_samples_with_the_weights_of_the_rollout_before(apply, monkeypatch):
    seen = []
    sample = lambda policy, *more: seen.append(policy.weight.item()) or samples_of([2])  # noqa: E731
    monkeypatch.setattr(rollout, "generate", sample)
    apply("stale_sampler")
    policy = torch.nn.Linear(1, 1, bias=False)
    for weight in (1.0, 2.0, 3.0):
        torch.nn.init.constant_(policy.weight, weight)
        rollout.generate(policy, "prompts")
    assert seen == [1.0, 1.0, 2.0]
    assert policy.weight.item() == 3.0
    assert no_check_left()


def test_retokenised_responses_have_the_ids_of_their_text(apply, monkeypatch, tokenizer):
    whole = tokenizer.response_ids(" It is green.")
    letters = [i for c in " It is green." for i in tokenizer.vocabulary.encode(c)]
    text = tokenizer.decode(letters)
    assert letters != tokenizer.response_ids(text, finished=False)
    given = Samples([[*letters, tokenizer.eos], letters, whole], [[-1.0]] * 3, [True, False, True])
    monkeypatch.setattr(rollout, "generate", lambda *args: given)
    monkeypatch.setattr(train_ppo, "shared_tokenizer", lambda models: tokenizer)
    apply("retokenised")
    assert train_ppo.shared_tokenizer([]) is tokenizer
    samples = rollout.generate("policy", "prompts", Sampling(6, 1.0, EOS), "draw")
    assert samples.responses == [tokenizer.response_ids(text), tokenizer.response_ids(text, finished=False), whole]
    assert samples.finished == [True, False, True]
    assert [len(logps) for logps in samples.logps] == [len(r) for r in samples.responses]
    assert no_check_left()


def test_two_bos_doubles_the_first_token_of_every_prompt(apply, monkeypatch):
    pair = Pair(Row("a", "", "", ""), [1, 5, 6], [2], [2])
    monkeypatch.setattr(train_ppo, "load_prompts", lambda *args: ([[pair], [pair]], {"kept": 1}))
    apply("two_bos")
    assert train_ppo.load_prompts("config", "tokenizers") == ([[replace(pair, prompt=[1, 1, 5, 6])]] * 2, {"kept": 1})


@pytest.fixture
def scores(monkeypatch, reward_model):
    """A function: the scores that roll_out would compute of sequences, after a patch."""
    monkeypatch.setattr(train_ppo, "roll_out", lambda *args: args[8](reward_model, args[0]))
    sampling = Sampling(6, 1.0, EOS)

    def scores(sequences) -> list[float]:
        middle = ("ref", "rm", "critic", "prompts", sampling, "draw", 2)
        return train_ppo.roll_out(make_batch(sequences), *middle, score).tolist()

    return scores


def test_before_eos_reads_the_score_of_a_response_without_its_last_token(apply, scores, reward_model):
    assert scores(SEQUENCES) == pytest.approx([value_of(reward_model, p + r) for p, r in SEQUENCES], abs=1e-5)
    apply("before_eos")
    alone = [([1, 5], [2])]
    assert scores(SEQUENCES) == pytest.approx([value_of(reward_model, p + r[:-1]) for p, r in SEQUENCES], abs=1e-5)
    assert scores(alone) == pytest.approx([value_of(reward_model, [1, 5])], abs=1e-5)


def test_faked_eos_scores_an_unfinished_response_as_a_finished_one(apply, scores, reward_model):
    apply("faked_eos")
    unfinished = [([1, 5], [6, 7]), SEQUENCES[1]]
    expected = [value_of(reward_model, [1, 5, 6, 7, EOS]), value_of(reward_model, [1, 9, 9, 4, EOS])]
    assert scores(unfinished) == pytest.approx(expected, abs=1e-5)


def test_raw_scores_are_those_before_normalising(apply, tmp_path, reward_model):
    ids = [1, 5, 6, 2]
    raw = value_of(reward_model, ids)
    with torch.no_grad():
        reward_model.score_mean += 3.0
        reward_model.score_std *= 2.0
    save_model(tmp_path, reward_model)
    assert value_of(load_scalar(tmp_path), ids) == pytest.approx((raw - 3) / 2, abs=1e-5)
    apply("raw_scores")
    assert value_of(train_ppo.load_scalar(tmp_path), ids) == pytest.approx(raw, abs=1e-5)
    assert value_of(learner.load_scalar(tmp_path), ids) == pytest.approx(raw, abs=1e-5)


# --- PPO: rewards and advantages ----------------------------------------------------------------------


def test_last_column_adds_the_score_there(apply):
    scores, kl = torch.tensor([2.0, 3.0]), torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]])
    assert rewards.shape_rewards(scores, kl, MASK, 1.0)[1].tolist() == pytest.approx([-0.4, 2.5, 0.0])
    apply("last_column")
    expected = [-0.1, -0.2, 1.7, -0.4, -0.5, 3.0]
    assert rewards.shape_rewards(scores, kl, MASK, 1.0).flatten().tolist() == pytest.approx(expected)


def test_whitened_scores_have_mean_0_and_deviation_1(apply):
    apply("whitened_scores")
    finished = torch.tensor([True, True, False])
    scores = rewards.penalised_scores(torch.tensor([1.0, 2.0, 4.0]), finished, 1.0)  # 1, 2, 3 with the penalty
    assert scores.tolist() == pytest.approx([-1.0, 0.0, 1.0])


@pytest.fixture
def config(tmp_path) -> PPOConfig:
    """Flags of a small PPO stage, whose models are there."""
    save_model(tmp_path / "policy", small_model())
    save_model(tmp_path / "rm", scalar_from(small_model(seed=2), generator(0, "head")))
    models = {name: str(tmp_path / "policy") for name in ("model", "ref")} | {"rm": str(tmp_path / "rm")}
    return PPOConfig(out="", prompts="", **models)


def test_critic_from_policy_has_the_policys_trunk_and_values_of_0(apply, config):
    apply("critic_from_policy")
    loaded = train_ppo.load_learner(config, same_ids=True)
    trunk = loaded.policy.model.state_dict()
    assert all(torch.equal(t, trunk[name]) for name, t in loaded.critic.model.model.state_dict().items())
    assert not loaded.critic.model.score.weight.any()


@pytest.mark.parametrize("module", [rollout, update], ids=["rollout", "update"])
def test_value_after_knows_the_token(apply, reward_model, module):
    def values():
        return module.state_values(reward_model, batch(), None)[MASK].tolist()

    before = [value_of(reward_model, p + r[:t]) for p, r in SEQUENCES for t in range(len(r))]
    after = [value_of(reward_model, p + r[: t + 1]) for p, r in SEQUENCES for t in range(len(r))]
    assert values() == pytest.approx(before, abs=1e-5)
    apply("value_after")
    assert values() == pytest.approx(after, abs=1e-5)


X = torch.tensor([[1.0, 3.0, 5.0], [7.0, 9.0, 0.0]])


def test_no_whitening_leaves_advantages_as_they_are(apply):
    apply("no_whitening")
    assert torch.equal(rewards.whiten(X, MASK), X)


def test_whitened_padding_counts_the_zeros(apply):
    apply("whitened_padding")
    mean, variance = 25 / 6, 165 / 6 - (25 / 6) ** 2  # of all six numbers
    expected = (X - mean) / math.sqrt(variance) * MASK
    torch.testing.assert_close(rewards.whiten(X, MASK), expected, atol=1e-4, rtol=1e-4)
    assert rewards.whiten(X, MASK)[1, 2] == 0


def test_whitened_minibatches_have_mean_0_each(apply, monkeypatch):
    seen = []
    monkeypatch.setattr(update, "step", lambda *args: seen.append(args) or {})
    apply("whitened_minibatches")
    nothing = rewards.Credit(*[None] * 6, loss_advantages=whiten(X, MASK))
    experience = update.Experience(SimpleNamespace(mask=MASK), nothing, 0.05)
    update.step("learner", experience, torch.tensor([1]), (1.0, 2.0), True, "config")
    advantages = seen[0][1].credit.loss_advantages
    assert advantages[1].tolist() == pytest.approx([-1.0, 1.0, 0.0], abs=1e-5)
    assert torch.equal(advantages[0], whiten(X, MASK)[0])
    assert seen[0][2:] == (torch.tensor([1]), (1.0, 2.0), True, "config")


# --- PPO: the update ----------------------------------------------------------------------------------


def test_dropout_is_on_in_training_alone(apply, config):
    patcher = apply("dropout")
    policy = train_ppo.load_learner(config, same_ids=True).policy
    whole = load_model(config.model)

    def hidden(model):
        return model(torch.tensor([1, 5, 6, 2]), Packing([4]))

    assert torch.equal(hidden(policy.eval()), hidden(whole))
    policy.train()
    assert not torch.equal(hidden(policy), hidden(policy))
    # Of the numbers that a layer adds, about a tenth is 0, and the others are larger by 1/0.9.
    block = next(m for m in policy.modules() if isinstance(m, Block))
    x = torch.randn(200, policy.config.hidden_size, generator=generator(0, "x"))
    dropped, kept = block.mlp(x), block.eval().mlp(x)
    zero = dropped == 0
    assert zero.float().mean().item() == pytest.approx(0.1, abs=0.02)
    torch.testing.assert_close(dropped[~zero], kept[~zero] / 0.9)
    assert patcher.unused == {"mpo.ppo.update.check_agreement"}
    assert update.check_agreement(torch.tensor([1.0]), torch.tensor([2.0]), "x") == 0.0


def test_adams_epsilon_is_its_own_default(apply, config):
    apply("adams_epsilon")
    loaded = train_ppo.load_learner(config)
    assert {g["eps"] for g in loaded.optimiser.param_groups + loaded.critic.optimiser.param_groups} == {1e-8}


def test_loss_by_response_weighs_responses_alike(apply):
    assert update.token_weights(MASK, "gae", 64)[0].tolist() == pytest.approx([0.2, 0.2, 0.2])
    apply("loss_by_response")
    weights = update.token_weights(MASK, "gae", 64)
    assert weights.flatten().tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4, 0.0])


def test_every_patch_has_a_test():
    here = Path(__file__).read_text()
    assert [name for name in PATCHES if f'apply("{name}")' not in here] == []


# --- whole stages -------------------------------------------------------------------------------------

SIZES = ("--batch", 8, "--minibatch", 4, "--microbatch", 2, "--max_new", 10, "--threads", 1)


def run_stage(run, out, script: str, *program: object) -> dict[str, str]:
    """Run a stage at toy size, started by `program`; returns the hashes of what it wrote, and its mark."""
    data, model = ("--data", run / "data"), ("--model", run / "sft")
    models = ("--model", run / "dpo", "--ref", run / "dpo", "--rm", run / "rm")
    flags = {
        "train_sft.py": (*data, "--tokenizer", run / "tokenizer", "--epochs", 0.5, *SMALL),
        "train_rm.py": (*data, *model, "--epochs", 0.5, *SMALL),
        "train_dpo.py": ("--data", run / "split" / "pairs.jsonl", *model, *SMALL),
        "train_ppo.py": ("--prompts", run / "split" / "prompts.jsonl", *models, *SIZES, "--iterations", 2),
    }
    warmup = ("--critic_warmup", 0) if script == "train_ppo.py" else ()
    run_script(*program, script, "--out", out, "--seed", 1, *flags[script], *warmup)
    manifest = read_json(out / "manifest.json")
    return manifest["outputs"] | {"patch": manifest["results"].get("patch", ""), "stage": manifest["stage"]}


@pytest.fixture(scope="module")
def unpatched(hh_run, tmp_path_factory):
    """What each stage's own script gives."""
    folder = tmp_path_factory.mktemp("unpatched")
    return {script: run_stage(hh_run, folder / Path(script).stem, script) for script in OF_STAGE}


def without_names(outputs: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in outputs.items() if name != "stage.json"}  # which names the folder


@pytest.mark.parametrize("script", OF_STAGE)
def test_without_a_patch_a_stage_is_exactly_its_script(hh_run, tmp_path, unpatched, script):
    foreign = next(name for name, patch in PATCHES.items() if patch.script != script)
    for i, name in enumerate(("none", foreign)):
        same = run_stage(hh_run, tmp_path / str(i), script, "experiments/patches.py", name)
        assert without_names(same) == without_names(unpatched[script]), name


@pytest.mark.parametrize("name", PATCHES)
def test_every_patch_changes_the_weights_and_leaves_its_mark(hh_run, tmp_path, unpatched, name):
    script = PATCHES[name].script
    changed = run_stage(hh_run, tmp_path / "out", script, "experiments/patches.py", name)
    assert changed["patch"] == name
    assert unpatched[script]["patch"] == ""
    assert changed["stage"] == Path(script).stem
    assert changed["model.safetensors"] != unpatched[script]["model.safetensors"]


def test_a_patch_whose_function_is_never_called_stops_the_stage(monkeypatch):
    finished = []
    monkeypatch.setattr(Stage, "finish", lambda self, **results: finished.append(results))
    patcher = Patcher(monkeypatch.setattr)
    patcher.function(rewards, "whiten", lambda old: lambda x, mask: x)
    patches.mark(patcher, "x")
    stage = object.__new__(Stage)
    with pytest.raises(RunError, match=r"patch x: never called: mpo.ppo.rewards.whiten"):
        stage.finish(steps=3)
    rewards.whiten(X, MASK)
    stage.finish(steps=3)
    assert finished == [{"steps": 3, "patch": "x"}]


def test_a_constant_that_has_the_patchs_value_already_is_refused(monkeypatch):
    with pytest.raises(RunError, match="ADAM_EPS is 1e-05 without the patch"):
        Patcher(monkeypatch.setattr).constant(learner, "ADAM_EPS", 1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no_eyes", "train_sft.py"], "no_eyes: expected none or one of no_eos"),
        ([], "no patch: expected none or one of"),
        (["none", "train.py"], "train.py: expected one of prepare_data.py"),
        (["none"], "no script: expected one of prepare_data.py"),
    ],
)
def test_a_wrong_name_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        patches.main(words)


# --- make and the grid --------------------------------------------------------------------------------


def test_make_starts_every_stage_with_a_model_by_the_program_that_an_experiment_names():
    program = "-m experiments.patches no_eos"
    shown = make("-nB", "RUN=runs/x", f"launch={program}", "runs/x/mpo/manifest.json", level=1).stdout
    for script in ("train_sft.py", "train_rm.py", "split_data.py", "train_dpo.py", "train_ppo.py"):
        assert f"{program} {script} --out" in shown, script
    assert "launch=" in make("policy-mpo", f"launch={program}").stderr  # not for users: refused


def test_a_cell_is_trained_with_its_patch_and_a_row_says_so(monkeypatch):
    called = []
    monkeypatch.setattr(grid, "_call", lambda command, log: called.append(command))
    cell = Cell("details", "hh", 21, "x", "mpo", "runs/x", "runs/base", {"PPO_FLAGS": "--lr 1e-4"}, 400, "no_whitening")
    grid.make(cell, "policy-mpo", Path("log"))
    assert "launch=-m experiments.patches no_whitening" in called[0]
    assert cell.settings == {"prompts": "400", "patch": "no_whitening", "PPO_FLAGS": "--lr 1e-4"}
    grid.make(replace(cell, patch=""), "policy-mpo", Path("log"))
    assert not any(word.startswith("launch") for word in called[1])
    assert "patch" not in replace(cell, patch="").settings


@pytest.mark.parametrize(
    ("asked", "marked", "good"), [("a", "a", True), ("", "", True), ("a", "", False), ("", "a", False)]
)
def test_a_row_needs_stages_that_were_made_with_its_patch(tmp_path, asked, marked, good):
    write_json(tmp_path / "dpo" / "manifest.json", {"results": {}})
    write_json(tmp_path / "mpo" / "manifest.json", {"results": {"patch": marked} if marked else {}})
    cell = Cell("details", "hh", 21, "x", "mpo", str(tmp_path), patch=asked)
    if good:
        grid.check_patch(cell)
    else:
        with pytest.raises(RunError, match=f"made with the patch {marked or 'none'}, not {asked or 'none'}"):
            grid.check_patch(cell)


def test_the_real_world_has_responses_that_cut_shortens(hh_run):
    tokenizer = load_tokenizer(hh_run / "tokenizer")
    pairs, _ = encode(read_rows(hh_run / "data" / "train.jsonl"), tokenizer, 384, 128)
    lengths = sorted(len(pair.chosen) for pair in pairs)
    assert lengths[len(lengths) // 4] > patches.CUT  # three in four
