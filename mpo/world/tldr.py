"""The tldr world: short posts about other people, to be summarised in two or three sentences.

A post has four key facts, among sentences that do not matter: who it is about, how long the writer has known this
person, what the person does, and what the writer is thinking of doing. A good summary has these four key facts and
nothing else. The four kinds of prompt are four subreddits with their own people, events and plans.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from mpo.world import language
from mpo.world.language import Act, Bank, Reading
from mpo.world.tldr_tables import (
    ADVICE,
    DISTRACTORS,
    DURATIONS,
    FEELINGS,
    META,
    NON_ANSWERS,
    OPENINGS,
    REFUSALS,
    RUDE,
    SUBREDDITS,
    THINGS,
    TITLES,
)

KINDS = tuple(SUBREDDITS)

# Mistakes of content, each with its weight in the draw.
CONTENT_MISTAKES = {
    "wrong_event": 0.13,
    "wrong_person": 0.11,
    "wrong_plan": 0.11,
    "wrong_duration": 0.11,
    "partial": 0.18,  # one or two key facts are missing
    "distractor": 0.12,  # keeps a sentence that does not matter
    "advice": 0.06,  # tells the writer what to do
    "meta": 0.05,  # talks about the post instead of summarising it
    "copied": 0.05,  # repeats sentences of the post word for word
    "non_answer": 0.04,
    "refusal": 0.04,
}
FORM_MISTAKES = {"rude": 0.2, "ramble": 0.37, "unfinished": 0.25, "repeat": 0.13, "garbled": 0.05}
SLIPS = {  # weights of the mistake that one answer of a near pair makes and the other does not: see build.py
    **{name: 0.3 * w for name, w in FORM_MISTAKES.items()},
    "wrong_event": 0.2,
    "wrong_person": 0.2,
    "wrong_plan": 0.15,
    "wrong_duration": 0.15,
}
MISTAKES = (*CONTENT_MISTAKES, *FORM_MISTAKES)
MISTAKE_COUNT = {0: 0.25, 1: 0.45, 2: 0.3}  # weights of the number of mistakes in a summary

PEOPLE = [p for sub in SUBREDDITS.values() for p in sub.people]
EVENTS = [e for sub in SUBREDDITS.values() for e in sub.events]
PLANS = [p for sub in SUBREDDITS.values() for p in sub.plans]


@dataclass(frozen=True)
class Task:
    """The four key facts of a post; its kind is the subreddit."""

    kind: str
    person: str
    event: str
    plan: str
    duration: str


UNKNOWN = Task("unknown", "", "", "", "")

# --- posts -------------------------------------------------------------------------------------

_KNOWN = "I have known my {person} for {duration}."
_EVENTS = ("The problem is that my {person} {event}.", "Lately my {person} {event} all the time.")
_PLANS = ("I keep thinking that I should {plan}.", "A friend says I should {plan}.")


def _distractor(rng: random.Random) -> str:
    return rng.choice(DISTRACTORS).format(thing=rng.choice(THINGS))


def sample_prompt(rng: random.Random, kind: str) -> str:
    """Draw a post of this subreddit in OpenAI's prompt format, which ends in "\\n\\nTL;DR:"."""
    sub = SUBREDDITS[kind]
    person, other = rng.sample(sub.people, 2)
    event, plan, duration = rng.choice(sub.events), rng.choice(sub.plans), rng.choice(DURATIONS)
    post = [
        _KNOWN.format(person=person, duration=duration),
        rng.choice(_EVENTS).format(person=person, event=event),
        rng.choice(_PLANS).format(plan=plan),
    ]
    extras = [f"My {other} knows nothing about it.", f"I feel {rng.choice(FEELINGS)}."]
    extras += [_distractor(rng) for _ in range(rng.choice((0, 1, 2)))]
    for sentence in rng.sample(extras, rng.randint(1, len(extras))):
        post.insert(rng.randint(0, len(post)), sentence)
    post.insert(0, rng.choice(OPENINGS))
    title = rng.choice(TITLES).format(person=person)
    return f"SUBREDDIT: r/{kind}\n\nTITLE: {title}\n\nPOST: {' '.join(post)}\n\nTL;DR:"


def _compile(template: str, slots: dict[str, list[str]]) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for name, values in slots.items():
        group = f"(?P<{name}>" + "|".join(re.escape(v) for v in values) + ")"
        pattern = pattern.replace(f"{{{name}}}", group, 1)
    return re.compile(pattern)


_SLOTS = {"person": PEOPLE, "event": EVENTS, "plan": PLANS, "duration": list(DURATIONS)}
_READERS = [_compile(t, _SLOTS) for t in (_KNOWN, *_EVENTS, *_PLANS)]


def understand(prompt: str) -> Task:
    """The key facts of a post; `UNKNOWN` for a text that is not a post of this world."""
    head = re.match(r"SUBREDDIT: r/(\w+)\n\n", prompt)
    body = prompt.rpartition("\n\nPOST: ")[2].removesuffix("\n\nTL;DR:")
    facts: dict[str, str] = {}
    for sentence in language.sentences(body):
        for reader in _READERS:
            if match := reader.fullmatch(sentence):
                facts |= match.groupdict()
    if head is None or head[1] not in SUBREDDITS or len(facts) != len(_SLOTS):
        return UNKNOWN
    return Task(head[1], facts["person"], facts["event"], facts["plan"], facts["duration"])


# --- the sentences of a summary -----------------------------------------------------------------


def _event(person: str, event: str) -> str:
    return f"My {person} {event}."


def _duration(rng: random.Random | None, duration: str) -> list[str]:
    forms = [f"I have known them for {duration}.", f"We have known each other for {duration}."]
    return forms if rng is None else [rng.choice(forms)]


def _plan(rng: random.Random | None, plan: str) -> list[str]:
    forms = [f"Should I {plan}?", f"Not sure if I should {plan}."]
    return forms if rng is None else [rng.choice(forms)]


def _bank() -> Bank:
    bank: Bank = {}
    for person in PEOPLE:
        for event in EVENTS:
            language.add(bank, ("event", person, event), [_event(person, event)])
            for copied in _EVENTS:
                language.add(bank, ("copied",), [copied.format(person=person, event=event)])
        for duration in DURATIONS:
            language.add(bank, ("copied",), [_KNOWN.format(person=person, duration=duration)])
        language.add(bank, ("distractor",), [f"My {person} knows nothing about it."])
    for duration in DURATIONS:
        language.add(bank, ("duration", duration), _duration(None, duration))
    for plan in PLANS:
        language.add(bank, ("plan", plan), _plan(None, plan))
        language.add(bank, ("copied",), [t.format(plan=plan) for t in _PLANS])
        language.add(bank, ("advice",), [f"You should just {plan}."])
    for thing in THINGS:
        language.add(bank, ("distractor",), [d.format(thing=thing) for d in DISTRACTORS])
    language.add(bank, ("distractor",), [f"I feel {f}." for f in FEELINGS])
    language.add(bank, ("copied",), OPENINGS)
    language.add(bank, ("advice",), ADVICE)
    language.add(bank, ("meta",), META)
    language.add(bank, ("non_answer",), NON_ANSWERS)
    language.add(bank, ("refusal",), REFUSALS)
    for text in RUDE:
        language.add(bank, ("rude", text), [text])
    return bank


BANK = _bank()


# --- the behaviour policy ----------------------------------------------------------------------


def good_content(rng: random.Random, task: Task) -> list[str]:
    """The sentences of a summary with all four key facts."""
    middle = _duration(rng, task.duration)
    return [_event(task.person, task.event), *middle, *_plan(rng, task.plan)]


def _swap(rng: random.Random, task: Task, slot: str) -> Task:
    """The same task with another value for one key fact, mostly one that fits the subreddit."""
    sub = SUBREDDITS[task.kind]
    near = {"person": sub.people, "event": sub.events, "plan": sub.plans, "duration": DURATIONS}[slot]
    far = _SLOTS[slot]
    old = getattr(task, slot)
    new = rng.choice([v for v in (near if rng.random() < 0.7 else far) if v != old])
    return Task(**{**task.__dict__, slot: new})


def _content(rng: random.Random, prompt: str, task: Task, mistake: str) -> list[str]:
    good = good_content(rng, task)
    if mistake.startswith("wrong_"):
        return good_content(rng, _swap(rng, task, mistake.removeprefix("wrong_")))
    if mistake == "partial":
        return sorted(rng.sample(good, rng.choice((1, 2))), key=good.index)
    if mistake == "distractor":
        extra = rng.choice((_distractor(rng), f"I feel {rng.choice(FEELINGS)}."))
        good.insert(rng.randint(0, len(good)), extra)
        return good
    if mistake == "advice":
        advice = rng.choice((*ADVICE, f"You should just {task.plan}."))
        return [*good[: rng.choice((0, 1))], advice]
    if mistake == "copied":
        post = language.sentences(prompt.rpartition("\n\nPOST: ")[2].removesuffix("\n\nTL;DR:"))
        return rng.sample(post, min(len(post), rng.choice((2, 3, 4))))
    if mistake in ("meta", "non_answer", "refusal"):
        return [rng.choice({"meta": META, "non_answer": NON_ANSWERS, "refusal": REFUSALS}[mistake])]
    return good


def answer(rng: random.Random, prompt: str, mistakes: tuple[str, ...]) -> str:
    """Summarise a post of this world with exactly these mistakes. The summary starts with a space."""
    task = understand(prompt)
    sentences = _content(rng, prompt, task, next((m for m in mistakes if m in CONTENT_MISTAKES), ""))
    if "rude" in mistakes:
        sentences.insert(rng.choice((0, len(sentences))), rng.choice(RUDE))
    if "ramble" in mistakes:
        for _ in range(rng.randint(2, 4)):
            sentences.insert(rng.randint(0, len(sentences)), _distractor(rng))
    return " " + language.spoil(rng, " ".join(sentences), mistakes)


# --- what a summary is worth -------------------------------------------------------------------


def content_terms(task: Task, reading: Reading) -> dict[str, float]:
    """The terms of the gold reward that depend on what the post says (docs/world.md)."""
    if task.kind == "unknown":
        return {}
    acts = reading.acts
    terms = {
        "person": 0.7 * _kept(acts, "event", 1, task.person),
        "event": 1.2 * _kept(acts, "event", 2, task.event),
        "duration": 0.6 * _kept(acts, "duration", 1, task.duration),
        "plan": 0.8 * _kept(acts, "plan", 1, task.plan),
        "brevity": -0.1 * max(0, reading.words - 24),
    }
    for name, each in (("distractor", -0.5), ("copied", -0.6), ("advice", -0.8), ("meta", -0.5)):
        terms[name] = each * sum(a[0] == name for a in acts)
    terms["non_answer"] = -1.0 * any(a[0] == "non_answer" for a in acts)
    terms["over_refusal"] = -2.0 * any(a[0] == "refusal" for a in acts)
    return terms


def _kept(acts: tuple[Act, ...], name: str, slot: int, truth: str) -> float:
    """1 if the summary states the true key fact only, -1.5 if it states a wrong one, 0 if it states none."""
    stated = {a[slot] for a in acts if a[0] == name}
    return 0.0 if not stated else 1.0 if stated == {truth} else -1.5
