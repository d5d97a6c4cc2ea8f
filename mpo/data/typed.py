"""What a person types, as a prompt in the form of the rows (dialogue.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpo.data.batches import fit_prompt
from mpo.data.dialogue import ASSISTANT, HUMAN, form_of
from mpo.data.rows import Unusable
from mpo.data.tldr import prompt_text
from mpo.data.tokenizer import Tokenizer
from mpo.runtime.errors import InputError
from mpo.runtime.manifest import read_manifest

FORMS = ("dialogue", "post", "text")
POST = ["relationships", "What should I do?"]  # the subreddit and title of a post without any


def form_of_run(data: str) -> str:
    """The form of a run's prompts (mpo/data/dialogue.py), as its data stage recorded it; a dialogue without a folder.

    Raises InputError for a folder that is not the data stage's.
    """
    if not data:
        return "dialogue"
    results = read_manifest(Path(data) / "manifest.json")["results"]
    form = results.get("prompt_form") or {"hh": "dialogue", "tldr": "post"}.get(str(results.get("task")))
    if form not in FORMS:
        raise InputError(f"--data {data}: not the folder of a data stage (its manifest.json has no form of prompts)")
    return str(form)


def as_prompt(form: str, history: str, line: str) -> str:
    """The prompt that a line becomes. `history` is the dialogue so far."""
    if form == "dialogue":
        return f"{history}{HUMAN} {line}{ASSISTANT}"
    if form == "post":
        parts = [part.strip() for part in line.split("|", 2)]
        subreddit, title, post = parts if len(parts) == 3 and parts[0].startswith("r/") else [*POST, line]
        return prompt_text(subreddit.removeprefix("r/"), title, post)
    return line


def as_row_prompt(form: str, text: str) -> str:
    """The prompt that a text becomes; a dialogue or a post in the form of the rows stays as it is."""
    return (
        text if form_of(text) in ("dialogue", "post") else as_prompt(form, "", text.strip() if form != "text" else text)
    )


def as_response(text: str) -> str:
    """A response in the form of the rows, which starts with a space."""
    return " " + text.strip()


def prompt_ids(prompt: str, tokenizer: Tokenizer, room: int) -> tuple[list[int], int]:
    """The ids of a prompt, of at most `room` tokens, and how many of its oldest turns had to go for that.

    Raises Unusable, in words for the person who typed it, where its last turn alone is too long or the chat template
    refuses it.
    """
    ids, cut = fit_prompt(prompt, tokenizer, room)
    if not ids:
        raise Unusable(f"too long: the model has room for {room} tokens")
    return ids, cut


def room_for_prompts(positions: int, max_new: int, model: Sequence[str]) -> int:
    """How many tokens a prompt may have. `model`: its flag and folder, for the message. Raises InputError for none."""
    room = positions - max_new
    if room < 2:
        flag, folder = model
        raise InputError(
            f"{flag} {max_new}: leaves no room for a prompt, since {folder} takes at most {positions} tokens"
        )
    return room
