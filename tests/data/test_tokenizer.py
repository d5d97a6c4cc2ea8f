"""Special tokens, boundaries and exact round trips."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo.data.tokenizer import TURNS, load_tokenizer
from mpo.data.tokenizer_files import TokenizerFiles
from mpo.data.vocabulary import Sentencepiece
from mpo.runtime.errors import InputError
from tests.conftest import STORIES, needs_stories


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
