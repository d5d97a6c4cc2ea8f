"""Turn prompts and responses into token ids, and train a sentencepiece tokenizer.

Special tokens are added here and nowhere else: BOS once, before a prompt, if the model's texts begin with one, and EOS
after a complete response. Prompt and response are tokenised separately and their ids joined. So the boundary is the
same in training, sampling and scoring.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from mpo.data.tokenizer_files import MODEL, TokenizerFiles
from mpo.data.vocabulary import Sentencepiece, Vocabulary, load_vocabulary
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, write_bytes

# Each of these strings has a token of its own, which no other text is encoded into.
TURNS = ("\n\nHuman:", "\n\nAssistant:")
POST_PARTS = ("SUBREDDIT:", "\n\nTITLE:", "\n\nPOST:", "\n\nTL;DR:")


class Tokenizer:
    """A vocabulary (vocabulary.py) with the rules for special tokens."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.size, self.bos, self.eos, self.pad = vocabulary.size, vocabulary.bos, vocabulary.eos, vocabulary.pad

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids of the prompt, after BOS if the model's texts begin with it. Never empty."""
        ids = self.vocabulary.encode(prompt)
        return ids if ids and not self.vocabulary.begins else [self.bos, *ids]

    def response_ids(self, response: str) -> list[int]:
        """The ids of a complete response, then EOS."""
        return [*self.vocabulary.encode(response), self.eos]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a response, up to EOS and without special tokens. A leading space is kept."""
        kept = list[int]()
        for i in ids:
            if i == self.eos:
                break
            if i not in (self.bos, self.pad) and i < self.size:  # a model may have more embeddings than pieces
                kept.append(int(i))
        return self.vocabulary.decode(kept)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, chat templates included, into a folder."""
        for name, content in self.vocabulary.files.items():
            write_bytes(folder / name, content)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load the tokenizer of a model or tokenizer folder. Raises InputError as `load_vocabulary` does."""
    return Tokenizer(load_vocabulary(Path(folder)))


def shared_tokenizer(folders: Sequence[tuple[str, str]]) -> Tokenizer:
    """Load the one tokenizer of several models, which exchange token ids. `folders`: (flag, folder) of each.

    Raises InputError, naming two folders, where their tokenizers turn a text into different ids, and for a model with
    fewer embeddings than the tokenizer has ids. Models of different sizes may share a tokenizer.
    """
    (first_flag, first), *_ = folders
    tokenizer, seen = load_tokenizer(first), {Path(first).resolve()}
    for flag, folder in folders:
        if Path(folder).resolve() not in seen:
            seen.add(Path(folder).resolve())
            if not _same_ids(load_tokenizer(folder).vocabulary, tokenizer.vocabulary):
                raise InputError(
                    f"{flag} {folder}: has another tokenizer than {first_flag} {first}, so that the same ids would "
                    "mean other texts; name models that were trained with one tokenizer"
                )
        check_rows(tokenizer, flag, folder)
    return tokenizer


def _same_ids(one: Vocabulary, other: Vocabulary) -> bool:
    """Whether two vocabularies turn every text into the same ids. The hash of a large one takes seconds."""
    same_files = one.files == other.files and (one.bos, one.eos) == (other.bos, other.eos)
    return same_files or one.identity == other.identity


def check_rows(tokenizer: Tokenizer, flag: str, folder: str) -> None:
    """Raise InputError if a folder's config.json says fewer embeddings than the tokenizer has ids."""
    path = Path(folder) / "config.json"
    config = read_json(path) if path.is_file() else None  # a folder of a tokenizer alone has none
    rows = config.get("vocab_size") if isinstance(config, dict) else None
    if isinstance(rows, int) and rows < tokenizer.size:  # anything but a number is refused where the model is read
        raise InputError(
            f"{flag} {folder}: config.json says vocab_size {rows}, but the tokenizer has {tokenizer.size} ids; use the "
            "model's own tokenizer"
        )


def train_tokenizer(texts: Iterable[str], vocab: int, seed: int) -> Tokenizer:
    """Train a BPE tokenizer with byte fallback and a pad piece, on complete prompts and responses.

    Text is not normalised and gets no leading space, so that decoding restores it exactly. `vocab` is the largest
    number of pieces; a small corpus yields fewer. Raises InputError where it is too small for the texts' characters.
    """
    out = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
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
            num_threads=1,  # so that the result does not depend on the number of cores
            minloglevel=2,
        )
    except RuntimeError as e:
        needed = re.search(r"smaller than required_chars. \d+ vs (\d+)", str(e))
        if not needed:
            raise
        raise InputError(f"--vocab {vocab}: the characters of the texts alone need {needed[1]} pieces") from None
    return Tokenizer(Sentencepiece(TokenizerFiles("the new tokenizer", {MODEL: out.getvalue()})))
