"""From text to token ids and back, for the two formats that models come with: tokenizer.model and tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json

LARGEST = 256 << 20  # bytes of a tokenizer's file
SPECIALS = ("bos", "eos", "pad", "unk")


class Vocabulary(Protocol):
    """The pieces (tokens) of a tokenizer, without any rule for special tokens."""

    size: int
    bos: int
    eos: int
    pad: int | None  # never the id of EOS; None if there is no pad token

    @property
    def files(self) -> dict[str, bytes]:
        """The content of its files, by name."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text. They never include a special token, whatever the text contains."""

    def decode(self, ids: list[int]) -> str:
        """The text of these ids."""

    def piece(self, id: int) -> str:
        """The piece with this id, as the file spells it."""


class Sentencepiece:
    """A sentencepiece model, as in tokenizer.model."""

    def __init__(self, model: bytes, where: str):
        """`where` names the model in error messages. Raises InputError for bytes that are not such a model."""
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
        self.pad = _pad_id(self.sp.pad_id(), self.sp.unk_id(), self.eos)

    @property
    def files(self) -> dict[str, bytes]:
        """tokenizer.model, and the tokenizer_config.json that transformers needs to tokenise in the same way."""
        specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        specials |= {} if self.pad is None else {"pad_token": self.piece(self.pad)}
        flags = {"legacy": False, "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
        prefix = self.piece(self.encode("a")[0]).startswith("▁")  # puts a space before every text, as Llama's own does
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
    """A tokenizer.json, read by the `tokenizers` package. Other files of the folder say which tokens are special."""

    def __init__(self, folder: Path):
        """Raises InputError if the package is missing, the file is damaged, or no file says which token is EOS."""
        path = folder / "tokenizer.json"
        try:
            import tokenizers
        except ImportError:
            raise InputError(
                f"{path}: needs the tokenizers package (pip install tokenizers), since there is no tokenizer.model"
            ) from None
        text = _read(path)
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(text.decode())
        except Exception as e:  # the package raises no narrower class
            raise InputError(f"{path}: not a tokenizer ({str(e).splitlines()[0]})") from None
        self.tokenizer.encode_special_tokens = True  # text that looks like a special token stays text
        self.size: int = self.tokenizer.get_vocab_size()
        other_files = ("tokenizer_config.json", "special_tokens_map.json")
        self.files = {"tokenizer.json": text} | {n: _read(folder / n) for n in other_files if (folder / n).is_file()}
        named = {kind: self._id_by_text(folder, kind) for kind in SPECIALS}
        known = {kind: self._id_in_config(folder, kind) if id is None else id for kind, id in named.items()}
        if known["eos"] is None:
            raise InputError(f"{folder}: neither {other_files[0]} nor config.json says which token is EOS")
        self.eos: int = known["eos"]
        self.bos: int = self.eos if known["bos"] is None else known["bos"]  # as in GPT-2: EOS separates texts
        self.pad = _pad_id(known["pad"], known["unk"], self.eos)
        if new := {f"{k}_token": self.piece(id) for k, id in known.items() if id is not None and named[k] is None}:
            # The tokenizer may be saved without the model, so it takes along what only config.json says.
            config = {"tokenizer_class": "PreTrainedTokenizerFast", **_object(folder / other_files[0]), **new}
            self.files[other_files[0]] = json.dumps(config, indent=2).encode()

    def _id_by_text(self, folder: Path, kind: str) -> int | None:
        """The id of the special token whose text the tokenizer's own files give; None if they give none."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _object(folder / name).get(f"{kind}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                id: int | None = self.tokenizer.token_to_id(text)
                return id
        return None

    def _id_in_config(self, folder: Path, kind: str) -> int | None:
        """The id of a special token in the model's config.json; None if it gives none."""
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
    """Load tokenizer.model or, in a folder without it, tokenizer.json. Raises InputError if neither can be read."""
    path = folder / "tokenizer.model"
    if not path.is_file() and (folder / "tokenizer.json").is_file():
        return TokenizerJson(folder)
    if not path.is_file():
        raise InputError(f"{path}: no such file; a model folder needs its tokenizer.model or tokenizer.json")
    return Sentencepiece(_read(path), str(path))


def _read(path: Path) -> bytes:
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: larger than {LARGEST >> 20} MiB; no tokenizer is that large")
    return path.read_bytes()


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no such file or it has something else."""
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _pad_id(pad: int | None, unk: int | None, eos: int) -> int | None:
    """The pad token's id for the files that are written; batches here are packed and have no pads.

    It must not be EOS: in a program that masks by id, a model with such a pad could not learn to stop.
    """
    return next((id for id in (pad, unk) if id is not None and id >= 0 and id != eos), None)
