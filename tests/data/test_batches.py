"""Fitting, packing and batching: masks from lengths, nothing cut silently."""

from __future__ import annotations

import pytest
import torch

from mpo.data.batches import (
    encode,
    encode_for_each,
    fit_prompt,
    make_batch,
    pair_batch,
    shuffled_batches,
    training_batches,
)
from mpo.data.rows import Row
from mpo.kernels.functions import Packing
from mpo.runtime.errors import InputError
from mpo.world.build import build


def test_masks_come_from_lengths():
    batch = make_batch([([1, 5], [3, 3, 2]), ([1, 5, 6, 7], [2])])
    assert batch.ids.tolist() == [1, 5, 3, 3, 2, 1, 5, 6, 7, 2]
    assert batch.packing.lengths.tolist() == [2, 3, 4, 1]
    assert batch.response_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.response_tokens.tolist() == [2, 3, 4, 9]
    assert batch.predictors.tolist() == [1, 2, 3, 8]
    assert batch.last.tolist() == [4, 9]
    assert batch.unpack(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [[1, 2, 3], [4, 0, 0]]


def test_equal_prompts_stand_there_once():
    sequences = [([1, 5], [3, 2]), ([1, 6], [2]), ([1, 5], [4, 4, 2])]
    batch, plain = make_batch(sequences), make_batch(sequences, share=False)
    assert batch.ids.tolist() == [1, 5, 3, 2, 4, 4, 2, 1, 6, 2]
    assert batch.packing.positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 1, 2]
    assert batch.response_tokens.tolist() == [2, 3, 9, 4, 5, 6]
    assert batch.predictors.tolist() == [1, 2, 8, 1, 4, 5]
    assert batch.last.tolist() == [3, 9, 6]
    assert len(plain.ids) == 12
    assert torch.equal(plain.ids[plain.response_tokens], batch.ids[batch.response_tokens])
    assert torch.equal(plain.ids[plain.predictors], batch.ids[batch.predictors])


def test_rows_of_a_batch():
    batch = make_batch([([1], [4, 2]), ([1, 5, 6, 7], [8, 9, 2])])
    assert batch.rows([1]).ids.tolist() == [1, 5, 6, 7, 8, 9, 2]


def test_segments_follow_their_root():
    with pytest.raises(ValueError, match="segment 2: length 1, parent 0"):
        Packing([1, 1, 1], [-1, -1, 0])
    with pytest.raises(ValueError, match="segment 0: length 0"):
        Packing([0])


def test_a_long_dialogue_loses_its_oldest_turns(tokenizer):
    prompt = "\n\nHuman: Hi there.\n\nAssistant: It is Paris.\n\nHuman: And what about Peru?\n\nAssistant:"
    whole, cut = fit_prompt(prompt, tokenizer, 100)
    assert cut == 0
    ids, cut = fit_prompt(prompt, tokenizer, len(whole) - 1)
    assert cut == 1
    assert ids == tokenizer.prompt_ids("\n\nHuman: And what about Peru?\n\nAssistant:")
    assert fit_prompt(prompt, tokenizer, 3) == ([], 0)


def test_a_long_dialogue_keeps_the_system_message_in_front(tokenizer):
    system = "You are kind."
    prompt = f"{system}\n\nHuman: Hi there.\n\nAssistant: It is Paris.\n\nHuman: And Peru?\n\nAssistant:"
    shorter = f"{system}\n\nHuman: And Peru?\n\nAssistant:"
    room = len(tokenizer.prompt_ids(shorter))
    assert fit_prompt(prompt, tokenizer, room) == (tokenizer.prompt_ids(shorter), 1)
    assert fit_prompt(prompt, tokenizer, room - 1) == ([], 0)
    greeting = "\n\nAssistant: Welcome.\n\nHuman: Hi there.\n\nAssistant:"
    assert fit_prompt(greeting, tokenizer, len(tokenizer.prompt_ids(greeting)) - 1) == (
        tokenizer.prompt_ids("\n\nHuman: Hi there.\n\nAssistant:"),
        1,
    )


def test_a_long_text_that_is_no_dialogue_is_not_cut(tokenizer):
    text = "A post.\n\nHuman: one\n\nHuman: two\n\nTL;DR:"
    assert fit_prompt(text, tokenizer, len(tokenizer.prompt_ids(text)) - 1) == ([], 0)


def test_too_few_rows_name_what_was_dropped(tokenizer):
    good = Row("", "\n\nHuman: Hi\n\nAssistant:", " Yes.", " No.")
    long = Row("", good.prompt, " Yes." * 50, " No.")
    pairs, counts = encode([good] * 3 + [long] * 6 + [Row("", good.prompt, "", " No.")], tokenizer, 40, 20)
    with pytest.raises(InputError) as refused:
        training_batches(pairs, 8, 1.0, 1, counts=counts)
    assert str(refused.value) == (
        "3 rows do not fill one batch of 8: 7 of 10 rows were dropped (a response longer than 20 tokens: 6, "
        "empty response: 1); raise --max_response, lower --batch or add rows"
    )
    pairs, counts = encode([good] * 3 + [Row("", "\n\nHuman: " + "Hi " * 99, " a", " b")] * 9, tokenizer, 40, 20)
    with pytest.raises(InputError, match=r"9 of 12 .*prompt longer than 40 tokens: 9\); raise --max_prompt, lower"):
        training_batches(pairs, 8, 1.0, 1, counts=counts)


def test_too_few_rows_from_the_start_do_not_blame_what_was_dropped(tokenizer):
    good = Row("", "\n\nHuman: Hi\n\nAssistant:", " Yes.", " No.")
    pairs, counts = encode([good] * 3 + [Row("", good.prompt, "", " No.")], tokenizer, 40, 20)
    with pytest.raises(InputError, match=r"^3 rows do not fill one batch of 8; lower --batch or add rows$"):
        training_batches(pairs, 8, 1.0, 1, counts=counts)


def test_what_does_not_fit_is_dropped_and_counted(tokenizer):
    rows = [
        Row("ok", "\n\nHuman: Hi\n\nAssistant:", " Yes.", " No."),
        Row("long answer", "\n\nHuman: Hi\n\nAssistant:", " Yes." * 50, " No."),
        Row("long prompt", "\n\nHuman: " + "Hi " * 100 + "\n\nAssistant:", " Yes.", " No."),
        Row("empty", "\n\nHuman: Hi\n\nAssistant:", "", " No."),
    ]
    pairs, counts = encode(rows, tokenizer, 40, 20)
    assert [p.row.id for p in pairs] == ["ok"]
    assert counts == {
        "dropped: a response longer than 20 tokens": 1,
        "dropped: prompt longer than 40 tokens": 1,
        "dropped: empty response": 1,
        "kept": 1,
    }
    assert all(p.chosen[-1] == p.rejected[-1] == tokenizer.eos for p in pairs)
    with pytest.raises(InputError, match="none of 1 rows fits"):
        encode(rows[1:2], tokenizer, 40, 20)


def test_an_epoch_holds_every_row_once_and_depends_on_seed_and_epoch(tokenizer):
    pairs, _ = encode(build("hh", 1, 200, 4)["train"], tokenizer, 300, 300)
    pairs = pairs[:192]

    def ids(seed, epoch):
        return [[p.row.id for p in batch] for batch in shuffled_batches(pairs, 16, seed, epoch)]

    assert sorted(i for b in ids(1, 0) for i in b) == sorted(p.row.id for p in pairs)
    assert ids(1, 0) == ids(1, 0)
    assert ids(1, 0) != ids(2, 0) != ids(1, 1) != ids(1, 0)


def test_pair_batch_puts_chosen_before_rejected(tokenizer):
    pairs, _ = encode([Row("a", "\n\nHuman: Hi\n\nAssistant:", " Yes.", " No thanks.")], tokenizer, 40, 40)
    batch = pair_batch(pairs)
    assert batch.packing.lengths.tolist() == [len(pairs[0].prompt), len(pairs[0].chosen), len(pairs[0].rejected)]
    assert batch.ids[batch.response_tokens].tolist() == pairs[0].chosen + pairs[0].rejected


def test_a_prompt_alone_is_kept_only_where_that_is_asked_for(tokenizer):
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    rows = [Row("alone", prompt, "", ""), Row("half", prompt, " Yes", ""), Row("whole", prompt, " Yes", " No")]
    pairs, counts = encode(rows, tokenizer, 100, 100)
    assert ([p.row.id for p in pairs], counts) == (["whole"], {"kept": 1, "dropped: empty response": 2})
    pairs, counts = encode(rows, tokenizer, 100, 100, prompts_alone=True)
    assert ([p.row.id for p in pairs], counts) == (["alone", "whole"], {"kept": 2, "dropped: empty response": 1})
    assert pairs[0].prompt == pairs[1].prompt
    both, counts = encode_for_each(rows, [tokenizer, tokenizer], 100, 100, prompts_alone=True)
    assert [[p.row.id for p in pairs] for pairs in both] == [["alone", "whole"]] * 2
