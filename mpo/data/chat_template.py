"""A model's chat template: which one a folder has, and the text that it makes of messages.

The text comes in pieces that keep the template's own words apart from the contents of messages. Contents are not
trusted: a message that contains "<|im_end|>" must not end its turn. So a template is rendered with a random word in
place of each content, and its text is cut at these words. What the template wrote then never depends on a content.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from mpo.data.dialogue import Message
from mpo.data.rows import Unusable
from mpo.data.tokenizer_files import CONFIG, KINDS, RECORD, TEMPLATE, TokenizerFiles
from mpo.data.vocabulary import pip_install
from mpo.runtime.errors import InputError

MEND = "--template none of train_tokenizer.py does without the template"


class Piece(NamedTuple):
    """A part of a rendered text. `own`: the template wrote it; otherwise it is the content of a message."""

    text: str
    own: bool


class Choice(NamedTuple):
    """What the files of a tokenizer say of the form of dialogues, in RECORD if it is not what is usual."""

    template: str = "auto"  # auto: the chat template, if there is one; none: HH's text form
    date: str = ""  # the day that a template sees; "": today


def recorded_choice(files: TokenizerFiles) -> Choice:
    """The recorded choice, the default if there is none. Raises InputError for a damaged record."""
    record = files.read(RECORD)
    choice = Choice(record.get("template", "auto"), record.get("date", ""))
    try:
        if choice.template not in ("auto", "none"):
            raise ValueError
        if choice.date:
            datetime.fromisoformat(choice.date)
    except (ValueError, TypeError):
        raise InputError(
            f"{files.where}/{RECORD}: must say template auto or none, and a date such as 2026-01-31"
        ) from None
    return choice


def record_of(choice: Choice) -> bytes:
    """The content of the file RECORD."""
    return (json.dumps({name: value for name, value in choice._asdict().items() if value}, indent=2) + "\n").encode()


def template_source(files: TokenizerFiles) -> str | None:
    """The text of the folder's chat template; None without one. chat_template.jinja comes first, as in transformers.

    Of several templates in tokenizer_config.json, it is the one called "default". Raises InputError for other forms.
    """
    if TEMPLATE in files.content:
        try:
            return files.content[TEMPLATE].decode()
        except UnicodeDecodeError as e:
            raise InputError(f"{files.where}/{TEMPLATE}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    given = files.read(CONFIG).get("chat_template")
    if isinstance(given, list) and all(isinstance(one, dict) for one in given):
        given = {str(one.get("name")): one.get("template") for one in given}
    if isinstance(given, dict):
        names = ", ".join(map(str, given))
        given = given.get("default", 0 if given else None)
        if given == 0:
            raise InputError(f"{files.where}/{CONFIG}: none of the chat templates ({names:.200}) is 'default'; {MEND}")
    if given is not None and not isinstance(given, str):
        raise InputError(f"{files.where}/{CONFIG}: chat_template must be a text or a list of named ones; {MEND}")
    return given or None


def uses_date(source: str) -> bool:
    """Whether the text of a template may depend on the day."""
    return "strftime_now" in source


class ChatTemplate:
    """A compiled template with the special tokens that it may name."""

    def __init__(self, source: str, files: TokenizerFiles, date: str = ""):
        """Raises InputError if jinja2 is missing, or the template is not valid."""
        self.where = f"{files.where}: its chat template"
        self.template = _compiled(source, self.where, datetime.fromisoformat(date) if date else datetime.now())
        tokens = {f"{kind}_token": files.special(kind) for kind in KINDS}
        self.tokens = {name: text for name, text in tokens.items() if text is not None}
        self.secret = f"x{secrets.token_hex(16)}"
        self.word = re.compile(f"{self.secret}n([0-9]+)z")
        self.skeletons = dict[tuple[Any, ...], list[str]]()

    def pieces(self, messages: Sequence[Message], reply: bool) -> list[Piece]:
        """The text of a conversation, in pieces. `reply`: the assistant's turn begins at its end.

        Raises Unusable if the template refuses the messages, or changes the content of one, or writes other words of
        its own for the sake of a content.
        """
        skeleton = self._skeleton(tuple((role, bool(content)) for role, content in messages), reply)
        pieces = [Piece(messages[int(s)][1] if i % 2 else s, i % 2 == 0) for i, s in enumerate(skeleton)]
        if "".join(piece.text for piece in pieces) != self._render(messages, reply):
            raise Unusable("the chat template changes the text of a message")
        return [piece for piece in pieces if piece.text]

    def _skeleton(self, roles: tuple[tuple[str, bool], ...], reply: bool) -> list[str]:
        """The template's own words and, between them, the numbers of messages whose contents stand there."""
        if (roles, reply) not in self.skeletons:
            words = [(role, f"{self.secret}n{i}z" if filled else "") for i, (role, filled) in enumerate(roles)]
            self.skeletons[roles, reply] = self.word.split(self._render(words, reply))
        return self.skeletons[roles, reply]

    def _render(self, messages: Iterable[Message], reply: bool) -> str:
        listed = [{"role": role, "content": content} for role, content in messages]
        given: dict[str, Any] = {"messages": listed, "tools": None, "documents": None, "add_generation_prompt": reply}
        try:
            text: str = self.template.render(**given, **self.tokens)
        except Exception as e:  # a template is a program, and may fail in any way
            reason = " ".join(str(e).split()) or type(e).__name__
            raise Unusable(f"the chat template refuses the messages: {reason:.100}") from None
        return text


def _compiled(source: str, where: str, now: datetime) -> Any:
    """The template in jinja2's sandbox, with what transformers offers to templates."""
    try:
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise InputError(f"{where} needs the jinja2 package ({pip_install('jinja2')}); {MEND}") from None

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}: marks what the assistant says, and changes no text."""

        tags = {"generation"}  # noqa: RUF012 (the class is jinja2's)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **more)

    extensions = [Generation, jinja2.ext.loopcontrols]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": now.strftime}
    try:
        return sandbox.from_string(source)
    except (jinja2.TemplateError, RecursionError) as e:
        raise InputError(f"{where} is not valid ({' '.join(str(e).split()):.200}); {MEND}") from None
