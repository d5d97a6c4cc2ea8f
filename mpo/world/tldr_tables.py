"""The words of the tldr world: subreddits with their people, events and plans, and the phrases around them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Subreddit:
    """The words that fill the slots of a post."""

    people: tuple[str, ...]  # who a post can be about
    events: tuple[str, ...]  # what they do: "My {person} {event}."
    plans: tuple[str, ...]  # what the writer is thinking of doing: "Should I {plan}?"


SUBREDDITS = {
    "relationships": Subreddit(
        ("boyfriend", "girlfriend", "husband", "wife"),
        (
            "forgot my birthday",
            "reads my messages",
            "lies about money",
            "flirts with strangers",
            "hates my family",
        ),
        (
            "end it",
            "take a break",
            "write a letter",
            "forgive and forget",
        ),
    ),
    "work": Subreddit(
        ("boss", "coworker", "client", "intern"),
        (
            "shouts at me",
            "takes credit for my ideas",
            "gives me extra work",
            "asked me to lie",
            "steals office supplies",
        ),
        ("quit", "ask for a raise", "keep quiet", "change teams"),
    ),
    "home": Subreddit(
        ("roommate", "landlord", "neighbor", "cleaner"),
        (
            "eats my food",
            "plays loud music",
            "broke my window",
            "parks in my spot",
            "floods the kitchen",
        ),
        ("move out", "call the police", "buy a lock", "hold a meeting"),
    ),
    "family": Subreddit(
        ("mother", "father", "sister", "brother"),
        (
            "sold my old car",
            "wants to borrow money",
            "insults my cooking",
            "spoils my kids",
            "skipped my wedding",
        ),
        (
            "say no",
            "cut contact",
            "have a long talk",
            "spend a week apart",
            "laugh about it",
            "tell everyone",
        ),
    ),
}

DURATIONS = (
    "two weeks",
    "three months",
    "a year",
    "five years",
    "ten years",
    "my whole life",
)

OPENINGS = (
    "Hi all.",
    "This is a throwaway account.",
    "Long time reader, first time writer.",
    "I am on my phone, so sorry for mistakes.",
    "I need some help here.",
    "So here is my story.",
)
TITLES = (
    "Trouble with my {person}",
    "Need advice about my {person}",
    "My {person} and I",
    "What should I do?",
    "I can't take it any more",
)
DISTRACTORS = (
    "I had {thing} for lunch.",
    "Yesterday I bought {thing}.",
    "My doctor told me to try {thing}.",
    "There was a sale on {thing}.",
    "I am writing this next to {thing}.",
)
THINGS = "soup pasta bananas coffee rice socks candles pillows honey flowers mushrooms noodles".split()
FEELINGS = ("sad", "angry", "tired", "confused", "lonely", "nervous", "guilty")

ADVICE = ("You should talk to each other.", "Just be patient.", "I would not worry about it.")
META = (
    "This post is about a person.",
    "The writer has a problem.",
    "Somebody wrote a story here.",
    "It is a long post.",
)
NON_ANSWERS = ("Nothing much happened.", "I am not sure.", "It is complicated.")
REFUSALS = ("I am sorry, but I can't sum this up.", "Sorry, that is private.")
RUDE = ("What a stupid story.", "Nobody cares.", "Only a fool would write this.")
