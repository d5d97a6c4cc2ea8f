"""The text of a prompt. This is the one place where messages become text, and where the form of a text is recognised.

A prompt has one of three forms:
- dialogue: turns as in HH-RLHF, "\\n\\nHuman: ...\\n\\nAssistant: ...", that end in "\\n\\nAssistant:"; text before the
  first turn is a system message;
- post: a Reddit post as in TL;DR, from "SUBREDDIT:" to "TL;DR:";
- text: anything else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile

from mpo.data.rows import Unusable

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
MARKS = {"user": HUMAN, "assistant": ASSISTANT}
SUMMARISE = "TL;DR:"

Message = tuple[str, str]
"""(role, text). The role is system, user or assistant."""


def dialogue_text(messages: Sequence[Message]) -> str:
    """Messages up to the user's last one, as the text of a dialogue. System messages come first, without a mark.

    Raises Unusable if it is not the assistant's turn, or if the text of a message would read as several turns.
    """
    system = [text.strip() for _, text in takewhile(lambda message: message[0] == "system", messages)]
    turns = messages[len(system) :]
    if any(role == "system" for role, _ in turns):
        raise Unusable("a system message after the first turn")
    if not turns or turns[-1][0] != "user":
        raise Unusable("the prompt does not end with the user's turn")
    prompt = "\n\n".join(filter(None, system))
    prompt += "".join(f"{MARKS[role]} {text.strip()}" for role, text in turns) + ASSISTANT
    if prompt.count(HUMAN) + prompt.count(ASSISTANT) != len(turns) + 1:
        raise Unusable("a turn within the text of a turn")
    return prompt


def messages_in(prompt: str) -> list[Message]:
    """The messages of a dialogue, as `dialogue_text` has written them; a prompt of another form is the user's message.

    Text before the first turn is a system message. Space around a message is removed.
    """
    if form_of(prompt) != "dialogue":
        return [("user", prompt.strip())]
    roles = {mark: role for role, mark in MARKS.items()}
    system, *turns = re.split(f"({HUMAN}|{ASSISTANT})", prompt)
    messages = [(roles[mark], text.strip()) for mark, text in zip(turns[::2], turns[1::2], strict=True)]
    return ([("system", system.strip())] if system.strip() else []) + messages[:-1]


def prompt_of(text: str) -> str:
    """The prompt made from a string of another format. A dialogue, or a text that ends in "TL;DR:", is kept as it is.

    Anything else becomes the user's turn of a dialogue. Raises Unusable as `dialogue_text` does.
    """
    if text.rstrip().endswith(SUMMARISE):
        return text.rstrip()
    dialogue = "\n\n" + text.strip()
    if dialogue.startswith(HUMAN) and dialogue.rfind(HUMAN) > dialogue.rfind(ASSISTANT):
        dialogue += ASSISTANT
    if dialogue.endswith(ASSISTANT) and HUMAN in dialogue:
        return dialogue if dialogue.startswith(HUMAN) else text.strip()
    if dialogue.startswith(HUMAN):
        raise Unusable("the prompt does not end with the user's turn")
    return dialogue_text([("user", text)])


def is_blank(prompt: str) -> bool:
    """True for a prompt without a word in it."""
    return not prompt.replace(HUMAN, "").replace(ASSISTANT, "").strip()


def form_of(prompt: str) -> str:
    """The form of a prompt: dialogue, post or text."""
    if prompt.endswith(ASSISTANT) and HUMAN in prompt:
        return "dialogue"
    return "post" if prompt.startswith("SUBREDDIT:") and prompt.endswith(SUMMARISE) else "text"


def usual_form(prompts: Iterable[str]) -> str:
    """The form that most of the prompts have."""
    return Counter(form_of(prompt) for prompt in prompts).most_common(1)[0][0]
