"""The token ids of a dialogue that a chat template writes.

Special tokens are read in the template's own words and nowhere else. Between two of them, own words and contents are
encoded as one text, since a vocabulary may join characters across the end of a word. So the ids are those of
transformers' apply_chat_template wherever no content holds the text of a special token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from mpo.data.chat_template import MEND, ChatTemplate, Piece
from mpo.data.dialogue import Message, messages_in
from mpo.data.rows import Unusable
from mpo.data.vocabulary import Special, Vocabulary
from mpo.runtime.errors import InputError

Place = Literal["start", "special", "text"]
"""What precedes a text: nothing, a special token, or other text."""
SAMPLE: list[Message] = [("user", "Hi"), ("assistant", "Yes")]
SAME = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


class Turns:
    """A chat template with the vocabulary that encodes its texts. `eos` is the token that ends the assistant's turn."""

    def __init__(self, template: ChatTemplate, vocabulary: Vocabulary, to_end: bool = False):
        """Raises InputError for a template that cannot write a dialogue of a question and an answer.

        to_end: a response has all that the template writes after it, such as a line break, and nothing else. Otherwise
        it ends in EOS.
        """
        self.template, self.vocabulary = template, vocabulary
        self.specials: dict[str, Special] = vocabulary.specials
        longest_first = sorted(self.specials, key=len, reverse=True)
        self.special = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        try:
            prompt, whole = template.pieces(SAMPLE[:1], True), template.pieces(SAMPLE, False)
        except Unusable as e:
            raise InputError(f"{template.where} cannot write a question and its answer ({e}); {MEND}") from None
        rest = _rest(prompt, whole, template.where)
        self.response, found = self._response_form(rest)
        self.added_eos = found is None  # the template writes no token there
        self.eos = vocabulary.eos if found is None else found
        at = next(i for i, piece in enumerate(self.response) if not piece.own)
        self.before, self.after = (
            "".join(p.text for p in part) for part in (self.response[:at], self.response[at + 1 :])
        )
        self.after = self.after.removesuffix("" if self.added_eos else vocabulary.piece(self.eos))
        self.place: Place = self._encode(prompt, "start")[1]
        if to_end:
            self.response, self.added_eos = rest, False

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids of a row's prompt, up to where the assistant's turn begins. Raises Unusable as the template does."""
        return self._encode(self.template.pieces(messages_in(prompt), True), "start")[0]

    def response_ids(self, response: str, finished: bool = True) -> list[int]:
        """The ids of a complete response, which end in EOS. Space around it is removed, as in all messages.

        Not finished: they end where the response's text does.
        """
        answer = self._answer(response)
        if not finished:
            answer = answer[: 1 + next(i for i, piece in enumerate(answer) if not piece.own)]
        return self._encode(answer, self.place)[0] + [self.eos] * (self.added_eos and finished)

    def agrees(self, prompt: str, response: str) -> bool:
        """Whether the ids of prompt and response, encoded apart, begin those of the whole conversation.

        Ids before the prompt's last special token do not depend on what follows it. Raises Unusable if the template
        refuses the conversation.
        """
        messages, answer = messages_in(prompt), self._answer(response)
        begun = self.template.pieces(messages, True)
        whole = _joined(self.template.pieces([*messages, ("assistant", response.strip())], False))
        apart = _joined([*begun, *answer])
        at = len(apart) - 1  # only the last piece may go on in the whole conversation
        if len(whole) <= at or whole[:at] != apart[:at]:
            return False
        if whole[at].own != apart[at].own or not whole[at].text.startswith(apart[at].text):
            return False
        end = self._from_last_special(begun)
        ids = self._encode(end, "start")[0] + self._encode(answer, self.place)[0]
        return self._encode([*end, *answer], "start")[0] == ids

    def _answer(self, response: str) -> list[Piece]:
        return [piece if piece.own else Piece(response.strip(), False) for piece in self.response]

    def _from_last_special(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The end of these pieces, from their last special token on; all of them if there is none."""
        for i in reversed(range(len(pieces))):
            found = [*self.special.finditer(pieces[i].text)] if pieces[i].own else []
            if found:
                return [Piece(pieces[i].text[found[-1].start() :], True), *pieces[i + 1 :]]
        return list(pieces)

    def text_of(self, decoded: str) -> str:
        """The text of a response, as rows have it: without what the template puts around it, after a space."""
        return " " + decoded.removeprefix(self.before).removesuffix(self.after).lstrip()

    def same_as(self, other: Turns) -> bool:
        """Whether two templates write a dialogue in the same way."""
        return (self.prompt_ids(SAME), self.response_ids("d")) == (other.prompt_ids(SAME), other.response_ids("d"))

    def _response_form(self, rest: Sequence[Piece]) -> tuple[list[Piece], int | None]:
        """What the template writes of a response, up to the special token that ends it, and this token's id."""
        form = list[Piece]()
        for piece in rest:
            for end in self.special.finditer(piece.text) if piece.own and not all(p.own for p in form) else ():
                if self.specials[end[0]].special:
                    return [*form, Piece(piece.text[: end.end()], True)], self.specials[end[0]].id
            form.append(piece)
        while form[-1].own:  # such as line breaks after the last turn
            form.pop()
        return form, None

    def _encode(self, pieces: Sequence[Piece], place: Place) -> tuple[list[int], Place]:
        """The ids of pieces that stand at this place, and the place after them."""
        ids, text, trimmed = list[int](), "", False
        for piece in pieces:
            for part in self.special.split(piece.text) if piece.own else [piece.text]:
                special = self.specials.get(part) if piece.own else None
                if special is None:
                    text += part.lstrip() if trimmed and not text else part
                    continue
                ids += self._encode_text(text.rstrip() if special.lstrip else text, place)
                ids.append(special.id)
                text, place, trimmed = "", "special", special.rstrip
        ids += self._encode_text(text, place)
        return ids, "text" if text else place

    def _encode_text(self, text: str, place: Place) -> list[int]:
        """The ids of a text without special tokens. Some vocabularies put a space before a text, but not everywhere."""
        if not text:
            return []
        return (
            self.vocabulary.encode(text) if place == "start" else self.vocabulary.encode_after(text, place == "special")
        )


def _rest(prompt: Sequence[Piece], whole: Sequence[Piece], where: str) -> list[Piece]:
    """The pieces of `whole` after those of `prompt`. Raises InputError if it does not begin with them."""
    begun, full = ([(c, piece.own) for piece in pieces for c in piece.text] for pieces in (prompt, whole))
    rest = [Piece(c, own) for c, own in full[len(begun) :]]
    if full[: len(begun)] != begun or all(piece.own for piece in rest):
        raise InputError(f"{where} does not begin a conversation with its prompt, or leaves out the answer; {MEND}")
    return _joined(rest)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The same text, with neighbours of one kind in one piece."""
    joined = list[Piece]()
    for piece in filter(lambda piece: piece.text, pieces):
        if joined and joined[-1].own == piece.own:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.own)
        else:
            joined.append(piece)
    return joined
