"""Turn prompts and responses into ids, and train a sentencepiece tokenizer.

One place adds the special tokens: a prompt gets BOS, exactly once; a complete response gets
EOS. Prompt and response are tokenised apart and their ids joined, so that the boundary is the
same in training, sampling and scoring.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from mpo.data.vocabulary import Sentencepiece, Vocabulary, load_vocabulary
from mpo.runtime.files import write_bytes

# Packing of their own: one token each, and no other string maps to them.
TURNS = ("\n\nHuman:", "\n\nAssistant:")
POST_PARTS = ("SUBREDDIT:", "\n\nTITLE:", "\n\nPOST:", "\n\nTL;DR:")


class Tokenizer:
    """A vocabulary and the rules for special tokens."""

    def __init__(self, vocabulary: Vocabulary):
        """On the pieces of vocabulary.py."""
        self.vocabulary = vocabulary
        self.size, self.bos, self.eos, self.pad = vocabulary.size, vocabulary.bos, vocabulary.eos, vocabulary.pad

    def prompt_ids(self, prompt: str) -> list[int]:
        """BOS and the prompt's ids."""
        return [self.bos, *self.vocabulary.encode(prompt)]

    def response_ids(self, response: str) -> list[int]:
        """The ids of a complete response, closed by EOS."""
        return [*self.vocabulary.encode(response), self.eos]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a response's ids up to EOS, specials left out; keeps the leading space."""
        kept = list[int]()
        for i in ids:
            if i == self.eos:
                break
            if i not in (self.bos, self.pad) and i < self.size:  # a model may have rows for more pieces
                kept.append(int(i))
        text = self.vocabulary.decode(kept)
        # the space of a leading "▁" is dropped where a dummy prefix is added to every text
        lost = bool(kept) and self.vocabulary.piece(kept[0]).startswith("▁") and not text.startswith(" ")
        return " " + text if lost else text

    def save(self, folder: Path) -> None:
        """Write the vocabulary's files."""
        for name, content in self.vocabulary.files.items():
            write_bytes(folder / name, content)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model or tokenizer folder. Errors: InputError."""
    return Tokenizer(load_vocabulary(Path(folder)))


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
    return Tokenizer(Sentencepiece(out.getvalue(), "the tokenizer just trained"))
