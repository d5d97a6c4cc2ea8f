"""From text to pieces and back, in the two formats that models come with: sentencepiece, and tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json

LARGEST = 256 << 20  # bytes
SPECIALS = ("bos", "eos", "pad", "unk")


class Vocabulary(Protocol):
    """A tokenizer's pieces, without any rule for special tokens."""

    size: int
    bos: int
    eos: int
    pad: int | None  # an id of its own; None where there is none

    @property
    def files(self) -> dict[str, bytes]:
        """As which it is saved, by name."""

    def encode(self, text: str) -> list[int]:
        """No special token among them, whatever the text says."""

    def decode(self, ids: list[int]) -> str:
        """The text of these ids."""

    def piece(self, id: int) -> str:
        """How the file writes this piece."""


class Sentencepiece:
    """A tokenizer.model."""

    def __init__(self, model: bytes, where: str):
        """`where` names it in errors. Errors: InputError."""
        self.model = model
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError, OSError) as e:
            raise InputError(f"{where}: not a sentencepiece model ({str(e).splitlines()[0]})") from None
        self.size: int = self.sp.GetPieceSize()
        self.bos, self.eos = self.sp.bos_id(), self.sp.eos_id()
        if min(self.bos, self.eos) < 0:
            raise InputError(f"{where}: the tokenizer has no BOS or no EOS piece")
        self.pad = _pad(self.sp.pad_id(), self.sp.unk_id(), self.eos)

    @property
    def files(self) -> dict[str, bytes]:
        """tokenizer.model, and tokenizer_config.json for transformers, whose `add_prefix_space` must be told."""
        specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        specials |= {} if self.pad is None else {"pad_token": self.piece(self.pad)}
        flags = {"legacy": False, "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
        prefix = self.piece(self.encode("a")[0]).startswith("▁")  # a space before every text, as Llama's own has
        config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": prefix, **specials, **flags}
        return {"tokenizer.model": self.model, "tokenizer_config.json": json.dumps(config, indent=2).encode()}

    def encode(self, text: str) -> list[int]:
        """See Vocabulary."""
        ids: list[int] = self.sp.EncodeAsIds(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        """See Vocabulary."""
        text: str = self.sp.DecodeIds(ids)
        return text

    def piece(self, id: int) -> str:
        """See Vocabulary."""
        text: str = self.sp.IdToPiece(id)
        return text


class TokenizerJson:
    """A tokenizer.json, by the `tokenizers` package, with the special tokens that the files beside it name."""

    def __init__(self, folder: Path):
        """Errors: InputError where the package is missing, the file is none, or nothing says which token is EOS."""
        path = folder / "tokenizer.json"
        try:
            import tokenizers
        except ImportError:
            raise InputError(
                f"{path}: reading it takes the tokenizers package (pip install tokenizers), since there is no "
                "tokenizer.model"
            ) from None
        text = _read(path)
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(text.decode())
        except Exception as e:  # the package raises nothing narrower
            raise InputError(f"{path}: not a tokenizer ({str(e).splitlines()[0]})") from None
        self.tokenizer.encode_special_tokens = True  # text that looks like a special token is text
        self.size: int = self.tokenizer.get_vocab_size()
        beside = ("tokenizer_config.json", "special_tokens_map.json")
        self.files = {"tokenizer.json": text} | {n: _read(folder / n) for n in beside if (folder / n).is_file()}
        named = {kind: self._named(folder, kind) for kind in SPECIALS}
        known = {kind: self._numbered(folder, kind) if id is None else id for kind, id in named.items()}
        if known["eos"] is None:
            raise InputError(f"{folder}: neither {beside[0]} nor config.json says which token is EOS")
        self.eos: int = known["eos"]
        self.bos: int = self.eos if known["bos"] is None else known["bos"]  # GPT's way: a text begins where one ended
        self.pad = _pad(known["pad"], known["unk"], self.eos)
        if new := {f"{k}_token": self.piece(id) for k, id in known.items() if id is not None and named[k] is None}:
            # What only the model's config.json says goes where the tokenizer goes.
            config = {"tokenizer_class": "PreTrainedTokenizerFast", **_object(folder / beside[0]), **new}
            self.files[beside[0]] = json.dumps(config, indent=2).encode()

    def _named(self, folder: Path, kind: str) -> int | None:
        """A special token's id by its text in the tokenizer's own files."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            found = _object(folder / name).get(f"{kind}_token")
            text = found.get("content") if isinstance(found, dict) else found
            if isinstance(text, str):
                id: int | None = self.tokenizer.token_to_id(text)
                return id
        return None

    def _numbered(self, folder: Path, kind: str) -> int | None:
        """A special token's id in the model's config.json."""
        given = _object(folder / "config.json").get(f"{kind}_token_id")
        given = given[0] if isinstance(given, list) and given else given
        return given if isinstance(given, int) and 0 <= given < self.size else None

    def encode(self, text: str) -> list[int]:
        """See Vocabulary."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """See Vocabulary."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def piece(self, id: int) -> str:
        """See Vocabulary."""
        return self.tokenizer.id_to_token(id) or ""


def load_vocabulary(folder: Path) -> Vocabulary:
    """tokenizer.model where the folder has it, else tokenizer.json. Errors: InputError."""
    path = folder / "tokenizer.model"
    if not path.is_file() and (folder / "tokenizer.json").is_file():
        return TokenizerJson(folder)
    if not path.is_file():
        raise InputError(f"{path}: no such file; a model folder needs its tokenizer.model or tokenizer.json")
    return Sentencepiece(_read(path), str(path))


def _read(path: Path) -> bytes:
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: larger than {LARGEST >> 20} MiB; no tokenizer is")
    return path.read_bytes()


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _pad(pad: int | None, unk: int | None, eos: int) -> int | None:
    """An id for pads that is not EOS's, else no model could learn to stop; here nothing is ever padded."""
    return next((id for id in (pad, unk) if id is not None and id >= 0 and id != eos), None)
