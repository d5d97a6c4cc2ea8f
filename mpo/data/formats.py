"""The formats that preference pairs come in. `FORMATS` says how each is recognised, and how it is converted.

The first row of a file decides which format the file has, and every other row must have the same one. What a message or
a prompt becomes as text is decided in dialogue.py. docs/data.md has an example of each format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from mpo.data import hh, tldr
from mpo.data.dialogue import ASSISTANT, HUMAN, Message, dialogue_text, prompt_of
from mpo.data.files import convert_all, read_objects, stem
from mpo.data.rows import (
    Item,
    Row,
    Unusable,
    make_row,
    parse_row,
    text_field,
    whole_text,
    with_ids,
)
from mpo.runtime.errors import InputError

OWN = "rows of this project"
REWARDBENCH = "RewardBench pairs"
OWN_FIELDS = {"id", "domain", "margin", "noise"}  # a row with one of them is this project's, not one of TRL's
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant")
TOOLS = {"tool", "function", "ipython", "observation", "function_call", "tool_call"}


class Format(NamedTuple):
    """The fields of a format, in words for the message about an unknown format; and its two functions."""

    fields: str
    recognise: Callable[[Item], bool]
    convert: Callable[[str, Item], Row]  # raises InputError, which names the line, or Unusable


# --- messages --------------------------------------------------------------------------------------


def messages_of(where: str, name: str, value: Any) -> list[Message]:
    """Messages {"role", "content"} or {"from", "value"}, one or a list of them, as (role, text)."""
    return [_message(where, name, message) for message in (value if isinstance(value, list) else [value])]


def _message(where: str, name: str, message: Any) -> Message:
    role_name, text_name = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
    if not isinstance(message, dict) or not isinstance(message.get(role_name), str):
        raise InputError(
            f"{where}: field {name!r} must hold messages with 'role' and 'content', or 'from' and 'value', "
            f"not {type(message).__name__}{f' of {_fields(message)}' if isinstance(message, dict) else ''}"
        )
    role = message[role_name]
    if role in TOOLS:
        raise Unusable("a message from or to a tool")
    if role not in ROLES:
        raise InputError(f"{where}: field {name!r} has a message of the unknown {role_name} {role!r:.40}")
    return ROLES[role], _content(where, name, message.get(text_name))


def _content(where: str, name: str, content: Any) -> str:
    """The text of a message, which may come in parts: {"type": "text", "text": ...}. They are joined by line breaks."""
    if isinstance(content, list):
        kinds = [part.get("type", "text") if isinstance(part, dict) else "text" for part in content]
        if any(kind != "text" for kind in kinds):
            raise Unusable("a message that is not text alone")
        return "\n".join(_content(where, name, p.get("text") if isinstance(p, dict) else p) for p in content)
    if content is None:
        raise Unusable("a message without text")
    if not isinstance(content, str):
        raise InputError(f"{where}: field {name!r} has a message whose text is {type(content).__name__}, not a string")
    return whole_text(where, name, content)


def reply_of(where: str, item: Item, name: str) -> tuple[list[Message], str]:
    """The messages before a response, and its text. The field holds a text, a message, or a whole dialogue."""
    if item.get(name) is None or isinstance(item[name], str):
        return [], text_field(where, item, name)
    messages = messages_of(where, name, item.get(name))
    if not messages or messages[-1][0] != "assistant":
        raise Unusable("the last turn is not the assistant's")
    return messages[:-1], messages[-1][1]


# --- one converter for each format -----------------------------------------------------------------


def from_messages(where: str, item: Item, prompt: Sequence[Message] = ()) -> Row:
    """A row whose responses are messages or dialogues. Without `prompt`, it is what precedes both last turns."""
    (before, chosen), (other, rejected) = (reply_of(where, item, name) for name in ("chosen", "rejected"))
    if before != other or (prompt and before not in ([], list(prompt))):
        raise Unusable("prompts differ")
    return make_row(where, item, dialogue_text(prompt or before), chosen, rejected)


def trl_text(where: str, item: Item) -> Row:
    """{"prompt": "...", "chosen": "...", "rejected": "..."}"""
    prompt, chosen, rejected = (text_field(where, item, name) for name in ("prompt", "chosen", "rejected"))
    return make_row(where, item, prompt_of(prompt), chosen, rejected)


def rewardbench(where: str, item: Item) -> Row:
    """{"prompt": "...", "chosen": "...", "rejected": "...", "chosen_model": "...", "subset": "...", "id": 7}

    A prompt may have several rows, all with its id. So the id is not used, and rows are named by their place.
    """
    return trl_text(where, item | {"id": None})


def trl_messages(where: str, item: Item) -> Row:
    """{"prompt": [message, ...], "chosen": [message], "rejected": [message]}"""
    return from_messages(where, item, messages_of(where, "prompt", item.get("prompt")))


def implicit_messages(where: str, item: Item) -> Row:
    """{"chosen": [message, ...], "rejected": [message, ...]}"""
    return from_messages(where, item)


def implicit_text(where: str, item: Item) -> Row:
    """{"chosen": "...", "rejected": "..."}: the prompt is the beginning that both share, up to a whole word."""
    chosen, rejected = (text_field(where, item, name) for name in ("chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        raise Unusable("same response twice")
    at = 0  # where the first word begins in which they differ
    for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)):
        if a != b:
            break
        at = i + 1 if a.isspace() else at
    return make_row(where, item, chosen[:at].rstrip(" "), chosen[at:], rejected[at:])


def ultrafeedback(where: str, item: Item) -> Row:
    """{"prompt": "...", "chosen": [message, ...], "rejected": [...], "score_chosen": 9, "score_rejected": 2}"""
    prompt = text_field(where, item, "prompt")
    (before, chosen), (other, rejected) = (reply_of(where, item, name) for name in ("chosen", "rejected"))
    if before != other or (before and prompt.strip() not in [text.strip() for _, text in before]):
        raise Unusable("prompts differ")
    return make_row(where, item, dialogue_text(before) if before else prompt_of(prompt), chosen, rejected)


def sharegpt(where: str, item: Item) -> Row:
    """{"conversations": [message, ...], "chosen": message, "rejected": message}, and perhaps a "system" text."""
    name = "conversations" if item.get("conversations") is not None else "messages"
    return from_messages(where, item, _system(where, item) + messages_of(where, name, item.get(name)))


def alpaca(where: str, item: Item) -> Row:
    """{"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}, perhaps "system" and "history"."""
    question, more = text_field(where, item, "instruction"), item.get("input")
    if more is not None and text_field(where, item, "input").strip():
        question = f"{question}\n{more}"
    before, history = _system(where, item), item.get("history")
    for exchange in [] if history is None else history if isinstance(history, list) else [history]:
        if not (isinstance(exchange, list) and len(exchange) == 2):
            raise InputError(f"{where}: field 'history' must be a list of pairs of texts")
        before += zip(("user", "assistant"), (_content(where, "history", text) for text in exchange), strict=True)
    chosen, rejected = (text_field(where, item, name) for name in ("chosen", "rejected"))
    prompt = dialogue_text([*before, ("user", question)]) if before else prompt_of(question)
    return make_row(where, item, prompt, chosen, rejected)


def alpaca_output(where: str, item: Item) -> Row:
    """{"instruction": "...", "input": "...", "output": [chosen, rejected]}"""
    output = item.get("output")
    if not (isinstance(output, list) and len(output) == 2):
        raise InputError(f"{where}: field 'output' must be a list of two texts, the chosen and the rejected one")
    return alpaca(where, item | {"chosen": output[0], "rejected": output[1]})


def _system(where: str, item: Item) -> list[Message]:
    text = "" if item.get("system") is None else text_field(where, item, "system")
    return [("system", text)] if text.strip() else []


# --- which format a file has -----------------------------------------------------------------------


def _has(item: Item, kind: type | tuple[type, ...], *names: str) -> bool:
    return all(isinstance(item.get(name), kind) for name in names)


PAIR = ("chosen", "rejected")
FORMATS: dict[str, Format] = {
    REWARDBENCH: Format(
        "prompt, chosen, rejected, chosen_model, subset: texts; no domain",
        lambda item: _has(item, str, "prompt", *PAIR, "chosen_model", "subset") and "domain" not in item,
        rewardbench,
    ),
    OWN: Format(
        "id, prompt, chosen, rejected: texts",
        lambda item: _has(item, str, "prompt", *PAIR) and bool(OWN_FIELDS & item.keys()),
        parse_row,
    ),
    "TRL pairs": Format("prompt, chosen, rejected: texts", lambda item: _has(item, str, "prompt", *PAIR), trl_text),
    "TRL message pairs": Format(
        "prompt, chosen, rejected: messages", lambda item: _has(item, list, "prompt"), trl_messages
    ),
    "UltraFeedback pairs": Format(
        "prompt: a text; chosen, rejected: messages",
        lambda item: _has(item, str, "prompt") and _has(item, (list, dict), *PAIR),
        ultrafeedback,
    ),
    "ShareGPT pairs": Format(
        "conversations or messages; chosen, rejected: a message",
        lambda item: _has(item, list, "conversations") or (_has(item, list, "messages") and _has(item, dict, *PAIR)),
        sharegpt,
    ),
    "Alpaca pairs": Format(
        "instruction, input, chosen, rejected: texts", lambda item: _has(item, str, "instruction", *PAIR), alpaca
    ),
    "Alpaca output pairs": Format(
        "instruction, input: texts; output: a list of two",
        lambda item: _has(item, str, "instruction") and _has(item, list, "output"),
        alpaca_output,
    ),
    "HH pairs": Format(
        "chosen, rejected: dialogues of '\\n\\nHuman:' and '\\n\\nAssistant:' turns",
        lambda item: _has(item, str, *PAIR) and all(item[name].lstrip().startswith("Human:") for name in PAIR),
        hh.parse,
    ),
    "TRL pairs without a prompt": Format(
        "chosen, rejected: texts with the same beginning", lambda item: _has(item, str, *PAIR), implicit_text
    ),
    "TRL message pairs without a prompt": Format(
        "chosen, rejected: messages with the same beginning", lambda item: _has(item, list, *PAIR), implicit_messages
    ),
    "TL;DR comparisons": Format(
        "info, summaries, choice", lambda item: _has(item, dict, "info") and _has(item, list, "summaries"), tldr.parse
    ),
}
"""If several formats recognise a row, the first one counts."""


def recognised(item: Item) -> str | None:
    """The name of a row's format; None if it is unknown."""
    return next((name for name, known in FORMATS.items() if known.recognise(item)), None)


def _fields(item: Item) -> str:
    return ", ".join(f"{name!s:.40} ({type(value).__name__})" for name, value in list(item.items())[:12]) or "nothing"


def unknown(where: str, item: Item) -> InputError:
    """The refusal of a row whose format is not known."""
    known = "; ".join(f"{name} ({form.fields})" for name, form in FORMATS.items())
    return InputError(f"{where}: unknown format; its fields are {_fields(item)}; the known formats are {known}")


def _checked(name: str) -> Callable[[str, Item], Row]:
    """The converter of a format, which first refuses a row of another one."""

    def convert(where: str, item: Item) -> Row:
        if name == OWN:
            item = {"id": None} | item  # in a file of this project's rows, a row needs no id
        if (own := recognised(item)) not in (name, None):
            raise InputError(f"{where}: one of the {own}, but the file begins with {name}; a file has one format")
        row = FORMATS[name].convert(where, item)  # refuses a field that is missing or of another type
        if own is None:
            raise InputError(f"{where}: not one of the {name} that the file begins with; it has {_fields(item)}")
        if name != OWN and any(
            mark in response for mark in (HUMAN, ASSISTANT) for response in (row.chosen, row.rejected)
        ):
            raise Unusable("a turn within a response")
        return row

    return convert


def read_file(path: Path, dropped: Counter[str]) -> tuple[str, list[Row]]:
    """The format of a file of pairs, and its rows; see `read_files`."""
    return read_files([path], dropped)


def read_files(paths: Sequence[Path], dropped: Counter[str]) -> tuple[str, list[Row]]:
    """The format of pairs in one or more files, and their rows; `dropped` counts, by reason, those that make no pair.

    Raises InputError for files without rows or of unknown format, and naming the line for a row that is not valid.
    """
    objects = chain.from_iterable(read_objects(path) for path in paths)
    return rows_of(objects, str(paths[0]), stem(paths[0]), dropped)


def rows_of(
    objects: Iterable[tuple[str, Item]], source: str, stem: str, dropped: Counter[str]
) -> tuple[str, list[Row]]:
    """The format of ("file:line", object) pairs, and their rows. A row without an id gets one from `stem`.

    Raises InputError as `read_files` does, with `source` in front where there are no rows.
    """
    objects = iter(objects)
    if (first := next(objects, None)) is None:
        raise InputError(f"{source}: contains no rows")
    name = recognised(first[1])
    if name is None:
        raise unknown(*first)
    return name, with_ids(convert_all(chain([first], objects), _checked(name), stem, dropped))
