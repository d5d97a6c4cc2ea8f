"""Sentencepiece: train, load, and turn prompts and responses into ids.

One place adds the special tokens: a prompt gets BOS, exactly once; a complete response gets
EOS. Prompt and response are tokenised apart and their ids joined, so that the boundary is the
same in training, sampling and scoring.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from mpo.errors import InputError
from mpo.files import write_bytes, write_json

LARGEST = 256 << 20  # bytes

# Pieces of their own: one token each, and no other string maps to them.
TURNS = ("\n\nHuman:", "\n\nAssistant:")
POST_PARTS = ("SUBREDDIT:", "\n\nTITLE:", "\n\nPOST:", "\n\nTL;DR:")


class Tokenizer:
    """A sentencepiece model and the rules for special tokens."""

    def __init__(self, model: bytes, where: str):
        """Load from the bytes of a tokenizer.model; `where` names it in errors."""
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
        # Pads are never attended to nor counted (masks come from lengths), so any id but EOS will do.
        self.pad: int = self.sp.pad_id() if self.sp.pad_id() >= 0 else max(0, self.sp.unk_id())

    @property
    def adds_prefix(self) -> bool:
        """True where sentencepiece puts a space before every text, as Llama's own tokenizer does."""
        return str(self.sp.EncodeAsPieces("a")[0]).startswith("▁")

    def prompt_ids(self, prompt: str) -> list[int]:
        """BOS and the prompt's ids."""
        return [self.bos, *self.sp.EncodeAsIds(prompt)]

    def response_ids(self, response: str) -> list[int]:
        """The ids of a complete response, closed by EOS."""
        return [*self.sp.EncodeAsIds(response), self.eos]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a response's ids up to EOS, specials left out; keeps the leading space."""
        kept = []
        for i in ids:
            if i == self.eos:
                break
            if i not in (self.bos, self.pad):
                kept.append(int(i))
        text: str = self.sp.DecodeIds(kept)
        # sentencepiece drops the space of a leading "▁" when it adds a dummy prefix itself
        lost = bool(kept) and self.sp.IdToPiece(kept[0]).startswith("▁") and not text.startswith(" ")
        return " " + text if lost else text

    def save(self, folder: Path) -> None:
        """Write tokenizer.model, and tokenizer_config.json for transformers."""
        write_bytes(folder / "tokenizer.model", self.model)
        write_json(folder / "tokenizer_config.json", hugging_face_config(self.sp.IdToPiece(self.pad), self.adds_prefix))


def hugging_face_config(pad: str, adds_prefix: bool) -> dict[str, object]:
    """tokenizer_config.json for transformers; its `add_prefix_space` must be told."""
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": pad}
    flags = {"legacy": False, "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    return {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": adds_prefix, **specials, **flags}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model or tokenizer folder."""
    path = Path(folder) / "tokenizer.model"
    if not path.is_file():
        raise InputError(f"{path}: no such file; a model folder needs its sentencepiece tokenizer")
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: larger than {LARGEST >> 20} MiB; no tokenizer is")
    return Tokenizer(path.read_bytes(), str(path))


def train_tokenizer(texts: Iterable[str], vocab: int, seed: int) -> Tokenizer:
    """Train BPE with byte fallback and its own pad piece on whole prompts and responses.

    No normalisation and no dummy prefix: decoding what was encoded gives the same text. `vocab`
    is the most; a small corpus yields fewer pieces.
    """
    out = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts),
        model_writer=out,
        model_type="bpe",
        vocab_size=vocab,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        max_sentence_length=1 << 20,
        user_defined_symbols=[*TURNS, *POST_PARTS, "\n"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        pad_piece="<pad>",
        num_threads=1,  # the result must not depend on the number of cores
        minloglevel=2,
    )
    return Tokenizer(out.getvalue(), "the tokenizer just trained")
