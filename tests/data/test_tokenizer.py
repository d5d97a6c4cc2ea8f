"""Special tokens, boundaries and exact round trips."""

from __future__ import annotations

import json
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo.data.tokenizer import TURNS, load_tokenizer, shared_tokenizer
from mpo.data.tokenizer_files import TokenizerFiles
from mpo.data.vocabulary import Sentencepiece
from mpo.runtime.errors import InputError
from tests.conftest import STORIES, needs_stories
from tests.support.layouts import beginning_with, decoder_of, sentencepiece_model


def test_specials_are_four_different_ids(tokenizer):
    assert len({tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.vocabulary.sp.unk_id()}) == 4


def test_bos_once_eos_once(tokenizer):
    prompt = tokenizer.prompt_ids("\n\nHuman: Hi there.\n\nAssistant:")
    response = tokenizer.response_ids(" It is Paris.")
    assert prompt.count(tokenizer.bos) == 1
    assert prompt[0] == tokenizer.bos
    assert response.count(tokenizer.eos) == 1
    assert response[-1] == tokenizer.eos
    assert tokenizer.bos not in response


@pytest.mark.parametrize("turn", TURNS)
def test_a_turn_is_one_token_that_nothing_else_maps_to(tokenizer, turn):
    ids = tokenizer.vocabulary.encode(f"{turn} hello")
    assert tokenizer.vocabulary.piece(ids[0]) == turn
    assert ids[0] not in tokenizer.vocabulary.encode(turn.strip())


def test_a_response_cannot_write_eos(tokenizer):
    assert tokenizer.response_ids("</s> <s> <pad>").count(tokenizer.eos) == 1


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=60))
def test_round_trip_is_exact_on_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.response_ids(text)) == text


def test_decode_stops_at_eos(tokenizer):
    ids = [*tokenizer.response_ids(" Yes."), *tokenizer.response_ids(" No.")]
    assert tokenizer.decode(ids) == " Yes."


def test_saved_and_loaded_alike(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    text = "\n\nHuman: What is the capital of France?\n\nAssistant:"
    assert load_tokenizer(tmp_path).prompt_ids(text) == tokenizer.prompt_ids(text)


def test_transformers_reads_our_tokenizer_alike(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")  # transformers needs it to read a sentencepiece model
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("\n\nHuman: What is the capital of Peru?\n\nAssistant:", " It is Lima.", "two  spaces\nand a line"):
        assert theirs(text)["input_ids"] == tokenizer.prompt_ids(text)
    assert theirs.eos_token_id == tokenizer.eos
    assert theirs.pad_token_id == tokenizer.pad


def test_damaged_or_missing_model_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer.model: no such file"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="not a sentencepiece model"):
        Sentencepiece(TokenizerFiles("there", {"tokenizer.model": b"nonsense"}))


@needs_stories
def test_a_real_tokenizer_without_pad():
    tokenizer = load_tokenizer(STORIES)
    assert tokenizer.pad != tokenizer.eos
    assert tokenizer.decode(tokenizer.response_ids(" Once upon a time.")) == " Once upon a time."


TEXTS = (
    "\n\nHuman: What is the capital of Peru?\n\nAssistant:",
    " It is Lima.",
    "two  spaces, <|end|> and </s>\n",
    " ü ▁ 日本",
)


def byte_level(folder, **config):
    """A tokenizer.json such as Llama 3 and SmolLM2 have: byte-level BPE."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|begin|>", "<|end|>", "<|pad|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["What is the capital of Peru? It is Lima."] * 3, trainer)
    if config.get("bos_token") == "<|begin|>":
        tokenizer.post_processor = beginning_with("<|begin|>", 0)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_tokenizer_json_round_trip_and_the_same_rules(tmp_path):
    folder = byte_level(
        tmp_path / "model", bos_token="<|begin|>", eos_token={"content": "<|end|>"}, pad_token="<|pad|>"
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2)
    for text in TEXTS:
        ids = tokenizer.response_ids(text)
        assert ids.count(tokenizer.eos) == 1  # whatever the text says
        assert tokenizer.decode(ids) == text
        assert tokenizer.prompt_ids(text) == [tokenizer.bos, *ids[:-1]]
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").prompt_ids(TEXTS[0]) == tokenizer.prompt_ids(TEXTS[0])


def test_transformers_reads_the_same_from_a_tokenizer_json(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    load_tokenizer(byte_level(tmp_path / "model", **config)).save(tmp_path / "copy")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    ours = load_tokenizer(tmp_path / "copy")
    for text in (TEXTS[0], TEXTS[1], TEXTS[3]):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.prompt_ids(text)[1:]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eos_token": "<|end|>"}, (1, 1, None)),  # no BOS, no pad
        ({"eos_token": "<|end|>", "bos_token": "<|end|>", "pad_token": "<|end|>"}, (1, 1, None)),  # all the same
        ({"eos_token": "<|end|>", "unk_token": "<|pad|>"}, (1, 1, 2)),
    ],
)
def test_a_pad_token_that_is_missing_or_is_eos(tmp_path, config, expected):
    tokenizer = load_tokenizer(byte_level(tmp_path / "model", **config))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == expected
    assert tokenizer.decode(tokenizer.response_ids(" It is Lima.")) == " It is Lima."


def test_specials_by_the_models_config(tmp_path):
    folder = byte_level(tmp_path / "model")
    with pytest.raises(InputError, match="says which token is EOS"):
        load_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [1, 2], "bos_token_id": 0}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, None)
    tokenizer.save(tmp_path / "copy")  # away from the model
    again = load_tokenizer(tmp_path / "copy")
    assert (again.bos, again.eos, again.pad) == (0, 1, None)


def test_a_tokenizer_json_without_the_package_is_one_line(tmp_path, monkeypatch):
    folder = byte_level(tmp_path / "model", eos_token="<|end|>")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="needs the tokenizers package") as e:
        load_tokenizer(folder)
    assert "\n" not in str(e.value)
    monkeypatch.undo()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(folder)


# --- tokenizer.model with other files beside it -------------------------------------------------------


def sp_folder(folder, user=(), pieces=b"", **files):
    """A folder with a sentencepiece model of 400 pieces and these files, by the start of their names."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(pieces or sentencepiece_model(user))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_added_tokens_are_part_of_the_vocabulary_and_decode_to_their_text(tmp_path):
    folder = sp_folder(
        tmp_path / "model",
        added_tokens={"<|im_start|>": 401, "<|tool|>": 403},
        tokenizer_config={"added_tokens_decoder": decoder_of(400, "<|im_end|>"), "eos_token": "<|im_end|>"},
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.size, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (404, 1, 400, 0)
    one, two = (tokenizer.vocabulary.encode(text) for text in ("one", "two"))
    assert tokenizer.decode([*one, 401, 402, 403, *two, 400, *one]) == " one<|im_start|><|tool|> two"
    assert [tokenizer.vocabulary.piece(i) for i in (400, 401, 402)] == ["<|im_end|>", "<|im_start|>", ""]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<|end|>"}}, "call '<|end|>' eos_token, which the vocabulary lacks"),
        ({"special_tokens_map": {"bos_token": "<|b|>"}}, "call '<|b|>' bos_token, which the vocabulary lacks"),
        ({"added_tokens": {"<|a|>": "many"}}, "added_tokens.json: '<|a|>' has the id 'many', not a whole number"),
        ({"added_tokens": {"<|a|>": 10**9}}, "'<|a|>' has the id 1000000000, not"),
        ({"added_tokens": {"<|a|>": 400, "<|b|>": 400}}, "added token '<|b|>' has the id 400, which the other files"),
        (
            {
                "added_tokens": {"<|a|>": 400},
                "tokenizer_config": {"added_tokens_decoder": {"401": {"content": "<|a|>"}}},
            },
            "added_tokens.json: the added token '<|a|>' has the id 400, which the other files of the folder contradict",
        ),
        (
            {"tokenizer": {"added_tokens": [{"id": 1, "content": "<b>"}], "model": {"vocab": {"<s>": 1}}}},
            "id 1 is '<b>'",
        ),
        ({"tokenizer": {"model": {"vocab": {"<s>": 2}}}}, "id 2 is '</s>' in one and '<s>' in the other"),
        ({"tokenizer": {"model": {"vocab": {"new": 400}}}}, "id 400 is None in one and 'new' in the other"),
        ({"tokenizer": {"model": {"vocab": [["<unk>", 0.0], ["</s>", 0.0]]}}}, "id 1 is '<s>' in one and '</s>' in"),
        ({"tokenizer_config": ["eos"]}, "tokenizer_config.json: expected a JSON object, found list"),
    ],
)
def test_files_that_contradict_each_other_are_refused_in_one_line(tmp_path, files, message):
    with pytest.raises(InputError, match=re.escape(message)) as e:
        load_tokenizer(sp_folder(tmp_path / "model", **files))
    assert "\n" not in str(e.value)


def test_start_and_end_pieces_with_other_names_are_written_by_their_names(tmp_path):
    """Without these names, transformers would add <s> and </s> with ids beyond the vocabulary."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    model = sentencepiece_model(bos_piece="<|startoftext|>", eos_piece="<|endoftext|>", unk_piece="<|unknown|>")
    for name, files in {"bare": {}, "silent": {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}}}.items():
        load_tokenizer(sp_folder(tmp_path / name, pieces=model, **files)).save(tmp_path / f"{name}-written")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{name}-written")
        assert (theirs.bos_token, theirs.eos_token) == ("<|startoftext|>", "<|endoftext|>")
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, len(theirs)) == (1, 2, 0, 400)


MAP = {"eos_token": "<|b|>", "bos_token": "<|b|>"}


@pytest.mark.parametrize(
    ("config", "eos"),
    [
        ({"added_tokens_decoder": decoder_of(400, "<|a|>", "<|b|>"), "eos_token": "<|a|>"}, 400),
        ({"added_tokens_decoder": decoder_of(400, "<|a|>", "<|b|>")}, 401),  # which transformers would not see
        ({"eos_token": "<|a|>"}, 401),
        ({}, 401),
    ],
)
def test_of_two_files_that_name_eos_the_one_counts_that_counts_in_transformers(tmp_path, config, eos):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    files = {"tokenizer_config": config, "special_tokens_map": MAP, "added_tokens": {"<|a|>": 400, "<|b|>": 401}}
    tokenizer = load_tokenizer(sp_folder(tmp_path / "model", **files))
    assert (tokenizer.eos, tokenizer.bos) == (eos, 401)
    tokenizer.save(tmp_path / "written")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "written")
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (eos, 401, 402)


@pytest.mark.parametrize("name", ["additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("given", [["<|other|>"], [{"content": "<|other|>"}], {"other_token": "<|other|>"}])
def test_every_token_that_the_files_call_special_stays_text(tmp_path, name, given):
    files = {"tokenizer_config": {name: given}}
    vocabulary = load_tokenizer(sp_folder(tmp_path / "model", ("<|other|>", "<|usual|>"), **files)).vocabulary
    pieces = [vocabulary.piece(i) for i in vocabulary.encode("a<|other|><|usual|>")]
    assert "<|other|>" not in pieces
    assert pieces[-1] == "<|usual|>"


@pytest.mark.parametrize("special", ["<|im_end|>", "<|" + "long" * 40 + "|>"])
def test_a_special_token_that_is_an_ordinary_piece_cannot_be_written_by_a_text(tmp_path, special):
    """Sentencepiece finds user-defined pieces in every text, and EOS may be one of them."""
    files = {"tokenizer_config": {"eos_token": special}}
    closed = load_tokenizer(sp_folder(tmp_path / "model", (special, "<|other|>"), **files))
    assert closed.vocabulary.piece(closed.eos) == special
    text = f" before{special} after<|other|>"
    assert closed.eos not in closed.vocabulary.encode(text)
    assert closed.vocabulary.encode(text)[-1] == closed.vocabulary.sp.PieceToId("<|other|>")  # no special token
    assert closed.decode(closed.response_ids(text)) == text
    plain = " A text without it is encoded as before."
    opened = load_tokenizer(sp_folder(tmp_path / "plain", (special, "<|other|>")))
    assert closed.vocabulary.encode(plain) == opened.vocabulary.encode(plain)
    assert closed.vocabulary.files["tokenizer.model"] == opened.vocabulary.files["tokenizer.model"]


def test_an_eos_that_the_json_file_does_not_call_special_cannot_be_written_by_a_text(tmp_path):
    folder = byte_level(tmp_path / "model", eos_token="<|end|>", bos_token="<|begin|>")
    raw = json.loads((folder / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(folder)
    assert not {tokenizer.bos, tokenizer.eos} & set(tokenizer.vocabulary.encode("a<|end|><|begin|>"))


TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\n"


def test_a_tiktoken_file_gives_way_to_the_tokenizer_json_beside_it_and_is_refused_alone(tmp_path):
    folder = byte_level(tmp_path / "model", eos_token="<|end|>")
    expected = load_tokenizer(folder).prompt_ids(TEXTS[0])
    (folder / "tokenizer.model").write_bytes(TIKTOKEN)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.prompt_ids(TEXTS[0]) == expected
    tokenizer.save(tmp_path / "written")
    assert load_tokenizer(tmp_path / "written").prompt_ids(TEXTS[0]) == expected
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.model: a tiktoken vocabulary, which is not read"):
        load_tokenizer(folder)


def test_a_damaged_tokenizer_model_does_not_give_way(tmp_path):
    folder = byte_level(tmp_path / "model", eos_token="<|end|>")
    (folder / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="not a sentencepiece model"):
        load_tokenizer(folder)


def test_the_message_about_the_missing_package_is_a_command_that_works_here(tmp_path, monkeypatch):
    folder = byte_level(tmp_path / "model", eos_token="<|end|>")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.chdir(tmp_path)
    for python, command in (
        (tmp_path / ".venv" / "bin" / "python", ".venv/bin/python -m pip install tokenizers"),
        ("/usr/bin/python3", "/usr/bin/python3 -m pip install tokenizers"),
    ):
        monkeypatch.setattr(sys, "executable", str(python))
        with pytest.raises(InputError, match=re.escape(f"({command})")):
            load_tokenizer(folder)


# --- models that share ids ------------------------------------------------------------------------------


def with_rows(folder, rows):
    """The folder, as one of a model with this many embeddings."""
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
    return str(folder)


def test_models_share_a_tokenizer_whatever_lies_beside_it(tmp_path):
    config = {"eos_token": "<|a|>", "added_tokens_decoder": decoder_of(400, "<|a|>")}
    one = sp_folder(tmp_path / "one", tokenizer_config=config)
    two = sp_folder(tmp_path / "two", added_tokens={"<|a|>": 400}, special_tokens_map={"eos_token": "<|a|>"})
    (two / "chat_template.json").write_text("{}")
    folders = [("--model", with_rows(one, 401)), ("--rm", with_rows(two, 500))]
    assert shared_tokenizer(folders).size == 401
    with_rows(two, 400)
    with pytest.raises(InputError, match=r"--rm .*two: config.json says vocab_size 400, but the tokenizer has 401 ids"):
        shared_tokenizer(folders)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": decoder_of(400, "<|a|>", "<|b|>"), "eos_token": "<|a|>"}},
        {"tokenizer_config": {"added_tokens_decoder": decoder_of(400, "<|b|>"), "eos_token": "<|b|>"}},
        {"tokenizer_config": {"added_tokens_decoder": decoder_of(400, "<|a|>"), "eos_token": "</s>"}},
        {
            "tokenizer_config": {
                "added_tokens_decoder": decoder_of(400, "<|a|>"),
                "eos_token": "<|a|>",
                "bos_token": "<|a|>",
            }
        },
    ],
    ids=["more tokens", "another text", "another EOS", "another BOS"],
)
def test_a_model_with_another_tokenizer_of_the_same_pieces_is_refused(tmp_path, files):
    config = {"eos_token": "<|a|>", "added_tokens_decoder": decoder_of(400, "<|a|>")}
    one, two = sp_folder(tmp_path / "one", tokenizer_config=config), sp_folder(tmp_path / "two", **files)
    with pytest.raises(InputError) as e:
        shared_tokenizer([("--model", with_rows(one, 500)), ("--rm", with_rows(two, 500))])
    assert str(e.value).startswith(f"--rm {two}: has another tokenizer than --model {one}")


def test_the_merges_of_a_tokenizer_json_tell_it_from_another_but_its_version_and_decoder_do_not(tmp_path):
    one, two = (byte_level(tmp_path / name, eos_token="<|end|>") for name in ("one", "two"))
    folders = [("--model", with_rows(one, 500)), ("--ref", with_rows(two, 500))]
    raw = json.loads((two / "tokenizer.json").read_text())
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]  # as older versions write them
    raw["decoder"] = raw["post_processor"] = None
    (two / "tokenizer.json").write_text(json.dumps(raw))
    shared_tokenizer(folders)
    raw["model"]["merges"].reverse()
    (two / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="has another tokenizer than --model"):
        shared_tokenizer(folders)
