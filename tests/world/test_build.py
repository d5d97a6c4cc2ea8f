"""The built-in worlds: readable both ways, without overlap, with every mistake everywhere."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict

import pytest

from mpo.world import language
from mpo.world.build import ANNOTATORS, WORLDS, Annotator, build, flip_labels, probe_sheet
from mpo.world.gold import BEST, gold_reward, prompt_kind
from tests.support.scripts import ROOT

NAMES = pytest.mark.parametrize("name", sorted(WORLDS))


@NAMES
def test_every_prompt_is_understood(name):
    world, rng = WORLDS[name], random.Random(0)
    for i in range(2000):
        kind = world.KINDS[i % len(world.KINDS)]
        assert prompt_kind(world.sample_prompt(rng, kind)) == kind


@NAMES
def test_there_are_tens_of_thousands_of_prompts(name):
    world, rng = WORLDS[name], random.Random(0)
    for kind in world.KINDS:
        assert len({world.sample_prompt(rng, kind) for _ in range(10_000)}) > 6_000


@NAMES
def test_train_and_test_never_overlap_and_the_test_set_is_stratified(name):
    splits = build(name, seed=5, train=1500, test=200)
    prompts = [r.prompt for rows in splits.values() for r in rows]
    assert len(set(prompts)) == len(prompts) == 1700
    assert set(Counter(r.domain for r in splits["test"]).values()) == {50}


@NAMES
def test_a_seed_is_a_world_of_its_own(name):
    assert build(name, 1, 20, 4) == build(name, 1, 20, 4)
    assert build(name, 1, 20, 4) != build(name, 2, 20, 4)


@NAMES
def test_an_answer_without_mistakes_is_nearly_the_best_and_each_mistake_costs(name):
    world, rng = WORLDS[name], random.Random(1)
    for kind in world.KINDS:
        for mistake in world.MISTAKES:
            good, bad = [], []
            for _ in range(60):
                prompt = world.sample_prompt(rng, kind)
                good.append(gold_reward(prompt, world.answer(rng, prompt, ())))
                bad.append(gold_reward(prompt, world.answer(rng, prompt, (mistake,))))
            assert min(good) >= BEST - 0.31, (kind, mistake)
            assert sum(bad) / len(bad) < sum(good) / len(good) - 0.4, (kind, mistake)


@NAMES
def test_rows_hold_no_gold_and_every_answer_is_of_the_world(name):
    for row in build(name, 1, 200, 4)["train"]:
        assert set(asdict(row)) - {"where"} == {"id", "prompt", "chosen", "rejected", "domain", "margin", "noise"}
        assert row.margin is None
        assert row.noise is None
        assert row.chosen.startswith(" ")
        assert row.chosen != row.rejected


@NAMES
def test_labels_are_noisy_but_informative(name):
    rows = build(name, 1, 3000, 4)["train"]
    right = [gold_reward(r.prompt, r.chosen) > gold_reward(r.prompt, r.rejected) for r in rows]
    assert 0.7 < sum(right) / len(right) < 0.9


def test_the_annotator_follows_its_formula():
    annotator, rng = Annotator(slope=1.0, glaring=5.0, careless=0.4, attentive=0.0), random.Random(0)
    n = 20_000
    share = sum(annotator.prefers_first(rng, 1.0, 0.0) for _ in range(n)) / n
    assert share == pytest.approx(0.6 * 0.7310586 + 0.2, abs=0.01)
    assert sum(annotator.prefers_first(rng, 3.0, -3.0) for _ in range(n)) / n == pytest.approx(0.9975, abs=0.003)
    assert set(ANNOTATORS) == set(WORLDS)


@NAMES
def test_the_probe_sheet_holds_every_mistake_for_every_kind(name):
    world, sheet = WORLDS[name], probe_sheet(name, 1, each=3)
    assert Counter((p["kind"], p["mistake"]) for p in sheet) == Counter(
        {(k, m): 3 for k in world.KINDS for m in world.MISTAKES}
    )
    assert not any("gold" in key for item in sheet for key in item)


def test_reading_is_exact_and_total():
    bank = {"It is Rome.": ("value", "Rome"), "Fine.": ("ok",)}
    text = "It is Rome. It is Rome. It is Oslo. Fine. And th"
    assert language.read(text, bank) == language.Reading((("value", "Rome"), ("ok",)), 1, 1, True, 12)
    assert language.read("", bank) == language.Reading((), 0, 0, False, 0)


def test_one_sentence_cannot_mean_two_things():
    with pytest.raises(ValueError, match="two meanings"):
        language.add({"Fine.": ("a",)}, ("b",), ["Fine."])


def test_no_training_stage_can_see_gold():
    """Importing every training stage brings in neither the gold reward nor the world."""
    code = (
        "import sys, train_tokenizer, train_sft, train_rm, split_data, train_dpo, train_ppo\n"
        "print([m for m in sys.modules if m.startswith('mpo.world')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_flipped_labels_turn_that_share_of_pairs_round_and_nothing_else():
    rows = build("hh", seed=1, train=400, test=8)["train"]
    flipped = flip_labels("hh", 1, rows, 0.3)
    turned = [a.chosen == b.rejected and a.rejected == b.chosen for a, b in zip(rows, flipped, strict=True)]
    same = [a == b for a, b in zip(rows, flipped, strict=True)]
    assert all(t != s for t, s in zip(turned, same, strict=True))
    assert 90 <= sum(turned) <= 150  # 120 +- 3.3 standard deviations
    assert flip_labels("hh", 1, rows, 0.0) == rows
    assert flip_labels("hh", 1, rows, 0.3) == flipped
    assert flip_labels("hh", 2, rows, 0.3) != flipped
