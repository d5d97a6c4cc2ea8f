"""The formats that pairs come in: each is recognised, and becomes the rows that it means."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from mpo.data import formats
from mpo.data.formats import FORMATS, read_file, recognised
from mpo.data.rows import Row
from mpo.runtime.errors import InputError
from tests.conftest import SHARED, needs_shared
from tests.data.test_rows import write
from tests.support.scripts import ROOT

ASK = "\n\nHuman: Name a colour.\n\nAssistant:"
USER, BLUE, DOG = (
    {"role": role, "content": text}
    for role, text in (("user", "Name a colour."), ("assistant", "Blue."), ("assistant", "Dog."))
)
THEIRS = {"from": "human", "value": "Name a colour."}
GPT = {"from": "gpt", "value": "Blue."}, {"from": "gpt", "value": "Dog."}
SYSTEM = {"role": "system", "content": "Be kind."}
PAIR = {"chosen": " Blue.", "rejected": " Dog."}
MODELS = {"chosen_model": "a", "rejected_model": "b", "id": 7, "rejected": "Dog."}
POST = {"post": "I fell.", "title": "Help", "subreddit": "advice"}

EXAMPLES = [  # (format, object, the row's prompt)
    ("rows of this project", {"id": "x", "prompt": "As it is ", **PAIR}, "As it is "),
    ("rows of this project", {"domain": None, "prompt": "As it is ", **PAIR}, "As it is "),
    ("TRL pairs", {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Dog."}, ASK),
    ("TRL pairs", {"prompt": ASK, **PAIR}, ASK),
    ("RewardBench pairs", {"prompt": "Name a colour.", "subset": "hep-go", **MODELS, "chosen": "Blue."}, ASK),
    ("TRL pairs", {"prompt": "Long text.\n\nTL;DR:", **PAIR}, "Long text.\n\nTL;DR:"),
    ("TRL message pairs", {"prompt": [USER], "chosen": [BLUE], "rejected": [DOG]}, ASK),
    ("TRL message pairs", {"prompt": [SYSTEM, USER], "chosen": [BLUE], "rejected": [DOG]}, "Be kind." + ASK),
    ("TRL message pairs", {"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, DOG]}, ASK),
    ("TRL message pairs", {"prompt": [USER], "chosen": "Blue.", "rejected": "Dog."}, ASK),
    ("TRL message pairs without a prompt", {"chosen": [USER, BLUE], "rejected": [USER, DOG]}, ASK),
    ("TRL pairs without a prompt", {"chosen": "A colour is Blue.", "rejected": "A colour is Dog."}, "A colour is"),
    (
        "UltraFeedback pairs",
        {"prompt": "Name a colour.", "prompt_id": "0", "chosen": [USER, BLUE], "rejected": [USER, DOG]},
        ASK,
    ),
    ("UltraFeedback pairs", {"prompt": "Name a colour.", "chosen": [BLUE], "rejected": [DOG]}, ASK),
    ("UltraFeedback pairs", {"prompt": ASK, "chosen": [BLUE], "rejected": [DOG]}, ASK),
    ("Alpaca pairs", {"instruction": "A text.\n\nTL;DR:", "system": "", "history": [], **PAIR}, "A text.\n\nTL;DR:"),
    ("ShareGPT pairs", {"conversations": [THEIRS], "chosen": GPT[0], "rejected": GPT[1]}, ASK),
    ("ShareGPT pairs", {"messages": [USER], "chosen": BLUE, "rejected": DOG, "system": "Be kind."}, "Be kind." + ASK),
    ("Alpaca pairs", {"instruction": "Name a colour.", "input": "", "chosen": "Blue.", "rejected": "Dog."}, ASK),
    (
        "Alpaca pairs",
        {"instruction": "Name", "input": "a colour.", "chosen": "Blue.", "rejected": "Dog."},
        ASK.replace("Name a", "Name\na"),
    ),
    (
        "Alpaca pairs",
        {"instruction": "Name a colour.", "history": [["Hi", "Yes?"]], "system": "Be kind.", **PAIR},
        "Be kind.\n\nHuman: Hi\n\nAssistant: Yes?" + ASK,
    ),
    ("Alpaca output pairs", {"instruction": "Name a colour.", "input": None, "output": ["Blue.", "Dog."]}, ASK),
    ("HH pairs", {"chosen": ASK + " Blue.", "rejected": ASK + " Dog."}, ASK),
    (
        "TL;DR comparisons",
        {"info": POST, "summaries": [{"text": "Dog."}, {"text": "Blue."}], "choice": 1},
        "SUBREDDIT: r/advice\n\nTITLE: Help\n\nPOST: I fell.\n\nTL;DR:",
    ),
]


def read(path, *items):
    dropped: Counter[str] = Counter()
    name, rows = read_file(write(path / "data.jsonl", *items), dropped)
    return name, rows, dict(dropped)


@pytest.mark.parametrize(("name", "item", "prompt"), EXAMPLES)
def test_each_format_is_recognised_and_read(tmp_path, name, item, prompt):
    found, rows, dropped = read(tmp_path, item)
    assert (found, dropped) == (name, {})
    assert [(row.prompt, row.chosen, row.rejected) for row in rows] == [(prompt, " Blue.", " Dog.")]


def test_every_format_has_an_example_here_and_on_the_page():
    assert {name for name, *_ in EXAMPLES} == set(FORMATS)
    page = (ROOT / "docs" / "data.md").read_text()
    shown = dict(re.findall(r"^### ([^\n]+)\n.*?```json\n(.*?)```", page, re.MULTILINE | re.DOTALL))
    assert {name: recognised(json.loads(example)) for name, example in shown.items()} == {n: n for n in FORMATS}


def test_rows_of_this_project_are_never_altered(tmp_path):
    item = {"id": "x", "prompt": "Human: Hi ", "chosen": "Blue. ", "rejected": "\n\nHuman: Dog", "noise": 0.1}
    _, rows, _ = read(tmp_path, item, {**item, "id": None}, {k: v for k, v in item.items() if k != "id"})
    texts = {(row.prompt, row.chosen, row.rejected, row.noise) for row in rows}
    assert texts == {("Human: Hi ", "Blue. ", "\n\nHuman: Dog", 0.1)}
    assert [row.id for row in rows] == ["x", "data-1", "data-2"]


def test_other_formats_keep_id_domain_and_margin(tmp_path):
    item = {"prompt": [USER], "chosen": [BLUE], "rejected": [DOG], "id": 7, "domain": "d", "margin": 2}
    _, rows, _ = read(tmp_path, item)
    assert rows == [Row("7", ASK, " Blue.", " Dog.", "d", 2.0)]
    with pytest.raises(InputError, match=r"data.jsonl:2: has the same id as \S*data.jsonl:1, '7'"):
        read(tmp_path, item, item)


@pytest.mark.parametrize(
    ("scores", "margin"),
    [((9, 2.5), 6.5), ((5, 5), 0), ((3, 4), 0), ((9, None), None), ((None, None), None)],
)
def test_the_margin_comes_from_the_scores(tmp_path, scores, margin):
    item = {"chosen": [USER, BLUE], "rejected": [USER, DOG], "score_chosen": scores[0], "score_rejected": scores[1]}
    assert read(tmp_path, item)[1][0].margin == margin


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"prompt": [USER], "chosen": [BLUE], "rejected": [BLUE]}, "same response twice"),
        ({"prompt": [USER], "chosen": "Blue.", "rejected": " Blue.\n"}, "same response twice"),
        ({"id": "x", "prompt": "p", "chosen": "Blue.", "rejected": " Blue.\n"}, "same response twice"),
        ({"chosen": ASK + " Blue.", "rejected": ASK + " Blue. "}, "same response twice"),
        ({"chosen": "Blue sky", "rejected": "Blue sky "}, "same response twice"),
        ({"prompt": [USER], "chosen": [BLUE], "rejected": [{**DOG, "content": " "}]}, "empty response"),
        ({"id": "x", "prompt": "p", "chosen": " a", "rejected": " \n"}, "empty response"),
        ({"chosen": "The sky is", "rejected": "The sky "}, "empty response"),
        ({"id": "x", "prompt": "\n", **PAIR}, "blank prompt"),
        ({"prompt": " ", **PAIR}, "blank prompt"),
        ({"instruction": "", "input": "", **PAIR}, "blank prompt"),
        ({"chosen": "Blue.", "rejected": "Dog."}, "blank prompt"),
        ({"prompt": [{**USER, "content": ""}], "chosen": [BLUE], "rejected": [DOG]}, "blank prompt"),
        ({"chosen": [USER, BLUE], "rejected": [{**USER, "content": "Else?"}, DOG]}, "prompts differ"),
        ({"prompt": "Else?", "chosen": [USER, BLUE], "rejected": [USER, DOG]}, "prompts differ"),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, BLUE], "rejected": [USER, DOG]}, "prompts differ"),
        ({"chosen": [USER, BLUE, USER], "rejected": [USER, DOG, USER]}, "the last turn is not the assistant's"),
        ({"prompt": [USER], "chosen": [], "rejected": [DOG]}, "the last turn is not the assistant's"),
        ({"prompt": [USER, BLUE], "chosen": [BLUE], "rejected": [DOG]}, "the prompt does not end with the user's turn"),
        ({"chosen": [BLUE], "rejected": [DOG]}, "the prompt does not end with the user's turn"),
        (
            {"prompt": [{**USER, "content": "a\n\nHuman: b"}], "chosen": [BLUE], "rejected": [DOG]},
            "a turn within the text of a turn",
        ),
        ({"instruction": "a\n\nAssistant: b\n\nHuman: c", **PAIR}, "a turn within the text of a turn"),
        ({"prompt": [USER], "chosen": "a\n\nHuman: b\n\nAssistant: c", "rejected": "d"}, "a turn within a response"),
        ({"prompt": [{"role": "tool", "content": "1"}, USER], **PAIR}, "a message from or to a tool"),
        ({"prompt": [USER], "chosen": [{**BLUE, "content": None}], "rejected": [DOG]}, "a message without text"),
        (
            {"prompt": [{**USER, "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}], **PAIR},
            "a message that is not text alone",
        ),
    ],
)
def test_what_makes_no_pair_is_dropped_and_counted(tmp_path, item, reason):
    assert read(tmp_path, item)[1:] == ([], {reason: 1})


def test_the_parts_of_a_message_are_joined(tmp_path):
    content = [{"type": "text", "text": "Name"}, {"type": "text", "text": "a colour."}]
    item = {"prompt": [{"role": "user", "content": content}], "chosen": [BLUE], "rejected": [DOG]}
    assert read(tmp_path, item)[1][0].prompt == ASK.replace("Name a", "Name\na")


MESSAGES = {"prompt": [USER], "chosen": [BLUE], "rejected": [DOG]}
TEXTS = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Dog."}
OWN = {"id": "x", "prompt": "p", **PAIR}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (MESSAGES, TEXTS, "one of the TRL pairs, but the file begins with TRL message pairs"),
        (TEXTS, MESSAGES, "one of the TRL message pairs, but the file begins with TRL pairs"),
        (OWN, {"chosen": ASK + " a", "rejected": ASK + " b"}, "one of the HH pairs, but the file begins with rows of"),
        (TEXTS, OWN, "one of the rows of this project, but the file begins with TRL pairs"),
        (OWN, {"id": "y", "prompt": "p", "chosen": "a"}, "field 'rejected' is missing"),
        (MESSAGES, {"prompt": [USER], "chosen": [BLUE]}, "field 'rejected' is missing"),
        (
            MESSAGES,
            {"prompt": [3], "chosen": [BLUE], "rejected": [DOG]},
            "field 'prompt' must hold messages .* not int",
        ),
        (MESSAGES, {**MESSAGES, "chosen": [{"text": "a"}]}, r"field 'chosen' must hold .* not dict of text \(str\)"),
        (MESSAGES, {**MESSAGES, "chosen": [{"role": "wizard", "content": "a"}]}, "unknown role 'wizard'"),
        (MESSAGES, {**MESSAGES, "chosen": [{"role": "user", "content": 5}]}, "a message whose text is int"),
        (MESSAGES, {**MESSAGES, "margin": "big"}, "field 'margin' is 'big', not a finite number"),
        (MESSAGES, {**MESSAGES, "score_chosen": "x"}, "field 'score_chosen' is 'x', not a finite number"),
        (MESSAGES, {**MESSAGES, "noise": 0.7}, "field 'noise' is 0.7"),
        (MESSAGES, {**MESSAGES, "prompt": [{"role": "user", "content": "\ud800"}]}, "not valid Unicode"),
        (TEXTS, {"prompt": "p", "chosen": "a", "rejected": None}, "field 'rejected' is NoneType, not a string"),
        (
            {"instruction": "a", **PAIR},
            {"instruction": "a", "history": ["b"], **PAIR},
            "field 'history' must be a list of pairs",
        ),
        (
            {"instruction": "a", "output": ["b", "c"]},
            {"instruction": "a", "output": ["b"]},
            "field 'output' must be a list of two",
        ),
        (
            {"info": POST, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
            {"info": POST, "summaries": 3, "choice": 0},
            "field 'summaries' must be a list",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_its_line(tmp_path, first, second, message):
    with pytest.raises(InputError, match=f"data.jsonl:3: .*{message}") as refused:
        read(tmp_path, first, "", second)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("item", [{}, {"question": "x", "answers": ["a", "b"]}, {"prompt": "p", "chosen": 3}])
def test_an_unknown_format_is_refused_with_its_fields_and_all_known_formats(tmp_path, item):
    with pytest.raises(InputError, match=r"data.jsonl:2: unknown format; its fields are ") as refused:
        read(tmp_path, "", item)
    text = str(refused.value)
    assert all(name in text for name in [*item, *FORMATS])
    assert "\n" not in text
    assert "[...]" not in text  # the message is shown as a whole


def test_a_format_of_ones_own_is_a_function_and_a_line(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "data.md").read_text()
    example = re.search(r"## A format of your own\n.*?```python\n(.*?)```", page, re.DOTALL)[1]
    monkeypatch.setattr(formats, "FORMATS", dict(FORMATS))
    exec(compile(example, "docs/data.md", "exec"), {})
    item = {"question": "Name a colour.", "better": "Blue.", "worse": "Dog.", "margin": 2}
    name, rows, _ = read(tmp_path, item)
    assert name == "question pairs"
    assert rows == [Row("data-0", ASK, " Blue.", " Dog.", margin=2)]
    with pytest.raises(InputError, match=r"data.jsonl:2: field 'worse' is missing"):
        read(tmp_path, item, {"question": "x", "better": "y"})


def test_a_file_without_rows_is_refused(tmp_path):
    for text in ("", "\n\n", "\ufeff"):
        with pytest.raises(InputError, match=r"data.jsonl: contains no rows"):
            read(tmp_path, text)


@needs_shared
@pytest.mark.parametrize(
    ("name", "format_name"),
    [("ultrafeedback_like.jsonl", "UltraFeedback pairs"), ("llamafactory_like.json", "ShareGPT pairs")],
)
def test_the_cases_that_were_refused_are_read(name, format_name):
    found, rows = read_file(SHARED / "cases" / name, Counter())
    assert found == format_name
    assert [(row.prompt, row.chosen, row.rejected) for row in rows] == [(ASK, " Blue.", " Dog.")]
