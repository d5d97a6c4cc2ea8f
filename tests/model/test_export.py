"""What is written here opens elsewhere: the same ids, logits, stops and chat template as in the folder it came from."""

from __future__ import annotations

import json

import pytest
import torch

from mpo.data.tokenizer import load_tokenizer
from mpo.model.checkpoint import load_model, save_model
from tests.support.layouts import LAYOUTS

transformers = pytest.importorskip("transformers")
pytest.importorskip("google.protobuf")  # transformers needs it to read a sentencepiece model

TEXTS = (
    "\n\nHuman: What is the capital of Peru?\n\nAssistant:",
    "two  spaces\n\n\nand lines ",
    "naïve 日本 ▁ 🙂",
    "to <s>, </s>, <unk>, <|im_end|>, <|eot_id|> and <|endoftext|>",
    " a space first",
    "",
)
# BOS and EOS of each tokenizer, and eos_token_id of the config.json that is written, by hand.
EXPECTED = {
    "llama_2": (1, 2, 2),
    "llama_3": (400, 403, [401, 402, 403]),
    "mistral": (1, 2, 2),
    "chatml": (1, 400, [400, 2]),
    "yi": (1, 4, [2, 4]),
    "smollm2": (400, 401, 401),
    "tinyllama": (1, 2, 2),
    "qwen2": (402, 402, [402, 400]),
    "qwen3": (402, 402, [400, 402]),  # a base model whose chat template ends turns with another token
    "gemma3": (2, 1, [1, 6]),
    "gemma3_json": (2, 1, 1),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def exported(request, tmp_path_factory):
    """(name of the layout, the folder it came in, the folder that is written as stages do)."""
    folder = tmp_path_factory.mktemp(request.param)
    given = LAYOUTS[request.param](folder / "given")
    save_model(folder / "written", load_model(given), load_tokenizer(given))
    return request.param, given, folder / "written"


def content(path):
    return json.loads(path.read_text())


def test_every_file_of_the_tokenizer_comes_along_unchanged(exported):
    _, given, written = exported
    own = {"config.json", "generation_config.json", "model.safetensors"}
    names = {p.name for p in given.iterdir()}
    assert {p.name for p in written.iterdir()} == names
    for name in names - own:
        assert (written / name).read_bytes() == (given / name).read_bytes(), name


def test_the_ids_of_bos_and_eos_and_every_id_that_stops_a_text(exported):
    name, given, written = exported
    bos, eos, stops = EXPECTED[name]
    tokenizer = load_tokenizer(written)
    assert (tokenizer.bos, tokenizer.eos) == (bos, eos)
    assert tokenizer.pad != eos
    config = content(written / "config.json")
    bos = {"qwen2": 400, "qwen3": None}.get(name, bos)  # as before: without BOS, EOS stands for it in this project
    assert (config["bos_token_id"], config["eos_token_id"]) == (bos, stops)
    assert config["pad_token_id"] != eos
    assert (written / "generation_config.json").exists() == (given / "generation_config.json").exists()
    if (given / "generation_config.json").exists():
        before = content(given / "generation_config.json")
        assert content(written / "generation_config.json") == before | {"eos_token_id": stops}
    assert config["model_type"] == content(given / "config.json")["model_type"]
    assert config.get("sliding_window") == content(given / "config.json").get("sliding_window")


def test_transformers_reads_the_same_ids_from_both_folders_and_we_do_too(exported):
    name, *folders = exported
    ours = load_tokenizer(folders[1])
    given, written = (transformers.AutoTokenizer.from_pretrained(folder) for folder in folders)
    assert type(written) is type(given)
    assert (written.eos_token_id, len(written)) == (ours.vocabulary.eos, ours.size)
    if not name.startswith("qwen"):
        assert ours.bos == written.bos_token_id
    for text in TEXTS:
        for flags in ({}, {"add_special_tokens": False}, {"add_special_tokens": False, "split_special_tokens": True}):
            assert written(text, **flags)["input_ids"] == given(text, **flags)["input_ids"]
        if name == "yi" and "<|im_end|>" in text:
            continue  # transformers reads what this vocabulary has as pieces of its own even so; see test_tokenizer.py
        if "tokenizer.model" in ours.vocabulary.files and text.startswith(" "):
            # transformers 5 puts no second space before it, unlike sentencepiece, by which these models were trained.
            assert ours.vocabulary.encode(text) == ours.vocabulary.sp.EncodeAsIds(text)
            continue
        plain = written(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.vocabulary.encode(text) == plain


WITHOUT_BOS = {"yi", "smollm2", "qwen2", "qwen3"}


def test_a_prompt_begins_with_bos_if_the_model_was_trained_so(exported):
    name, *folders = exported
    for folder in folders:
        ours = load_tokenizer(folder, "none")
        assert (ours.prompt_ids(TEXTS[0])[0] == ours.bos) == (name not in WITHOUT_BOS)
        assert ours.prompt_ids("") == [ours.bos]  # never empty
        if name not in ("mistral", "tinyllama", "chatml"):  # their files do not say; transformers 5 differs from 4
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            assert ours.prompt_ids(TEXTS[0]) == theirs(TEXTS[0])["input_ids"]


def test_no_text_becomes_a_special_token_and_every_response_comes_back(exported):
    name, _, folder = exported
    ours = load_tokenizer(folder, "none")
    specials = {ours.bos, ours.eos, *range(400, ours.size)}
    for text in TEXTS:
        ids = ours.response_ids(" " + text)
        assert not specials & set(ids[:-1])
        if "tokenizer.model" in ours.vocabulary.files or name == "gemma3_json":
            text = text.replace("▁", " ")  # there the same character
        assert ours.decode(ids) == " " + text


def test_the_chat_template_renders_the_same(exported):
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": " Hello."}]
    texts = [
        transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
        for folder in exported[1:]
    ]
    assert texts[0] == texts[1]
    assert "Hello." in texts[0]


@torch.no_grad()
def test_the_same_logits_in_transformers_and_generation_stops_at_our_eos(exported):
    _, *folders = exported
    given, written = (transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders)
    assert type(written) is type(given)
    tokenizer, ids = load_tokenizer(folders[1]), torch.arange(3, 43).view(2, 20)
    assert torch.equal(written(ids).logits, given(ids).logits)
    torch.testing.assert_close(written(ids).logits, load_model(folders[1]).logits(ids), rtol=1e-4, atol=1e-3)
    prompt = torch.tensor([tokenizer.prompt_ids("Hi.")])
    new = written.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :]
    assert new.tolist() == [tokenizer.vocabulary.eos]  # the token that these weights always predict
    assert tokenizer.eos in ([stops] if isinstance(stops := written.config.eos_token_id, int) else stops)
