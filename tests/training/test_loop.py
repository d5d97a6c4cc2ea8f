"""The training loop that SFT, the reward model and DPO share: microbatches, and batches of an epoch."""

from __future__ import annotations

import json

import pytest
import torch

from mpo.config import SFTConfig
from mpo.data.batches import encode, make_batch, training_batches
from mpo.model.logprobs import response_logprobs
from mpo.runtime.errors import InputError
from mpo.runtime.stage import Stage
from mpo.training.loop import train
from mpo.world.build import build
from tests.conftest import small_model


def train_sft(tokenizer, tmp_path, microbatch):
    """Train a small model for an epoch. Returns it, and its metrics of each step."""
    config = SFTConfig(out=str(tmp_path / str(microbatch)), data="", tokenizer="", batch=8, microbatch=microbatch)
    model = small_model(vocab_size=tokenizer.size)
    pairs, _ = encode(build("hh", 1, 40, 4)["train"], tokenizer, 300, 300)

    def losses_of(part):
        batch = make_batch([(p.prompt, p.chosen) for p in part])
        return -response_logprobs(model, batch).logp.sum(1), {}

    stage = Stage(config, {}, config.out, False)
    train(model, training_batches(pairs, 8, 1.0, 1), losses_of, lambda p: len(p.chosen), config, stage)
    return model, [json.loads(line) for line in (stage.out / "metrics.jsonl").open()]


def test_the_size_of_a_microbatch_changes_nothing_but_rounding(tokenizer, tmp_path):
    whole, steps = train_sft(tokenizer, tmp_path, 8)
    parts, steps_in_parts = train_sft(tokenizer, tmp_path, 1)
    for a, b in zip(steps, steps_in_parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def test_a_microbatch_that_does_not_divide_the_batch_is_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match="--batch 8 must be a multiple of --microbatch 3"):
        train_sft(tokenizer, tmp_path, 3)


def test_fewer_rows_than_a_batch_are_refused(tokenizer):
    pairs, _ = encode(build("hh", 1, 4, 4)["train"], tokenizer, 300, 300)
    with pytest.raises(InputError, match="do not fill one batch of 8"):
        training_batches(pairs, 8, 1.0, 1)


def test_half_an_epoch_has_half_the_batches_and_two_epochs_twice_as_many(tokenizer):
    pairs, _ = encode(build("hh", 1, 80, 4)["train"], tokenizer, 300, 300)
    assert len(training_batches(pairs, 8, 0.5, 1)) == round(0.5 * len(training_batches(pairs, 8, 1.0, 1)))
    assert len(training_batches(pairs, 8, 2.0, 1)) == 2 * len(training_batches(pairs, 8, 1.0, 1))
