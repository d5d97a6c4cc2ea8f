"""From a world and a seed to rows: prompts, pairs of answers, noisy labels, the probe sheet."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

from mpo.data.rows import Row
from mpo.world import hh, language, tldr
from mpo.world.gold import gold_reward

WORLDS: dict[str, ModuleType] = {"hh": hh, "tldr": tldr}


@dataclass(frozen=True)
class Annotator:
    """Labels by Bradley-Terry on the gold difference, careless unless the difference is glaring.

    With d = gold_a - gold_b and c = `careless` where |d| < `glaring`, `attentive` elsewhere:
    P(a preferred to b) = (1 - c) * sigmoid(slope * d) + c / 2
    """

    slope: float
    glaring: float
    careless: float
    attentive: float = 0.02

    def prefers_first(self, rng: random.Random, gold_a: float, gold_b: float) -> bool:
        """Draw one label."""
        difference = gold_a - gold_b
        c = self.careless if abs(difference) < self.glaring else self.attentive
        return rng.random() < (1 - c) / (1 + math.exp(-self.slope * difference)) + c / 2


# Calibrated so that a well-trained reward model meets the paper's conditions (docs/world.md).
ANNOTATORS = {
    "hh": Annotator(slope=4.0, glaring=4.5, careless=0.69),
    "tldr": Annotator(slope=2.0, glaring=3.5, careless=0.25),
}
NOTICEABLE = 0.5  # annotators pass over pairs whose answers are worth the same to them
NEAR = {"hh": 0.85, "tldr": 0.7}  # share of pairs whose answers differ in one slip


def draw_mistakes(world: ModuleType, rng: random.Random) -> tuple[str, ...]:
    """Which mistakes the world's behaviour policy makes this time."""
    return language.draw_mistakes(rng, world.MISTAKE_COUNT, world.CONTENT_MISTAKES, world.FORM_MISTAKES)


def _prompts(world: ModuleType, rng: random.Random, count: int, taken: set[str]) -> Iterator[str]:
    """`count` prompts that are not in `taken`, the kinds in turn; adds them to `taken`."""
    for i in range(count):
        for _ in range(1000):
            prompt = world.sample_prompt(rng, world.KINDS[i % len(world.KINDS)])
            if prompt not in taken:
                break
        else:
            raise RuntimeError(f"the world has no {world.KINDS[i % len(world.KINDS)]} prompts left")
        taken.add(prompt)
        yield prompt


def _answers(name: str, rng: random.Random, prompt: str) -> tuple[str, str]:
    """The behaviour policy answers twice: alike but for one slip, or independently."""
    world = WORLDS[name]
    mistakes = draw_mistakes(world, rng)
    if rng.random() < NEAR[name]:
        slip = rng.choices(list(world.SLIPS), list(world.SLIPS.values()))[0]
        if slip in world.CONTENT_MISTAKES:  # an answer has room for one mistake of content
            mistakes = tuple(m for m in mistakes if m not in world.CONTENT_MISTAKES)
        other = (*mistakes, slip)
    else:
        other = draw_mistakes(world, rng)
    return world.answer(rng, prompt, mistakes), world.answer(rng, prompt, other)


def _pair(name: str, rng: random.Random, row_id: str, prompt: str) -> Row:
    while True:
        first, second = _answers(name, rng, prompt)
        gold = gold_reward(prompt, first), gold_reward(prompt, second)
        if abs(gold[0] - gold[1]) >= NOTICEABLE:
            break
    if not ANNOTATORS[name].prefers_first(rng, *gold):
        first, second = second, first
    return Row(row_id, prompt, chosen=first, rejected=second, domain=WORLDS[name].understand(prompt).kind)


def build(name: str, seed: int, train: int, test: int) -> dict[str, list[Row]]:
    """Train and test rows of a world: no prompt twice, kinds in equal shares, no gold in the rows."""
    taken: set[str] = set()
    splits = {}
    for split, count in (("test", test), ("train", train)):
        rng = random.Random(f"{seed}/{name}/{split}")
        rows = enumerate(_prompts(WORLDS[name], rng, count, taken))
        splits[split] = [_pair(name, rng, f"{name}-{split}-{i}", prompt) for i, prompt in rows]
        rng.shuffle(splits[split])
    return splits


def flip_labels(name: str, seed: int, rows: list[Row], share: float) -> list[Row]:
    """The same rows with each label turned round with probability `share`."""
    rng = random.Random(f"{seed}/{name}/noise")
    return [replace(r, chosen=r.rejected, rejected=r.chosen) if rng.random() < share else r for r in rows]


def probe_sheet(name: str, seed: int, each: int = 24) -> list[dict[str, str]]:
    """For each kind of prompt and each mistake: `each` prompts with a right answer and a spoilt one.

    The reward model should prefer every right one; where it does not, PPO will find the hole.
    """
    world = WORLDS[name]
    rng = random.Random(f"{seed}/{name}/probe")
    sheet = []
    for kind in world.KINDS:
        for mistake in world.MISTAKES:
            for _ in range(each):
                prompt = world.sample_prompt(rng, kind)
                right, wrong = world.answer(rng, prompt, ()), world.answer(rng, prompt, (mistake,))
                sheet.append({"kind": kind, "mistake": mistake, "prompt": prompt, "right": right, "wrong": wrong})
    return sheet
