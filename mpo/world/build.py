"""Make a data set from a world and a seed: prompts, pairs of answers, noisy labels, and the probe sheet."""

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
    """A simulated annotator. It labels by Bradley-Terry on the gold rewards, and sometimes without looking.

    With d = gold_a - gold_b, and c = `careless` if |d| < `glaring`, else `attentive`:
    P(a is preferred to b) = (1 - c) * sigmoid(slope * d) + c / 2
    """

    slope: float  # how reliably a better answer is recognised
    glaring: float  # gold difference that even a careless annotator notices
    careless: float  # share of labels that are a coin toss, below that difference
    attentive: float = 0.02  # the same, from that difference on

    def prefers_first(self, rng: random.Random, gold_a: float, gold_b: float) -> bool:
        """Draw one label: True if the first answer is preferred."""
        difference = gold_a - gold_b
        c = self.careless if abs(difference) < self.glaring else self.attentive
        return rng.random() < (1 - c) / (1 + math.exp(-self.slope * difference)) + c / 2


# Calibrated so that the held-out accuracy of a reward model comes close to the paper's (docs/world.md).
ANNOTATORS = {
    "hh": Annotator(slope=4.0, glaring=4.5, careless=0.69),
    "tldr": Annotator(slope=2.0, glaring=3.5, careless=0.25),
}
NOTICEABLE = 0.5  # smallest difference in gold reward between the answers of a pair
NEAR = {"hh": 0.85, "tldr": 0.7}  # share of near pairs, whose answers differ by one mistake, the slip


def draw_mistakes(world: ModuleType, rng: random.Random) -> tuple[str, ...]:
    """Draw the mistakes that the world's behaviour policy makes in one answer."""
    return language.draw_mistakes(rng, world.MISTAKE_COUNT, world.CONTENT_MISTAKES, world.FORM_MISTAKES)


def _prompts(world: ModuleType, rng: random.Random, count: int, taken: set[str]) -> Iterator[str]:
    """Yield `count` prompts that are not in `taken`, of each kind in turn, and add them to `taken`."""
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
    """Two answers of the behaviour policy: the second adds a slip to the mistakes of the first, or is independent."""
    world = WORLDS[name]
    mistakes = draw_mistakes(world, rng)
    if rng.random() < NEAR[name]:
        slip = rng.choices(list(world.SLIPS), list(world.SLIPS.values()))[0]
        if slip in world.CONTENT_MISTAKES:  # an answer makes at most one mistake of content
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
    """Make the rows of a world: {"test": [...], "train": [...]}.

    No prompt occurs twice, and all kinds of prompt have equal shares. The rows do not contain gold rewards.

    Raises RuntimeError where the world does not have so many different prompts.
    """
    taken: set[str] = set()
    splits = {}
    for split, count in (("test", test), ("train", train)):
        rng = random.Random(f"{seed}/{name}/{split}")
        rows = enumerate(_prompts(WORLDS[name], rng, count, taken))
        splits[split] = [_pair(name, rng, f"{name}-{split}-{i}", prompt) for i, prompt in rows]
        rng.shuffle(splits[split])
    return splits


def flip_labels(name: str, seed: int, rows: list[Row], share: float) -> list[Row]:
    """The same rows, with chosen and rejected swapped in each of them with probability `share`."""
    rng = random.Random(f"{seed}/{name}/noise")
    return [replace(r, chosen=r.rejected, rejected=r.chosen) if rng.random() < share else r for r in rows]


def probe_sheet(name: str, seed: int, each: int) -> list[dict[str, str]]:
    """For each kind of prompt and each mistake: `each` prompts, with a right answer and one that makes this mistake.

    A reward model should score every right answer above the wrong one. Where it does not, PPO will exploit it.
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
