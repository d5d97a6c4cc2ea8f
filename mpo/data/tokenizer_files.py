"""The files of a tokenizer in a model's folder: which there are, and what they say of special and added tokens.

They are copied into every model folder that a stage writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json

MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
OF_SPECIALS, ADDED = "special_tokens_map.json", "added_tokens.json"
TEMPLATE = "chat_template.jinja"
RECORD = "mpo_template.json"  # this project's own: which form dialogues have (chat_template.py)
FILES = (
    *(MODEL, JSON, CONFIG, OF_SPECIALS, ADDED, "vocab.json", "merges.txt"),
    *(TEMPLATE, "chat_template.json", "additional_chat_templates/*.jinja", RECORD),
)
LARGEST = 256 << 20  # bytes of one file
KINDS = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of one folder, and what config.json there says of special tokens."""

    where: str  # the folder, for messages
    content: dict[str, bytes]  # by name
    config: dict[str, Any] = field(default_factory=dict)  # config.json; empty without one
    _parsed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def read(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; an empty one if there is no such file. Raises InputError for anything else."""
        if name not in self._parsed:
            try:
                value = json.loads(self.content.get(name, b"{}"))
            except (ValueError, RecursionError) as e:
                raise InputError(f"{self.where}/{name}: not valid JSON ({e})") from None
            if not isinstance(value, dict):
                raise InputError(f"{self.where}/{name}: expected a JSON object, found {type(value).__name__}")
            self._parsed[name] = value
        return self._parsed[name]

    @property
    def read_elsewhere(self) -> tuple[str, ...]:
        """The files in which transformers looks up special tokens, in that order."""
        return (CONFIG,) if "added_tokens_decoder" in self.read(CONFIG) else (OF_SPECIALS, CONFIG)

    def special(self, kind: str, names: Sequence[str] = ()) -> str | None:
        """The text of the special token of this kind, from the files `names` or from any; None without one."""
        given = (self.read(name).get(f"{kind}_token") for name in names or (*self.read_elsewhere, OF_SPECIALS))
        return next((text for token in given if (text := _text(token)) is not None), None)

    def special_texts(self) -> set[str]:
        """The texts of all tokens that any file calls special."""
        texts = {self.special(kind) for kind in KINDS}
        for name in (CONFIG, OF_SPECIALS):
            for field_name in ("additional_special_tokens", "extra_special_tokens"):
                more = self.read(name).get(field_name)
                more = list(more.values()) if isinstance(more, dict) else more
                texts |= {_text(token) for token in more} if isinstance(more, list) else set()
        tokens = [*_objects(self.read(CONFIG).get("added_tokens_decoder")).values(), *self._of_json()]
        texts |= {_text(token) for token in tokens if isinstance(token, dict) and token.get("special")}
        return {text for text in texts if text}

    def added(self) -> dict[int, str]:
        """The texts of added tokens, by id. Raises InputError where two files contradict each other."""
        decoder = _objects(self.read(CONFIG).get("added_tokens_decoder"))
        listed: list[tuple[str, Any, str | None]] = [(CONFIG, id, _text(token)) for id, token in decoder.items()]
        listed += [(ADDED, id, text) for text, id in self.read(ADDED).items()]
        listed += [(JSON, token.get("id"), _text(token)) for token in self._of_json() if isinstance(token, dict)]
        texts, ids = dict[int, str](), dict[str, int]()
        for name, given, text in listed:
            if not re.fullmatch(r"\d{1,7}", str(given)) or not text:
                raise InputError(f"{self.where}/{name}: {text!r:.80} has the id {given!r:.80}, not a whole number")
            id = int(given)
            if texts.setdefault(id, text) != text or ids.setdefault(text, id) != id:
                raise InputError(
                    f"{self.where}/{name}: the added token {text!r:.80} has the id {id}, which the other files of the "
                    "folder contradict; take all of a tokenizer's files from the same place"
                )
        return texts

    def token_flags(self) -> dict[str, tuple[bool, bool, bool]]:
        """Of each added token, by its text: does space before it belong to it, and space after it; is it special?"""
        tokens = [*self._of_json(), *_objects(self.read(CONFIG).get("added_tokens_decoder")).values()]
        return {
            text: (token.get("lstrip") is True, token.get("rstrip") is True, token.get("special") is not False)
            for token in tokens
            if isinstance(token, dict) and (text := _text(token))
        }

    def begins_with_bos(self, otherwise: bool) -> bool:
        """Whether these files say that BOS begins every text; `otherwise` if they do not say.

        tokenizer.json says so in its post-processor. add_bos_token in tokenizer_config.json counts only without one,
        as in transformers.
        """
        processor = self.read(JSON).get("post_processor")
        if isinstance(processor, dict):
            parts = processor.get("processors", [processor])
            singles = [part.get("single") for part in map(_objects, parts if isinstance(parts, list) else ())]
            first = next((single[0] for single in singles if isinstance(single, list) and single), None)
            token = _objects(_objects(first).get("SpecialToken")).get("id")
            return token is not None and token == (self.special("bos") or token)
        given = self.read(CONFIG).get("add_bos_token")
        return given if isinstance(given, bool) and MODEL in self.content else otherwise

    def _of_json(self) -> list[Any]:
        tokens = self.read(JSON).get("added_tokens")
        return tokens if isinstance(tokens, list) else []

    def config_id(self, kind: str, size: int) -> int | None:
        """The id of a special token in config.json, the first of several; None if it gives none below `size`."""
        given = self.config.get(f"{kind}_token_id")
        given = given[0] if isinstance(given, list) and given else given
        return given if isinstance(given, int) and 0 <= given < size else None


def read_files(folder: Path) -> TokenizerFiles:
    """Read all files of a tokenizer in a folder. Raises InputError for one that is too large."""
    paths = [path for name in FILES for path in sorted(folder.glob(name))]
    content = {str(path.relative_to(folder)): _read(path) for path in paths if path.is_file()}
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return TokenizerFiles(str(folder), content, _objects(config))


def _read(path: Path) -> bytes:
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: larger than {LARGEST >> 20} MiB; no tokenizer is that large")
    return path.read_bytes()


def _objects(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(token: Any) -> str | None:
    """The text of a token, which the files give as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
