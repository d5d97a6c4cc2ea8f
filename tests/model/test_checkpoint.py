"""A saved model loads unchanged, and a model folder with anything wrong is refused with a message of one line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpo.kernels.functions import Packing
from mpo.model.checkpoint import load_as_scalar, load_model, load_scalar, save_model
from mpo.model.llama import scalar_from
from mpo.runtime.errors import InputError
from mpo.runtime.seeding import generator
from tests.conftest import small_model


def edit_json(path, **changes):
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("shard_bytes", [1 << 30, 4000])
def test_a_model_saved_as_one_file_or_as_several_loads_unchanged(tmp_path, shard_bytes):
    model = small_model(tie_word_embeddings=False)
    save_model(tmp_path, model, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes == 4000)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_saved_scalar_model_loads_unchanged_but_not_as_a_language_model(tmp_path):
    rm = scalar_from(small_model(), generator(0, "head"))
    rm.score_mean += 1.5
    rm.score_std *= 0.7
    save_model(tmp_path, rm)
    ids, packing = torch.randint(0, 61, (9,)), Packing([7, 2])
    again = load_scalar(tmp_path)
    torch.testing.assert_close(again(ids, packing), rm(ids, packing), rtol=0, atol=1e-5)
    assert (float(again.score_mean), float(again.score_std)) == pytest.approx((1.5, 0.7))
    with pytest.raises(InputError, match="is a reward model, which does not write text"):
        load_model(tmp_path)
    save_model(tmp_path, small_model())
    with pytest.raises(InputError, match="is a language model, not a reward model"):
        load_scalar(tmp_path)


def test_a_model_without_bos_is_saved_without_bos(tmp_path):
    """With an id in its place, the tokenizer of the next stage would begin texts with another token."""
    save_model(tmp_path / "first", small_model())
    edit_json(tmp_path / "first" / "config.json", bos_token_id=None)
    save_model(tmp_path / "second", load_model(tmp_path / "first"))
    assert json.loads((tmp_path / "second" / "config.json").read_text())["bos_token_id"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos_token_id": -1}, "bos_token_id must be a whole number from 0 on"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"eos_token_id": [2, -1]}, "eos_token_id must be a whole number from 0 on, found -1"),
        ({"model_type": ["llama"]}, "is not supported; llama, mistral, .* and gemma3_text are"),
        (
            {"model_type": "mistral", "sliding_window": "wide"},
            "sliding_window must be a whole number from 0 on, found 'wide'",
        ),
        ({"attention_bias": True}, "lacks 8 tensors, first 'model.layers.0.self_attn.k_proj.bias'"),
        ({"mlp_bias": True}, "lacks 6 tensors"),
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types other than 'full_attention'"),
        ({"num_local_experts": 8}, "num_local_experts is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope scaling lacks factor"),
        ({"intermediate_size": 41}, "config.json says"),
        ({"num_hidden_layers": 1}, "unexpected tensor"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors"),
    ],
)
def test_a_config_that_is_unsupported_or_does_not_fit_the_weights_is_refused(tmp_path, changes, message):
    save_model(tmp_path, small_model())
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(InputError, match=message) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "expected"), [({"pad_token_id": 0}, 0), ({"pad_token_id": None}, None), ({"pad_token_id": 2}, None)]
)
def test_a_missing_pad_token_and_one_that_equals_eos_are_read_as_none(tmp_path, given, expected):
    save_model(tmp_path, small_model(eos_token_id=2))
    edit_json(tmp_path / "config.json", **given)
    model = load_model(tmp_path)
    assert model.config.pad_token_id == expected
    save_model(tmp_path / "again", model)
    assert load_model(tmp_path / "again").config == model.config


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "weights.bin"])
def test_an_index_may_only_name_safetensors_files_in_its_own_folder(tmp_path, name):
    save_model(tmp_path, small_model(), shard_bytes=4000)
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(raw))
    with pytest.raises(InputError, match="is not a safetensors file of this folder"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated_weights_are_refused(tmp_path, keep):
    save_model(tmp_path, small_model())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_model(tmp_path)


def test_the_message_says_which_file_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"config.json: no such file"):
        load_model(tmp_path)
    save_model(tmp_path, small_model())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds neither"):
        load_model(tmp_path)


def test_a_tied_head_that_was_written_too_must_be_the_embedding(tmp_path):
    """Without this, a head of its own would be dropped, and the model would compute something else."""
    save_model(tmp_path, small_model())
    weights = load_file(tmp_path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    load_model(tmp_path)
    for head in (embedding + torch.eye(61, 24) * 1e-3, embedding[:60].clone()):
        save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=r"lm_head\.weight differs from .* though tie_word_embeddings is true"):
            load_model(tmp_path)
        load_as_scalar(tmp_path, generator(0, "head"))  # a reward model has no head for words


def test_a_sliding_window_is_kept_with_the_family(tmp_path):
    save_model(tmp_path / "first", small_model())
    edit_json(tmp_path / "first" / "config.json", model_type="mistral", sliding_window=64)
    model = load_model(tmp_path / "first")
    assert [model.config.window(layer) for layer in (0, 1)] == [64, 64]
    save_model(tmp_path / "second", model)
    written = json.loads((tmp_path / "second" / "config.json").read_text())
    assert (written["model_type"], written["sliding_window"]) == ("mistral", 64)
    assert written["architectures"] == ["MistralForCausalLM"]
    edit_json(tmp_path / "first" / "config.json", sliding_window=None)
    save_model(tmp_path / "second", load_model(tmp_path / "first"))
    written = json.loads((tmp_path / "second" / "config.json").read_text())
    assert written["sliding_window"] is None  # left out, it would mean 4096 in transformers
    assert load_model(tmp_path / "second").config.window(0) is None


@pytest.mark.parametrize(
    ("given", "generation", "config_says", "generation_says"),
    [
        ({"eos_token_id": 2}, None, 2, None),
        ({"eos_token_id": [7, 2]}, None, [7, 2], None),
        ({"eos_token_id": [7]}, {"top_p": 0.9}, [7, 2], {"top_p": 0.9, "eos_token_id": [7, 2]}),
        ({"eos_token_id": 0}, {"eos_token_id": [5], "bos_token_id": 9}, [0, 5, 2], {"bos_token_id": 1}),
        ({"eos_token_id": None}, {}, 2, {"eos_token_id": 2}),
        ({"eos_token_id": 2, "pad_token_id": 2}, {"pad_token_id": 2}, 2, {"pad_token_id": 2}),
        ({"eos_token_id": [7, 2], "pad_token_id": 2}, None, [7, 2], None),
    ],
)
def test_every_id_that_stops_a_text_is_written_and_our_eos_among_them(
    tmp_path, tokenizer, given, generation, config_says, generation_says
):
    """The tokenizer's EOS is 2 and its BOS 1."""
    save_model(tmp_path / "first", small_model(pad_token_id=None))
    edit_json(tmp_path / "first" / "config.json", bos_token_id=9, **given)
    if generation is not None:
        (tmp_path / "first" / "generation_config.json").write_text(json.dumps(generation))
    save_model(tmp_path / "second", load_model(tmp_path / "first"), tokenizer)
    written = json.loads((tmp_path / "second" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, config_says)
    assert written["pad_token_id"] is None
    assert (tmp_path / "second" / "generation_config.json").exists() == (generation is not None)
    if generation is not None:
        kept = json.loads((tmp_path / "second" / "generation_config.json").read_text())
        assert kept.items() >= generation_says.items()
        assert kept["eos_token_id"] == config_says


@pytest.mark.parametrize("content", ["[1]", '{"eos_token_id": -1}', '{"eos_token_id": [2, "x"]}', "{"])
def test_a_damaged_generation_config_is_refused(tmp_path, content):
    save_model(tmp_path, small_model())
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json: "):
        load_model(tmp_path)
