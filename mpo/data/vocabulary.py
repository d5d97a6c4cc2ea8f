"""From text to token ids and back, for the two formats that models come with: tokenizer.model and tokenizer.json."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import sentencepiece

from mpo.data.tokenizer_files import CONFIG, JSON, KINDS, MODEL, TokenizerFiles, read_files
from mpo.runtime.errors import InputError


class Special(NamedTuple):
    """A token that a chat template may write. lstrip, rstrip: the space before or after it belongs to it.

    special: it may end a turn. Other added tokens, such as the line breaks of Gemma, are parts of texts.
    """

    id: int
    lstrip: bool = False
    rstrip: bool = False
    special: bool = True


class Vocabulary(Protocol):
    """The tokens of a tokenizer, without any rule for special tokens."""

    size: int  # one more than the largest id
    bos: int  # the id of EOS if there is no BOS
    eos: int
    pad: int | None  # never the id of EOS; None if there is no pad token
    begins: bool  # whether BOS begins every text, as for Llama and Gemma; not so for Qwen
    files: dict[str, bytes]  # the content of its files, by name, as they are written
    specials: dict[str, Special]  # special and added tokens, by their texts

    @property
    def identity(self) -> str:
        """A hash of all that turns text into ids: pieces, merges, added tokens, BOS and EOS, but no chat template."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text. They never include a special token, whatever the text contains."""

    def encode_after(self, text: str, special: bool) -> list[int]:
        """The same, where other text or a special token comes before it. Some put a space only before a first text."""

    def decode(self, ids: list[int]) -> str:
        """The text of these ids. Special tokens are spelled out."""

    def piece(self, id: int) -> str:
        """The token with this id, as the file spells it; "" for an id without a token."""


class Sentencepiece:
    """A sentencepiece model, as in tokenizer.model, and the tokens that other files of its folder add to it."""

    def __init__(self, files: TokenizerFiles):
        """Raises InputError if the file is no such model or contradicts the others, or if no token is EOS."""
        model, where = files.content[MODEL], f"{files.where}/{MODEL}"
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError, OSError) as e:
            raise InputError(f"{where}: not a sentencepiece model ({str(e).splitlines()[0]})") from None
        self.pieces: int = self.sp.GetPieceSize()
        self.added = {id: t for id, t in files.added().items() if id >= self.pieces or t != self.sp.IdToPiece(id)}
        _compare_with_json(files, self.sp, self.added)
        self.size = max(self.pieces, *(id + 1 for id in self.added)) if self.added else self.pieces
        own = {kind: getattr(self.sp, f"{kind}_id")() for kind in KINDS}
        known = special_ids(files, self._id, {kind: id for kind, id in own.items() if id >= 0}, self.size)
        self.bos, self.eos, self.pad = _rules(files, known)
        self.begins = known["bos"] is not None and files.begins_with_bos(True)
        special = {id for id in (*map(self._id, files.special_texts()), *known.values()) if id is not None}
        self.model = self._close(model, special)
        special |= {*self.added, *filter(self.sp.IsControl, range(self.pieces))}
        flags = files.token_flags()
        self.specials = {t: Special(id, *flags.get(t, ())) for id in sorted(special) if (t := self.piece(id))}
        self.prefixed = files.read(CONFIG).get("legacy") is True  # puts a space after special tokens, too
        pad = known["pad"] if CONFIG in files.content else self.pad
        self.files = _with_names(files, known | {"pad": pad}, self.piece, self._new_config())

    def _id(self, text: str) -> int | None:
        """The id of the token with this text; None if there is none."""
        id = next((id for id, added in self.added.items() if added == text), self.sp.PieceToId(text))
        return id if self.piece(id) == text else None  # sentencepiece gives the id of <unk> for what is no piece

    def _close(self, model: bytes, specials: set[int]) -> bytes:
        """Make sure that no text is encoded into a special token, even if the model has it as an ordinary piece.

        Returns the model that is then loaded.
        """
        inside = [i for i in specials if i < self.pieces]
        if ordinary := [i for i in inside if not self.sp.IsControl(i) and not self.sp.IsUnknown(i)]:
            model = _with_control_pieces(model, ordinary)
            self.sp.LoadFromSerializedProto(model)
        return model

    def _new_config(self) -> dict[str, Any]:
        """A tokenizer_config.json with which transformers tokenises in the same way."""
        prefix = self.piece(self.encode("a")[0]).startswith("▁")  # it puts a space before every text, like Llama's own
        flags = {"legacy": False, "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
        return {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": prefix, **flags}

    @property
    def identity(self) -> str:
        """See Vocabulary."""
        return _hash(self.files[MODEL], json.dumps([sorted(self.added.items()), self.begins, self.bos, self.eos]))

    def encode(self, text: str) -> list[int]:
        """See Vocabulary."""
        ids: list[int] = self.sp.EncodeAsIds(text)
        return ids

    def encode_after(self, text: str, special: bool) -> list[int]:
        """See Vocabulary."""
        if special and self.prefixed:
            return self.encode(text)
        ids: list[int] = self._without_prefix.EncodeAsIds(text)
        return ids

    @functools.cached_property
    def _without_prefix(self) -> Any:
        """The same model with add_dummy_prefix off: field 3 of the normaliser's settings, which are field 3 of all."""
        without = sentencepiece.SentencePieceProcessor()
        without.LoadFromSerializedProto(self.model + bytes((3 << 3 | 2, 2, 3 << 3, 0)))  # the last value counts
        return without

    def decode(self, ids: list[int]) -> str:
        """See Vocabulary."""
        text = ""
        for spelled, run in itertools.groupby(ids, self._is_spelled):
            part = list(run)
            text += "".join(map(self.piece, part)) if spelled else self._decode_pieces(part)
        return text

    def _is_spelled(self, id: int) -> bool:
        """Whether decoding gives the name of this token: it is special or added, and stands for no part of a text."""
        return id >= self.pieces or id in self.added or bool(self.sp.IsControl(id))

    def _decode_pieces(self, ids: list[int]) -> str:
        return _with_first_space(self.sp.DecodeIds(ids), self.piece(ids[0]))

    def piece(self, id: int) -> str:
        """See Vocabulary."""
        text: str = self.sp.IdToPiece(id) if id < self.pieces else ""
        return self.added.get(id, text)


class TokenizerJson:
    """A tokenizer.json, read by the `tokenizers` package. Other files of the folder say which tokens are special."""

    def __init__(self, files: TokenizerFiles):
        """Raises InputError if the package is missing, the file is damaged, or no file says which token is EOS."""
        where = f"{files.where}/{JSON}"
        try:
            import tokenizers
        except ImportError:
            raise InputError(f"{where}: needs the tokenizers package ({pip_install('tokenizers')})") from None
        try:
            self.text = files.content[JSON].decode()
            self.tokenizer = tokenizers.Tokenizer.from_str(self.text)
        except Exception as e:  # the package raises no narrower class
            raise InputError(f"{where}: not a tokenizer ({str(e).splitlines()[0]})") from None
        self.size: int = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        known = special_ids(files, self.tokenizer.token_to_id, {}, self.size)
        self.bos, self.eos, self.pad = _rules(files, known)
        self.begins = known["bos"] is not None and files.begins_with_bos(False)
        # Text that looks like a special token stays text.
        specials = {self.piece(id) for id in known.values() if id is not None}
        self.closed = [tokenizers.AddedToken(t, normalized=False) for t in sorted(specials)]
        self.tokenizer.add_special_tokens(self.closed)
        self.tokenizer.encode_special_tokens = True
        added, flags = self.tokenizer.get_added_tokens_decoder(), files.token_flags()
        self.specials = {t.content: Special(id, *flags.get(t.content, ())) for id, t in added.items()}
        self.prefixed = _prefixes(files.read(JSON))
        self.files = _with_names(files, known, self.piece, {"tokenizer_class": "PreTrainedTokenizerFast"})

    @functools.cached_property
    def identity(self) -> str:
        """See Vocabulary."""
        # Spelled in one way, whichever version of the package wrote the file.
        whole = json.loads(type(self.tokenizer).from_str(self.text).to_str())
        encoder = {name: whole[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        return _hash(json.dumps([encoder, self.begins, self.bos, self.eos], sort_keys=True))

    def encode(self, text: str) -> list[int]:
        """See Vocabulary."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_after(self, text: str, special: bool) -> list[int]:
        """See Vocabulary."""
        tokenizer = self.tokenizer if special and self.prefixed else self._without_prefix
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @functools.cached_property
    def _without_prefix(self) -> Any:
        """The same tokenizer with all that puts a space before a text switched off."""
        whole = json.loads(self.text)
        if not any(_prefixers(whole)):
            return self.tokenizer
        for part in _prefixers(whole):
            part |= {"Prepend": {"prepend": ""}, "Metaspace": {"prepend_scheme": "never"}}.get(part["type"], {})
            part |= {"add_prefix_space": False} if "add_prefix_space" in part else {}
        without = type(self.tokenizer).from_str(json.dumps(whole))
        without.add_special_tokens(self.closed)
        without.encode_special_tokens = True
        return without

    def decode(self, ids: list[int]) -> str:
        """See Vocabulary."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return _with_first_space(text, self.piece(ids[0])) if ids else text

    def piece(self, id: int) -> str:
        """See Vocabulary."""
        return self.tokenizer.id_to_token(id) or ""


def load_vocabulary(folder: Path) -> Vocabulary:
    """Load tokenizer.model or, in a folder without it, tokenizer.json. Raises InputError if neither can be read."""
    files = read_files(folder)
    tiktoken = re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", files.content.get(MODEL, b""))
    if MODEL in files.content and not tiktoken:
        return Sentencepiece(files)
    if JSON in files.content:
        return TokenizerJson(files)
    if tiktoken:
        raise InputError(
            f"{folder / MODEL}: a tiktoken vocabulary, which is not read; the model's download in the Hugging Face "
            f"layout has a {JSON}, which is"
        )
    raise InputError(f"{folder / MODEL}: no such file; a model folder needs its {MODEL} or {JSON}")


# --- special tokens --------------------------------------------------------------------------------


def special_ids(
    files: TokenizerFiles, id_of: Callable[[str], int | None], own: dict[str, int], size: int
) -> dict[str, int | None]:
    """The ids of BOS, EOS, pad and unknown, each None if there is none.

    They are looked up first in the tokenizer's files, then in the vocabulary itself (`own`), and then, for BOS and
    EOS, in config.json. A bos_token of null in tokenizer_config.json means that there is no BOS, whatever config.json
    says, as for Qwen2. Raises InputError for a BOS or EOS that the vocabulary does not have.
    """
    known = dict[str, int | None]()
    for kind in KINDS:
        text, ends = files.special(kind), kind in ("bos", "eos")
        named = id_of(text) if text else None
        if text and named is None and ends:
            raise InputError(f"{files.where}: its files call {text!r:.80} {kind}_token, which the vocabulary lacks")
        denied = kind == "bos" and files.read(CONFIG).get("bos_token", "") is None
        sources = named, own.get(kind), files.config_id(kind, size) if ends and not denied else None
        known[kind] = next((id for id in sources if id is not None), None)
    return known


def _rules(files: TokenizerFiles, known: dict[str, int | None]) -> tuple[int, int, int | None]:
    """BOS, EOS and pad. Without BOS, EOS begins a text, as in GPT-2.

    Pad must not be EOS: in a program that masks by id, a model with such a pad could not learn to stop. Batches here
    are packed and have no pads.
    """
    eos = known["eos"]
    if eos is None:
        raise InputError(f"{files.where}: neither {CONFIG} nor config.json says which token is EOS")
    bos = eos if known["bos"] is None else known["bos"]
    return bos, eos, next((id for id in (known["pad"], known["unk"]) if id is not None and id != eos), None)


def _with_names(
    files: TokenizerFiles, known: dict[str, int | None], piece: Callable[[int], str], new: dict[str, Any]
) -> dict[str, bytes]:
    """The files to write: those that were read. Special tokens that no file names are added to tokenizer_config.json.

    transformers would otherwise assume a default such as "<s>", which may not even exist, or no token at all. `new`:
    the other entries of a tokenizer_config.json, if the folder has none.
    """
    missing = {kind: id for kind, id in known.items() if files.special(kind, files.read_elsewhere) is None}
    named = {f"{kind}_token": piece(id) for kind, id in missing.items() if id is not None}
    if CONFIG in files.content and not named:
        return files.content
    text = json.dumps({**new, **files.read(CONFIG), **named}, indent=2, ensure_ascii=False)
    return files.content | {CONFIG: text.encode()}


# --- details of the formats ------------------------------------------------------------------------


def _with_control_pieces(model: bytes, ids: list[int]) -> bytes:
    """A sentencepiece model in which these pieces are control pieces, which no text is encoded into.

    The model is a message of protobuf: fields, each a tag, a length and content. The fields with tag 10 are the pieces;
    in each of them field 3 is its type, of which the last value counts.
    """
    out, at, piece = bytearray(), 0, -1
    while at < len(model):
        tag, at = _varint(model, at)
        length, at = _varint(model, at)
        content, at = model[at : at + length], at + length
        piece += tag == 10
        if tag == 10 and piece in ids:
            content += bytes((3 << 3, 3))  # field 3: a control piece
        out += _as_varint(tag) + _as_varint(len(content)) + content
    return bytes(out)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of protobuf, seven bits a byte, the lowest first; and the place after it."""
    value = shift = 0
    while data[at] & 128:
        value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
    return value | data[at] << shift, at + 1


def _as_varint(value: int) -> bytes:
    return bytes((value & 127 | 128,)) + _as_varint(value >> 7) if value > 127 else bytes((value,))


def _compare_with_json(files: TokenizerFiles, sp: Any, added: dict[int, str]) -> None:
    """Raise InputError where a tokenizer.json beside tokenizer.model is that of another vocabulary.

    Other programs read the former, this project reads the latter.
    """
    model = files.read(JSON).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # of a unigram model: [piece, score]
        vocab = {item[0]: i for i, item in enumerate(vocab) if isinstance(item, list) and item}
    if not isinstance(vocab, dict):
        return
    ours = dict(enumerate(sp.IdToPiece(list(range(sp.GetPieceSize()))))) | added
    for piece, id in vocab.items():
        if ours.get(id) != piece:
            raise InputError(
                f"{files.where}: {MODEL} and {JSON} are two different vocabularies: id {id} is {ours.get(id)!r:.80} in "
                f"one and {piece!r:.80} in the other; take all of a tokenizer's files from the same place"
            )


def _prefixers(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a tokenizer.json that put a space before texts."""
    parts = [whole.get("normalizer"), whole.get("pre_tokenizer")]
    for part in parts:
        if isinstance(part, dict):
            parts += [*(part.get("normalizers") or ()), *(part.get("pretokenizers") or ())]
    given = [part for part in parts if isinstance(part, dict)]
    byte_level = [part for part in given if part.get("type") == "ByteLevel" and part.get("add_prefix_space")]
    return byte_level + [part for part in given if part.get("type") in ("Prepend", "Metaspace")]


def _prefixes(whole: dict[str, Any]) -> bool:
    """Whether these parts put a space before every text, not only before the first one."""
    return any(part.get("prepend_scheme", "always") == "always" for part in _prefixers(whole))


def _with_first_space(text: str, first: str) -> str:
    """Put back the first space, which a vocabulary that puts a space before every text removes when it decodes."""
    return " " + text if first.startswith("▁") and not text.startswith(" ") else text


def pip_install(package: str) -> str:
    """The command that installs a package for the Python that is running."""
    here = os.path.relpath(sys.executable)
    return f"{sys.executable if here.startswith('..') else here} -m pip install {package}"


def _hash(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()
