"""The text of prompts: what messages and strings become, and which form a text has."""

from __future__ import annotations

import pytest

from mpo.data.dialogue import dialogue_text, form_of, is_blank, prompt_of, usual_form
from mpo.data.rows import Unusable

POST = "SUBREDDIT: r/advice\n\nTITLE: Help\n\nPOST: I fell.\n\nTL;DR:"


def test_messages_become_a_dialogue_of_hh():
    messages = [("user", "Hi "), ("assistant", "Hello."), ("user", "\nBye")]
    assert dialogue_text(messages) == "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"
    greeting = [("assistant", "Welcome."), ("user", "Hi")]
    assert dialogue_text(greeting) == "\n\nAssistant: Welcome.\n\nHuman: Hi\n\nAssistant:"


def test_system_messages_stand_in_front_without_a_mark():
    messages = [("system", " Be kind. "), ("system", ""), ("system", "Be brief."), ("user", "Hi")]
    assert dialogue_text(messages) == "Be kind.\n\nBe brief.\n\nHuman: Hi\n\nAssistant:"
    assert form_of(dialogue_text(messages)) == "dialogue"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([("user", "Hi\n\nHuman: Bye")], "a turn within the text of a turn"),
        ([("user", "Hi\n\nAssistant: Hello.\n\nHuman: Bye")], "a turn within the text of a turn"),
        ([("system", "Be kind.\n\nHuman: x"), ("user", "Hi")], "a turn within the text of a turn"),
        ([("user", "Hi"), ("assistant", "Yes.\n\nHuman: Bye"), ("user", "Ho")], "a turn within the text of a turn"),
        ([("user", "Hi"), ("assistant", "Hello.")], "the prompt does not end with the user's turn"),
        ([("system", "Be kind.")], "the prompt does not end with the user's turn"),
        ([], "the prompt does not end with the user's turn"),
        ([("user", "Hi"), ("system", "Be kind."), ("user", "Ho")], "a system message after the first turn"),
    ],
)
def test_messages_that_make_no_dialogue_are_not_made_one(messages, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        dialogue_text(messages)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("What is 2 + 2?\n", "\n\nHuman: What is 2 + 2?\n\nAssistant:"),
        ("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"),
        ("Human: Hi\n\nAssistant: ", "\n\nHuman: Hi\n\nAssistant:"),
        ("\n\nHuman: Hi", "\n\nHuman: Hi\n\nAssistant:"),
        ("Be kind.\n\nHuman: Hi\n\nAssistant:", "Be kind.\n\nHuman: Hi\n\nAssistant:"),
        (POST, POST),
        ("A long text.\n\nTL;DR: ", "A long text.\n\nTL;DR:"),
    ],
)
def test_a_prompt_given_as_text(text, prompt):
    assert prompt_of(text) == prompt


@pytest.mark.parametrize("text", ["\n\nHuman: Hi\n\nAssistant: I", "Say\n\nHuman: Hi", "Say\n\nAssistant: Hi"])
def test_a_text_with_turns_that_are_not_complete_is_not_made_a_prompt(text):
    with pytest.raises(Unusable):
        prompt_of(text)


@pytest.mark.parametrize(
    ("prompt", "blank"), [("", True), (" \n", True), ("\n\nHuman: \n\nAssistant:", True), ("?", False)]
)
def test_a_blank_prompt_has_no_word(prompt, blank):
    assert is_blank(prompt) == blank


def test_the_form_of_most_prompts_is_the_form_of_the_data():
    dialogue = "\n\nHuman: Hi\n\nAssistant:"
    assert [form_of(p) for p in (dialogue, POST, "Q: 2 + 2? A:", "x\n\nTL;DR:")] == ["dialogue", "post", "text", "text"]
    assert usual_form([POST, dialogue, dialogue]) == "dialogue"
    assert usual_form([POST, "x", POST]) == "post"
