"""Turn prompts and responses into token ids, and train a sentencepiece tokenizer.

Special tokens are added here or, for a model with a chat template, in turns.py. Here, BOS comes once, before a prompt,
if the model's texts begin with one, and EOS after a complete response. Prompt and response are tokenised separately
and their ids joined. So the boundary is the same in training, sampling and scoring.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Literal

import sentencepiece

from mpo.data.chat_template import ChatTemplate, Choice, record_of, recorded_choice, template_source, uses_date
from mpo.data.tokenizer_files import CONFIG, MODEL, OF_SPECIALS, RECORD, TokenizerFiles
from mpo.data.turns import Turns
from mpo.data.vocabulary import Sentencepiece, Vocabulary, load_vocabulary
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, write_bytes

# Each of these strings has a token of its own, which no other text is encoded into.
TURNS = ("\n\nHuman:", "\n\nAssistant:")
POST_PARTS = ("SUBREDDIT:", "\n\nTITLE:", "\n\nPOST:", "\n\nTL;DR:")


class Tokenizer:
    """A vocabulary (vocabulary.py) with the rules for special tokens, or with `turns`, which a chat template writes."""

    def __init__(self, vocabulary: Vocabulary, turns: Turns | None = None):
        self.vocabulary, self.turns = vocabulary, turns
        self.size, self.eos = vocabulary.size, turns.eos if turns else vocabulary.eos
        self.bos = self.eos if vocabulary.bos == vocabulary.eos else vocabulary.bos
        self.pad = None if vocabulary.pad == self.eos else vocabulary.pad

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids of the prompt, after BOS if the model's texts begin with it. Never empty.

        Raises Unusable for a prompt that the chat template refuses.
        """
        if self.turns:
            return self.turns.prompt_ids(prompt)
        ids = self.vocabulary.encode(prompt)
        return ids if ids and not self.vocabulary.begins else [self.bos, *ids]

    def response_ids(self, response: str, finished: bool = True) -> list[int]:
        """The ids of a complete response, then EOS. Not finished: without EOS, and perhaps none at all."""
        if self.turns:
            return self.turns.response_ids(response, finished)
        return [*self.vocabulary.encode(response), *[self.eos] * finished]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a response, up to EOS and without special tokens. A leading space is kept."""
        kept = list[int]()
        for i in ids:
            if i == self.eos:
                break
            if i not in (self.bos, self.pad) and i < self.size:  # a model may have more embeddings than pieces
                kept.append(int(i))
        text = self.vocabulary.decode(kept)
        return self.turns.text_of(text) if self.turns else text

    def record_none(self) -> None:
        """Record among the files that dialogues are written without the chat template, if there is one."""
        if template_source(TokenizerFiles("the tokenizer", self.vocabulary.files)) is not None:
            self.vocabulary.files = self.vocabulary.files | {RECORD: record_of(Choice("none"))}

    def same_as(self, other: Tokenizer) -> bool:
        """Whether both turn every row into the same ids."""
        return _same_ids(self.vocabulary, other.vocabulary) and _same_turns(self.turns, other.turns)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, chat templates included, into a folder."""
        for name, content in self.vocabulary.files.items():
            write_bytes(folder / name, content)

    def save_padded(self, folder: Path) -> int | None:
        """Write the files so that other programs pad with a token that ends no text; returns its id, None without one.

        They look for the last token of a text by comparing ids with the pad token's. If that were EOS, they would miss
        the end of every text.
        """
        files = TokenizerFiles("the tokenizer", dict(self.vocabulary.files))
        named = files.special("pad", files.read_elsewhere)
        text = self._padding(files, named)
        for name in (CONFIG, OF_SPECIALS) if text is not None and text != named else ():
            entries = files.read(name)
            if name == CONFIG or "pad_token" in entries:
                files.content[name] = json.dumps(entries | {"pad_token": text}, indent=2, ensure_ascii=False).encode()
        for name, content in files.content.items():
            write_bytes(folder / name, content)
        return None if text is None else self.vocabulary.specials[text].id

    def _padding(self, files: TokenizerFiles, named: str | None) -> str | None:
        """The token to pad with: pad, or unknown, or a special token that the chat template does not write, or BOS."""
        ids = {text: token.id for text, token in self.vocabulary.specials.items() if token.special}
        usual = [text for text, id in ids.items() if id == self.pad]
        template, bos = template_source(files) or "", [text for text, id in ids.items() if id == self.bos]
        others = sorted(ids.keys() - bos, key=lambda text: ("pad" not in text, text in template, ids[text]))
        return next(
            (text for text in (named, *usual, *others, *bos) if ids.get(text or "", self.eos) != self.eos), None
        )


def load_tokenizer(folder: str | Path, template: Literal["auto", "none"] = "auto", to_end: bool = False) -> Tokenizer:
    """Load the tokenizer of a model or tokenizer folder, with its chat template, if it has one.

    template: none does without; auto does so only if the run that wrote the folder did. to_end: see `Turns`. Raises
    InputError as `load_vocabulary` does, and for a template that cannot be used.
    """
    vocabulary = load_vocabulary(Path(folder))
    files = TokenizerFiles(str(folder), vocabulary.files)
    source, choice = template_source(files), recorded_choice(files)
    if source is None or "none" in (template, choice.template):
        return Tokenizer(vocabulary)
    if uses_date(source) and not choice.date:
        choice = Choice(date=date.today().isoformat())
        vocabulary.files = vocabulary.files | {RECORD: record_of(choice)}  # so that every later stage sees this day
    return Tokenizer(vocabulary, Turns(ChatTemplate(source, files, choice.date), vocabulary, to_end))


def shared_tokenizer(folders: Sequence[tuple[str, str]]) -> Tokenizer:
    """Load the one tokenizer of several models, which exchange token ids. `folders`: (flag, folder) of each.

    Raises InputError, naming two folders, where their tokenizers turn a text into different ids, and for a model with
    fewer embeddings than the tokenizer has ids; also where one writes dialogues with another chat template, unless the
    first is --tokenizer, which decides. Models of different sizes may share a tokenizer.
    """
    (first_flag, first), *_ = folders
    tokenizer, seen = load_tokenizer(first), {Path(first).resolve()}
    for flag, folder in folders:
        if Path(folder).resolve() not in seen:
            seen.add(Path(folder).resolve())
            other = load_tokenizer(folder)
            if not _same_ids(other.vocabulary, tokenizer.vocabulary):
                raise InputError(
                    f"{flag} {folder}: has another tokenizer than {first_flag} {first}, so that the same ids would "
                    "mean other texts; name models that were trained with one tokenizer"
                )
            if first_flag != "--tokenizer" and not _same_turns(other.turns, tokenizer.turns):
                raise InputError(
                    f"{flag} {folder}: writes a dialogue with another chat template than {first_flag} {first}, or one "
                    "of them without; name models that were trained with one form of dialogue"
                )
        check_rows(tokenizer, flag, folder)
    return tokenizer


def _same_turns(one: Turns | None, other: Turns | None) -> bool:
    """Whether two tokenizers write dialogues in the same form."""
    return one is other if one is None or other is None else one.same_as(other)


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
