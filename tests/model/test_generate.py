"""Sampling and scoring agree on log-probs, and neither depends on the other texts in a batch."""

from __future__ import annotations

import json

import pytest
import torch

from mpo.data.batches import make_batch
from mpo.kernels.functions import Packing
from mpo.model import generate as generation
from mpo.model.checkpoint import load_model
from mpo.model.generate import Sampling, generate
from mpo.model.llama import scalar_from
from mpo.model.logprobs import compare, response_logprobs
from mpo.ppo.rollout import check_agreement, roll_out
from mpo.runtime.errors import InputError
from mpo.runtime.seeding import generator
from tests.conftest import STORIES, needs_stories, small_model

PROMPTS = [[1, 5, 9, 30], [1, 7], [1, 40, 41, 42, 43, 44, 45], [1, 8, 8], [1, 20]]
EOS = 2


def draw(model, prompts=PROMPTS, temperature=1.0, seed=0, max_new=12):
    return generate(model, prompts, Sampling(max_new, temperature, EOS), generator(seed, "test"))


def model_that_often_stops():
    """A model that often samples EOS, so that the responses of a batch end at different steps."""
    model = small_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[EOS] = model.lm_head.weight.mean(0) + 0.5 * model.lm_head.weight.std(0)
    return model


@needs_stories
def test_greedy_sampling_matches_an_independent_implementation():
    expected = json.loads((STORIES / "expected.json").read_text())["greedy_ids"]
    samples = draw(load_model(STORIES), [[1]], temperature=0.0, max_new=len(expected) - 1)
    assert samples.responses[0] == expected[1:]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampling_and_scoring_give_the_same_log_probs(temperature):
    model = model_that_often_stops()
    samples = draw(model, temperature=temperature, max_new=30)
    assert len({len(r) for r in samples.responses}) > 1  # with equal lengths this test would show little
    batch = make_batch(list(zip(PROMPTS, samples.responses, strict=True)))
    scored = response_logprobs(model, batch, temperature)
    sampled = torch.cat([torch.tensor(x) for x in samples.logps])
    torch.testing.assert_close(scored.logp[scored.mask].detach(), sampled, rtol=0, atol=1e-4)


def test_a_response_does_not_depend_on_the_other_prompts():
    model = model_that_often_stops()
    together = draw(model, max_new=30)
    alone = draw(model, PROMPTS[:1], max_new=30)
    assert alone.responses[0] == together.responses[0]  # row 0 gets the same random numbers in both
    # The other prompts now have other lengths, and their responses end at other steps.
    others = draw(model, [PROMPTS[0], [1] * 20, [1, 2, 3], [1, 9], [1, 4]], max_new=30)
    assert others.responses[0] == together.responses[0]


def test_a_finished_response_ends_in_eos_and_any_other_has_the_full_length():
    samples = draw(model_that_often_stops(), max_new=8)
    assert any(samples.finished)
    assert not all(samples.finished)
    for response, logps, finished in zip(samples.responses, samples.logps, samples.finished, strict=True):
        assert finished == (response[-1] == EOS)
        assert EOS not in response[:-1]
        assert len(response) == len(logps)
        assert finished or len(response) == 8


def test_equal_seeds_give_equal_responses_and_other_seeds_other_ones():
    model = small_model()
    assert draw(model, seed=1).responses == draw(model, seed=1).responses
    assert draw(model, seed=1).responses != draw(model, seed=2).responses


def test_sampled_frequencies_follow_the_distribution():
    model = small_model()
    n = 4000
    samples = draw(model, [[1, 5]] * n, max_new=1)
    probabilities = model.logits(torch.tensor([[1, 5]]))[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([r[0] for r in samples.responses]), minlength=61)
    spread = (n * probabilities * (1 - probabilities)).sqrt() + 1
    assert ((counts - n * probabilities) / spread).abs().max() < 5


def test_log_probs_do_not_depend_on_the_other_texts_of_a_batch():
    model = small_model()
    short, long = ([1, 5], [6, 7, 2]), ([1] * 9, [8] * 11)
    alone = response_logprobs(model, make_batch([short])).logp[0]
    together = response_logprobs(model, make_batch([short, long])).logp[0]
    torch.testing.assert_close(together[:3], alone, rtol=0, atol=1e-5)
    assert together[3:].abs().sum() == 0


def test_equal_prompts_get_independent_responses():
    model = model_that_often_stops()
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    together = draw(model, prompts, max_new=30)
    assert together.responses[0] == draw(model, PROMPTS[:1], max_new=30).responses[0]
    assert len({tuple(together.responses[i]) for i in (0, 2, 3)}) == 3
    scored = response_logprobs(model, make_batch(list(zip(prompts, together.responses, strict=True)), share=False))
    sampled = torch.cat([torch.tensor(x) for x in together.logps])
    torch.testing.assert_close(scored.logp[scored.mask].detach(), sampled, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5, 9])
def test_computing_only_a_few_prompts_at_a_time_changes_no_response(monkeypatch, tokens):
    model = model_that_often_stops()
    whole = draw(model, [*PROMPTS, PROMPTS[0]], max_new=9)
    monkeypatch.setattr(generation, "PREFILL", tokens)
    parts = draw(model, [*PROMPTS, PROMPTS[0]], max_new=9)
    assert parts.responses == whole.responses
    for a, b in zip(parts.logps, whole.logps, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_the_kl_of_a_model_to_itself_is_0_and_to_another_model_positive():
    batch = make_batch([([1, 5], [6, 7, 2]), ([1, 9, 9], [4, 2])])
    same = compare(small_model(), small_model(), batch)
    assert same.kl.abs().max() < 1e-6
    other = compare(small_model(), small_model(seed=1), batch)
    assert (other.kl[other.mask] > 0).all()


def test_a_rollout_checks_that_sampling_and_scoring_agree():
    model, rm = small_model(), scalar_from(small_model(seed=2), generator(0, "head"))
    rollout = roll_out(model, model, rm, rm, PROMPTS, Sampling(6, 0.8, EOS), generator(0, "r"), 2)
    assert rollout.kl_exact.abs().max() < 1e-6
    assert rollout.values.shape == rollout.logp.shape
    with pytest.raises(InputError, match="sampling and scoring differ by"):
        check_agreement(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.1]), "sampling and scoring")
    with pytest.raises(InputError, match="differ by nan"):
        check_agreement(torch.tensor([-1.0]), torch.tensor([float("nan")]), "x")


def test_values_belong_to_the_state_before_each_token_and_scores_to_the_last_state():
    rm = scalar_from(small_model(), generator(0, "head"))
    rollout = roll_out(small_model(), small_model(), rm, rm, PROMPTS[:2], Sampling(5, 1.0, EOS), generator(0, "r"), 2)

    def last_value(ids):
        return rm(torch.tensor(ids), Packing([len(ids)]))[-1].item()

    assert rollout.values[1, 0].item() == pytest.approx(last_value(PROMPTS[1]), abs=1e-5)
    whole = PROMPTS[1] + rollout.batch.sequences[1][1]
    assert rollout.scores[1].item() == pytest.approx(last_value(whole), abs=1e-5)
