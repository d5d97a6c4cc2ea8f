"""Models for a notebook: load a folder; generate, score, and look at log-probs (docs/library.md).

Each call computes as a stage would with the model's device and precision, and leaves the settings of torch as it found
them. So models on different devices live beside each other, and beside other code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar, get_args, overload

import torch
from torch import Tensor

from mpo.config import Range
from mpo.data.batches import Pair, encode, make_batch
from mpo.data.formats import rows_of
from mpo.data.rows import Row, Unusable, as_object
from mpo.data.tokenizer import Tokenizer, check_rows, load_tokenizer
from mpo.data.typed import FORMS, as_response, as_row_prompt, prompt_ids, room_for_prompts
from mpo.model.checkpoint import load_model, load_scalar
from mpo.model.generate import Sampling, generate
from mpo.model.hf_config import is_reward_model
from mpo.model.llama import Llama, ScalarModel
from mpo.model.logprobs import compare, response_logprobs, sequence_logps
from mpo.model.scoring import each_batch, rm_tokenizer, score, score_all
from mpo.preference.logps import pair_logps, reference_logps
from mpo.preference.losses import PairLogps
from mpo.runtime import device as devices
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json
from mpo.runtime.manifest import MANIFEST, is_stage
from mpo.runtime.output import counts_text, note, table
from mpo.runtime.seeding import generator
from mpo.runtime.setup import computing
from mpo.tools import hub

Form = Literal["dialogue", "post", "text"]
Precision = Literal["fp32", "bf16-mixed", "bf16"]
Item = Mapping[str, Any]
"""A preference pair in any format of docs/data.md, such as {"prompt", "chosen", "rejected"}."""
R = TypeVar("R", bound=tuple[Any, ...])
ROWS = 32  # sampled or scored at once


class TokenLogp(NamedTuple):
    """A token of a response, and its log-prob in nats."""

    token: str
    logp: float


class TokenKL(NamedTuple):
    """A token of a response under a policy and a reference, in nats."""

    token: str
    logp: float
    ref_logp: float
    kl: float  # exact KL(policy || reference) of the distribution that the token was drawn from


class Table(list[R]):
    """A list of tuples that is shown as a table."""

    def __repr__(self) -> str:
        """The table as text, one line for each tuple."""
        if not self:
            return "[]"
        header = getattr(self[0], "_fields", ())
        return table(header, [[f"{x:.3f}" if isinstance(x, float) else repr(x) for x in row] for row in self])


@dataclass(frozen=True, repr=False, eq=False)
class _Loaded:
    """A model in memory with the tokenizer of its folder."""

    folder: Path
    tokenizer: Tokenizer
    device: str
    precision: Precision
    form: Form  # of the prompt that a plain text becomes

    @classmethod
    def load(
        cls, folder: str | Path, device: str = "auto", precision: Precision = "fp32", form: Form = "dialogue"
    ) -> Self:
        """`mpo.load` where the kind of the model is known, to a type checker, too. Raises InputError for the other."""
        loaded = load(folder, device, precision, form)
        if not isinstance(loaded, cls):
            raise InputError(f"{folder}: is a {type(loaded).__name__}, not a {cls.__name__}")
        return loaded

    @property
    def results(self) -> dict[str, Any]:
        """The final numbers of the stage that wrote the folder; empty if no stage has."""
        manifest = self.folder / MANIFEST
        return dict(read_json(manifest)["results"]) if is_stage(self.folder) and manifest.is_file() else {}

    def __str__(self) -> str:
        return str(self.folder)

    def _here(self) -> AbstractContextManager[None]:
        """Compute where the model is, as precisely as it was loaded, and give everything back."""
        return computing(self.device, self.precision)

    def _prompts(self, prompts: list[str], room: int) -> list[list[int]]:
        """The ids of prompts. A dialogue that has no room loses its oldest turns, and a note says so.

        Raises InputError, which names the prompt by its place, for one that cannot be used.
        """
        encoded = []
        for i, text in enumerate(prompts):
            try:
                ids, cut = prompt_ids(as_row_prompt(self.form, text), self.tokenizer, room)
            except Unusable as e:
                raise InputError(f"prompt {i}: {e}: {text!r:.60}") from None
            if cut:
                note(f"prompt {i}: its {cut} oldest turns are left out, since the model has room for {room} tokens")
            encoded.append(ids)
        return encoded

    def _sequences(
        self, prompt: str | list[str], response: str | list[str], most: int
    ) -> list[tuple[list[int], list[int]]]:
        """Prompts and complete responses as ids, of at most `most` tokens together. Raises InputError."""
        responses = [response] if isinstance(response, str) else list(response)
        prompts = [prompt] * len(responses) if isinstance(prompt, str) else list(prompt)
        if isinstance(response, str) and not isinstance(prompt, str):
            raise InputError("several prompts need a list of responses, one for each")
        if len(prompts) != len(responses):
            raise InputError(f"{len(prompts)} prompts and {len(responses)} responses: give each prompt its response")
        sequences = []
        for text, answer in zip(prompts, responses, strict=True):
            ids = self.tokenizer.response_ids(as_response(answer))
            if len(ids) > most - 2:
                raise InputError(f"{answer!r:.60}: {len(ids)} tokens, of which the model takes at most {most - 2}")
            (before,) = self._prompts([text], most - len(ids))
            sequences.append((before, ids))
        return sequences

    def _pairs(self, rows: Sequence[Item], most: int) -> list[Pair]:
        """Rows as token ids. Raises InputError where any of them makes no pair, so that results are in their order."""
        parsed = parse(rows)
        pairs, counts = encode(parsed, self.tokenizer, most, most)
        if len(pairs) < len(rows):
            raise InputError(f"not all of the rows can be used: {counts_text(counts)}; leave the others out")
        longest = max(pairs, key=_length)
        if _length(longest) > most:
            raise InputError(f"row {longest.row.id}: {_length(longest)} tokens; the model takes at most {most}")
        return pairs


def _length(pair: Pair) -> int:
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def parse(rows: Sequence[Item]) -> list[Row]:
    """Preference pairs as rows. Raises InputError, which names the row by its place, where one makes no pair."""
    dropped = Counter[str]()
    _, parsed = rows_of(
        ((f"rows[{i}]", as_object(f"rows[{i}]", r)) for i, r in enumerate(rows)), "rows", "row", dropped
    )
    if dropped:
        raise InputError(f"not all of the rows make pairs: {counts_text(dropped)}; leave the others out")
    return parsed


@dataclass(frozen=True, repr=False, eq=False)
class Policy(_Loaded):
    """A language model with its tokenizer and, if it has one, its chat template."""

    model: Llama = field(kw_only=True)

    def __repr__(self) -> str:
        return f"Policy({self.folder}: {_size(self.model)}, {self.precision} on {self.device})"

    @overload
    def generate(self, prompt: str, max_new: int = 96, temperature: float = 0.7, seed: int = 1) -> str: ...

    @overload
    def generate(self, prompt: list[str], max_new: int = 96, temperature: float = 0.7, seed: int = 1) -> list[str]: ...

    def generate(
        self, prompt: str | list[str], max_new: int = 96, temperature: float = 0.7, seed: int = 1
    ) -> str | list[str]:
        """Answer a prompt, or each of several.

        Args:
            prompt: a question, which becomes the user's turn of a dialogue (or see `form` of `load`); or a dialogue
                or post in the form of the rows, which stays as it is. A list gives a list.
            max_new: response tokens at most; a longer response is broken off there.
            temperature: divides the logits; 0: always the likeliest token.
            seed: the same seed gives the same answers.

        Raises InputError for a prompt without room, and for a number outside its range.
        """
        in_range("max_new", max_new, Range(1))
        in_range("temperature", temperature, Range(0))
        room = room_for_prompts(self.model.config.max_position_embeddings, max_new, ("max_new", str(self.folder)))
        prompts = self._prompts([prompt] if isinstance(prompt, str) else prompt, room)
        if not prompts:
            return []
        sampling = Sampling(max_new, temperature, self.tokenizer.eos, rows=ROWS)
        with self._here():
            samples = generate(self.model, prompts, sampling, generator(seed, "library"))
        answers = [self.tokenizer.decode(ids).strip() for ids in samples.responses]
        return answers[0] if isinstance(prompt, str) else answers

    @overload
    def logp(self, prompt: str, response: str) -> float: ...

    @overload
    def logp(self, prompt: str | list[str], response: list[str]) -> list[float]: ...

    def logp(self, prompt: str | list[str], response: str | list[str]) -> float | list[float]:
        """Log-prob in nats of a complete response, its EOS included. Several responses, to one prompt or to several,
        give a list.

        Raises InputError for texts without room.
        """
        sequences = self._sequences(prompt, response, self.model.config.max_position_embeddings)
        if not sequences:
            return []
        with self._here():
            logps = each_batch(sequences, ROWS, "logp", lambda part: sequence_logps(self.model, make_batch(part)))
        return logps.tolist() if not isinstance(response, str) else float(logps[0])

    @overload
    def tokens(self, prompt: str, response: str) -> Table[TokenLogp]: ...

    @overload
    def tokens(self, prompt: str, response: str, ref: Policy) -> Table[TokenKL]: ...

    def tokens(self, prompt: str, response: str, ref: Policy | None = None) -> Table[TokenLogp] | Table[TokenKL]:
        """Each token of a complete response with its log-prob. A reference adds its own, and the exact KL to it.

        The log-probs add up to `logp`. Raises InputError for texts without room, and for a reference with another
        tokenizer or on another device.
        """
        ((before, ids),) = self._sequences(prompt, response, self.model.config.max_position_embeddings)
        texts = [self.tokenizer.vocabulary.decode([i]) for i in ids]
        with self._here(), torch.no_grad():
            batch = make_batch([(before, ids)])
            if ref is None:
                logps = response_logprobs(self.model, batch).logp[0].tolist()
                return Table(map(TokenLogp, texts, logps))
            self._check_reference(ref)
            both = compare(self.model, ref.model, batch)
            columns = (column[0].tolist() for column in (both.logp, both.ref_logp, both.kl))
            return Table(map(TokenKL, texts, *columns))

    def pair_logps(self, rows: Sequence[Item], ref: Policy | None = None) -> PairLogps:
        """What a preference loss needs of some rows: `mpo.losses.sigmoid(policy.pair_logps(rows, ref), beta=0.1)`.

        Args:
            rows: preference pairs, all in one format of docs/data.md.
            ref: the reference; without it, its log-probs are 0, as for losses that need none.

        Returns tensors (B,), in the order of the rows. They are differentiable in the weights of `model`, except
        within torch.no_grad(). Raises InputError for rows that make no pair or do not fit.
        """
        pairs = self._pairs(rows, self.model.config.max_position_embeddings)
        if ref is not None:
            self._check_reference(ref)
        with self._here():
            known = reference_logps(ref.model, pairs, ROWS) if ref else {}
            return pair_logps(self.model, pairs, known)

    def _check_reference(self, ref: Policy) -> None:
        if not self.tokenizer.same_as(ref.tokenizer):
            raise InputError(f"{ref}: has another tokenizer or chat template than {self}")
        if (self.device, self.precision) != (ref.device, ref.precision):
            raise InputError(f"{ref}: is on another device or in another precision than {self}; load both alike")


@dataclass(frozen=True, repr=False, eq=False)
class RewardModel(_Loaded):
    """A reward model with the tokenizer that it reads."""

    model: ScalarModel = field(kw_only=True)

    def __repr__(self) -> str:
        return f"RewardModel({self.folder}: {_size(self.model)}, {self.precision} on {self.device})"

    @overload
    def score(self, prompt: str, response: str) -> float: ...

    @overload
    def score(self, prompt: str | list[str], response: list[str]) -> list[float]: ...

    def score(self, prompt: str | list[str], response: str | list[str]) -> float | list[float]:
        """The reward of a complete response. Several responses, to one prompt or to several, give a list.

        A reward model of this project gives scores in standard deviations, around the mean of chosen responses.
        Raises InputError for texts without room.
        """
        sequences = self._sequences(prompt, response, self.model.config.max_position_embeddings)
        if not sequences:
            return []
        with self._here():
            scores = each_batch(sequences, ROWS, "score", lambda part: score(self.model, make_batch(part)))
        return scores.tolist() if not isinstance(response, str) else float(scores[0])

    def gaps(self, rows: Sequence[Item]) -> Tensor:
        """r(chosen) - r(rejected) of each row, (N,), which `mpo.split_by_gap` divides into easy and hard pairs.

        Raises InputError for rows that make no pair or do not fit.
        """
        pairs = self._pairs(rows, self.model.config.max_position_embeddings)
        with self._here():
            chosen, rejected = score_all(self.model, pairs, ROWS)
        return chosen - rejected


def load(
    folder: str | Path, device: str = "auto", precision: Precision = "fp32", form: Form = "dialogue"
) -> Policy | RewardModel:
    """Load a model: a `RewardModel` if config.json names a head for sequence classification, otherwise a `Policy`.

    Args:
        folder: in the Hugging Face layout, from any stage of this project or from elsewhere (docs/models.md).
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.
        precision: fp32; bf16-mixed (matrix products in bf16) or bf16 (weights, too).
        form: what a plain text becomes: the user's turn of a dialogue; a post to summarise, "r/SUBREDDIT | TITLE |
            POST"; or "text": it stays as it is.

    Raises InputError, in one line, for a folder that is missing, damaged or not supported.
    """
    folder = Path(folder)
    for name, value, known in (("precision", precision, get_args(Precision)), ("form", form, FORMS)):
        if value not in known:
            raise InputError(f"{name}={value!r}: expected one of {', '.join(known)}")
    _check_folder(folder)
    with computing(device, precision):
        common: dict[str, Any] = {"folder": folder, "device": str(devices.current()), "precision": precision}
        if is_reward_model(folder / "config.json"):
            tokenizer, rm = rm_tokenizer(str(folder)), load_scalar(folder).eval()
            return RewardModel(**common, form=form, tokenizer=tokenizer, model=rm)
        tokenizer, model = load_tokenizer(folder), load_model(folder).eval()
        check_rows(tokenizer, "load", str(folder))
        return Policy(**common, form=form, tokenizer=tokenizer, model=model)


def _check_folder(folder: Path) -> None:
    """Raise InputError for a folder that is not there or holds models rather than being one."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder{hub.advice('model', str(folder))}")
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; name one of the models in it: {', '.join(inside)}" if inside else ""
        raise InputError(f"{folder}: holds no config.json, so it is not a model{hint}")


def in_range(name: str, value: float, bounds: Range) -> None:
    """Raise InputError for a number outside its range."""
    if not bounds.has(value):
        raise InputError(f"{name}={value}: must be {bounds}")


def _size(model: Llama | ScalarModel) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters"
