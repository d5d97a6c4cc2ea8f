"""Each model family against transformers: logits, generation, gradients, files in and out, adapters, reward models.

The models are made by transformers' own config classes, with random weights, every vector among them: a bias of 0 or a
norm of 1, as transformers initialises them, would hide whether it is computed.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing

from mpo.data.batches import make_batch
from mpo.kernels import functions as kernels
from mpo.kernels.functions import Packing
from mpo.model.checkpoint import load_as_scalar, load_model, load_scalar, save_model
from mpo.model.families import FAMILIES
from mpo.model.generate import Sampling, generate
from mpo.model.hf_config import config_from_json
from mpo.model.llama import Adapters, cast_weights, configure_layers
from mpo.model.logprobs import response_logprobs
from mpo.model.lora import TARGETS, adapted
from mpo.model.scoring import score
from mpo.runtime.errors import InputError
from mpo.runtime.seeding import generator

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 1}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
}
# Name of the class, options, and whether the compiled decoder computes it.
VARIANTS = {
    "llama": ("Llama", {}, True),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}, False),
    "llama with linear scaling": ("Llama", {"rope_parameters": LINEAR}, True),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 10}, True),
    "mistral with a short window": ("Mistral", {"sliding_window": 7}, False),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, True),
    "qwen2 tied, one head of keys": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}, True),
    "qwen2 with windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
        False,
    ),
    "qwen3": ("Qwen3", {"head_dim": 10}, True),
    "qwen3 with biases": ("Qwen3", {"head_dim": 6, "attention_bias": True, "tie_word_embeddings": True}, False),
    "smollm3": ("SmolLM3", {}, False),
    "smollm3 with llama3 scaling": (
        "SmolLM3",
        {"no_rope_layers": [1, 0, 0, 1], "rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5}},
        False,
    ),
    "gemma3": ("Gemma3", {"head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 64}, False),
    "gemma3 with short windows": (
        "Gemma3",
        {"head_dim": 8, "query_pre_attn_scalar": 13, "sliding_window": 6, "sliding_window_pattern": 2},
        False,
    ),
    "gemma3 with linear scaling": (
        "Gemma3",
        {
            "head_dim": 6,
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": GEMMA_ROPE | {"full_attention": LINEAR},
        },
        False,
    ),
}
KIND = {"Gemma3": "Gemma3TextConfig"}  # all others are NAMEConfig
TYPES = {"Gemma3": "gemma3_text"}


def config_of(variant, **changes):
    name, options, _ = VARIANTS[variant]
    return getattr(transformers, KIND.get(name, f"{name}Config"))(**{**SIZES, "eos_token_id": 60, **options, **changes})


def their_model(variant, **changes):
    """A random model of transformers. Its vectors are random, too."""
    torch.manual_seed(0)
    name = VARIANTS[variant][0]
    model = getattr(transformers, f"{name}ForCausalLM")(config_of(variant, **changes)).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() > 1:
                p.mul_(8)
            else:
                p.copy_(0.3 * torch.randn_like(p) + (0 if name == "Gemma3" or "bias" in key else 1))
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def both(request, tmp_path_factory):
    """(name of the variant, transformers' model, the folder it wrote)."""
    theirs, folder = their_model(request.param), tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return request.param, theirs, folder


def random_ids(*shape):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(1))


IDS = random_ids(2, 40)  # longer than the short windows


def test_every_family_has_a_variant_here():
    types = {TYPES.get(name, name.lower()) for name, _, _ in VARIANTS.values()}
    assert types == set(FAMILIES)


@torch.no_grad()
def test_the_same_logits(both):
    _, theirs, folder = both
    torch.testing.assert_close(load_model(folder).logits(IDS), theirs(IDS).logits, rtol=0, atol=1e-4)


def test_the_hidden_states_that_are_wanted_are_those_of_all(both):
    _, _, folder = both
    model, ids, wanted = load_model(folder), random_ids(12), torch.tensor([11, 0, 5])
    with torch.no_grad():
        all_of_them = model(ids, Packing([5, 7]))
        torch.testing.assert_close(model(ids, Packing([5, 7]), wanted=wanted), all_of_them[wanted], rtol=0, atol=1e-5)


def in_the_old_form(raw):
    """A config.json as transformers wrote it before version 5: without a list of layers where these follow a rule."""
    rope = raw.pop("rope_parameters")
    if "full_attention" in rope:
        raw["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if "_sliding_window_pattern" in raw:
        raw["sliding_window_pattern"] = raw.pop("_sliding_window_pattern")
    if raw.get("layer_types") != VARIANTS["gemma3 with linear scaling"][1]["layer_types"]:
        raw.pop("layer_types", None)
    return raw


@torch.no_grad()
def test_the_same_logits_from_a_config_in_the_old_form(both, tmp_path):
    _, theirs, folder = both
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(in_the_old_form(raw)))
    torch.testing.assert_close(load_model(tmp_path).logits(IDS), theirs(IDS).logits, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("impl", [None, "reference"])
def test_the_same_tokens_greedily_and_the_same_log_probs_of_sampled_ones(both, impl, monkeypatch):
    """With prompts of two lengths, one of them twice, and texts that grow beyond the short windows."""
    monkeypatch.setattr(kernels, "default", impl)
    _, theirs, folder = both
    ours, prompts = load_model(folder), [IDS[0, :11].tolist(), IDS[1, :4].tolist(), IDS[0, :11].tolist()]
    greedy = generate(ours, prompts, Sampling(14, 0.0, 60), generator(0, "x"))
    for prompt, response in zip(prompts, greedy.responses, strict=True):
        theirs_too = theirs.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False, pad_token_id=0)
        assert response == theirs_too[0, len(prompt) :].tolist()
    sampled = generate(ours, prompts, Sampling(14, 0.7, 60), generator(0, "x"))
    for prompt, response, logps in zip(prompts, sampled.responses, sampled.logps, strict=True):
        logits = theirs(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logps), expected, rtol=0, atol=1e-4)


@pytest.mark.skipif("cpu" not in kernels.IMPLEMENTATIONS, reason="the compiled kernels are not built")
def test_the_compiled_decoder_takes_what_it_computes_and_nothing_else(both):
    variant, _, folder = both
    model = load_model(folder)
    cache = model.kv_cache(2, 25)
    assert type(cache).__module__.endswith("cpu.generation") == VARIANTS[variant][2]


def test_the_same_gradient_of_a_training_step(both):
    """The log-probs of two responses that share a prompt, and of a third; recomputed layers give the same."""
    _, theirs, folder = both
    prompts, responses = [IDS[0, :9].tolist()] * 2 + [IDS[1, :3].tolist()], [IDS[0, 9:22], IDS[1, 9:14], IDS[1, 3:30]]
    for recompute in (False, True):
        ours = load_model(folder)
        configure_layers(ours, recompute=recompute, compiled=False)
        batch = make_batch([(p, r.tolist()) for p, r in zip(prompts, responses, strict=True)])
        loss = -response_logprobs(ours, batch).logp.sum() / 10
        loss.backward()
        theirs.zero_grad()
        expected = torch.zeros(())
        for prompt, response in zip(prompts, responses, strict=True):
            logits = theirs(torch.tensor([prompt + response.tolist()])).logits[0, len(prompt) - 1 : -1]
            expected = expected - logits.log_softmax(-1).gather(1, response[:, None]).sum() / 10
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
        known = dict(theirs.named_parameters())
        assert known.keys() == {name for name, _ in ours.named_parameters()}
        for name, p in ours.named_parameters():
            assert p.grad.abs().max() > 0, name
            torch.testing.assert_close(
                p.grad, known[name].grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("variant", ["qwen3 with biases", "gemma3 with short windows"])
def test_compiled_layers_compute_the_same_with_a_program_for_each_kind_of_layer(variant, tmp_path):
    """A break in the graph would raise. Gemma has two kinds of layers; each is made again when lengths change."""
    their_model(variant).save_pretrained(tmp_path)
    plain, compiled = load_model(tmp_path), load_model(tmp_path)
    torch._dynamo.reset()
    made = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    configure_layers(compiled, recompute=False, compiled=True, backend=made)
    for packing in (Packing([12, 8, 6], [-1, 0, 0]), Packing([7, 21])):
        ids = random_ids(int(packing.lengths.sum()))
        torch.testing.assert_close(compiled(ids, packing), plain(ids, packing), rtol=1e-4, atol=1e-4)
    assert made.frame_count <= (6 if "gemma" in variant else 3)  # one for each of 4 layers would be 8


@torch.no_grad()
def test_what_is_written_opens_as_the_same_family_with_the_same_logits(both, tmp_path):
    _, theirs, folder = both
    ours = load_model(folder)
    save_model(tmp_path, ours)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(again) is type(theirs)
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(again.config, name) == getattr(theirs.config, name), name
    loaded = load_model(tmp_path)
    assert loaded.config == ours.config
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in ours.state_dict().items())
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(in_the_old_form(raw)))
    assert load_model(tmp_path).config == ours.config


def test_adapters_train_and_merge(both, tmp_path):
    _, _, folder = both
    model = load_model(folder, Adapters(2, 4.0, TARGETS, 1, "base"))
    assert len(adapted(model)) == 7 * 4
    torch.testing.assert_close(model.logits(IDS), load_model(folder).logits(IDS))  # B is 0
    for name, p in model.named_parameters():
        if ".lora_B" in name:
            p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.logits(IDS).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if ".lora_" in name
    }
    save_model(tmp_path, model)
    merged = load_model(tmp_path)
    torch.testing.assert_close(merged.logits(IDS), model.logits(IDS), rtol=0, atol=2e-4)
    assert not torch.allclose(merged.logits(IDS), load_model(folder).logits(IDS), atol=0.1)
    prompts, sampling = [IDS[0, :9].tolist(), IDS[1, :2].tolist()], Sampling(9, 1.0, 60)
    one, other = (generate(m, prompts, sampling, generator(3, "x")) for m in (model, merged))
    assert one.responses == other.responses


@torch.no_grad()
def test_a_reward_model_from_it_scores_by_its_hidden_states_and_loads_again(both, tmp_path):
    _, theirs, folder = both
    rm = load_as_scalar(folder, generator(0, "head"))
    states = theirs.model(IDS).last_hidden_state  # (2, 40, D)
    values = rm(IDS.flatten(), Packing([40, 40]))
    torch.testing.assert_close(values.view(2, 40), states @ rm.score.weight[0], rtol=0, atol=1e-4)
    save_model(tmp_path, rm)
    again = load_scalar(tmp_path)
    assert again.config == rm.config
    assert torch.equal(again(IDS.flatten(), Packing([40, 40])), values)


TEXTS = [([5, 9], [7, 8, 60]), (IDS[0, :17].tolist(), [3, 60]), ([11], [60]), (IDS[1, :30].tolist(), [9, 9, 9, 4])]
PAD = 2  # in none of these texts


def padded(left):
    """The texts as a batch of transformers, padded on one side, with its mask."""
    rows = [prompt + response for prompt, response in TEXTS]
    longest = max(map(len, rows))
    pads = [[PAD] * (longest - len(row)) for row in rows]
    ids = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])
    lengths = torch.tensor([[len(row)] for row in rows])
    at = torch.arange(longest)
    return ids, ((at >= longest - lengths) if left else (at < lengths)).long()


def in_transformers(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_a_reward_model_scores_the_same_in_transformers_in_batches_padded_on_either_side(both, tmp_path):
    """Also a text without EOS. The scale is in the head; the mean, which no head can hold, is recorded."""
    variant, _, folder = both
    rm = load_as_scalar(folder, generator(0, "head"))
    rm.config = replace(rm.config, pad_token_id=PAD)
    rm.score_mean += 2.5
    rm.score_std *= 4.0
    save_model(tmp_path, rm)
    theirs = in_transformers(tmp_path)
    name = VARIANTS[variant][0].replace("Gemma3", "Gemma3Text")
    assert type(theirs).__name__ == f"{name}ForSequenceClassification"
    assert (theirs.config.num_labels, theirs.config.pad_token_id, tuple(theirs.score.weight.shape)) == (1, PAD, (1, 24))
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["architectures"] == [type(theirs).__name__]
    batch = make_batch(TEXTS)
    ours, centred = (score(load_scalar(tmp_path, centred=c), batch) for c in (False, True))
    assert ours.std() > 0.05  # 500 times the tolerance
    for left in (False, True):
        ids, mask = padded(left)
        scores = theirs(input_ids=ids, attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(scores, ours, rtol=0, atol=1e-4)
        torch.testing.assert_close(scores - theirs.config.mpo_score_mean, centred, rtol=0, atol=1e-4)
    torch.testing.assert_close(centred, score(rm, batch), rtol=0, atol=1e-4)
    assert theirs.config.mpo_score_mean == pytest.approx(2.5 / 4)


@torch.no_grad()
def test_a_reward_model_of_transformers_scores_the_same_here(both, tmp_path):
    """As a Trainer saves it: num_labels 1, no scale."""
    _, _, folder = both
    theirs = in_transformers(folder)  # with two labels, and a new head
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"pad_token_id": PAD}))
    config = transformers.AutoConfig.from_pretrained(tmp_path, num_labels=1)
    one = type(theirs)(config).eval()
    one.model.load_state_dict(theirs.model.state_dict())
    one.save_pretrained(tmp_path / "rm")
    ids, mask = padded(True)
    expected = one(input_ids=ids, attention_mask=mask).logits[:, 0]
    for centred in (False, True):
        ours = score(load_scalar(tmp_path / "rm", centred=centred), make_batch(TEXTS))
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    theirs.config.pad_token_id = PAD
    theirs.save_pretrained(tmp_path / "two")
    with pytest.raises(InputError, match=r"its head gives 2 numbers \(num_labels\); that of a reward model gives 1"):
        load_scalar(tmp_path / "two")


@torch.no_grad()
def test_gemmas_embeddings_are_scaled_by_a_factor_that_is_rounded_like_the_weights(tmp_path):
    """In bf16, sqrt(24) = 4.8990 becomes 4.90625. The norms, by contrast, are computed in fp32."""
    theirs = their_model("gemma3").bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    cast_weights(ours, torch.bfloat16)
    ids = torch.arange(61)
    assert torch.equal(ours.model.embed(ids), theirs.model.embed_tokens(ids))
    assert torch.equal(ours.model.embed(ids), ours.model.embed_tokens(ids) * 4.90625)
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    block = theirs.model.layers[0]
    mine = ours.model.layers[0]
    assert torch.equal(mine.input_layernorm(x), block.input_layernorm(x))
    assert mine.input_layernorm(x).dtype == torch.bfloat16


DEFAULTS = (
    "max_position_embeddings",
    "rms_norm_eps",
    "num_key_value_heads",
    "bos_token_id",
    "pad_token_id",
    "head_dim",
)
DEFAULTS += ("tie_word_embeddings", "attention_bias", "mlp_bias", "query_pre_attn_scalar")


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Gemma3"])
@pytest.mark.parametrize("windows", [{}, {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}])
def test_an_option_that_a_config_leaves_out_means_what_it_means_in_transformers(tmp_path, name, windows):
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 8}
    sizes |= {"num_attention_heads": 32}
    if name == "Llama":
        windows = {}
    if name in ("Mistral", "Gemma3"):
        windows = {key: value for key, value in windows.items() if key == "sliding_window"}
    raw = {"model_type": TYPES.get(name, name.lower()), **sizes, **windows}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = config_from_json(tmp_path / "config.json")
    theirs = getattr(transformers, KIND.get(name, f"{name}Config"))(**sizes, **windows)
    for option in DEFAULTS:
        expected = getattr(theirs, option, None)
        if expected is None and option == "head_dim":
            expected = 2
        assert getattr(ours, option) == expected or (expected is None and not getattr(ours, option)), option
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 8
    of_sliding = getattr(theirs, "sliding_window", None)
    assert [ours.window(i) for i in range(8)] == [of_sliding if k == "sliding_attention" else None for k in kinds]
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope.get("full_attention", rope)["rope_theta"]
    assert ours.rope_local_base_freq == rope.get("sliding_attention", {}).get("rope_theta")
    assert [ours.positions_of(i) != "none" for i in range(8)] == list(
        map(bool, getattr(theirs, "no_rope_layers", [1] * 8))
    )


GEMMA, QWEN, SMOLLM = "gemma3", "qwen2", "smollm3"


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        (
            GEMMA,
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping is not supported for gemma3_text, found 30",
        ),
        (GEMMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported for gemma3_text, found 50"),
        (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        (
            GEMMA,
            {"model_type": "gemma2"},
            r"'gemma2' is not supported \(it caps attention scores and logits\); llama, ",
        ),
        (GEMMA, {"model_type": "gemma3"}, r"'gemma3' is not supported \(it reads images, too; gemma3_text, "),
        (GEMMA, {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported; only silu and gelu_pytorch"),
        (GEMMA, {"layer_types": ["chunked_attention"] * 4}, "layer_types other than .*, found 'chunked_attention'"),
        (GEMMA, {"layer_types": ["full_attention"] * 3}, "layer_types must be a list with an entry for each of the 4"),
        (GEMMA, {"layer_types": "full_attention"}, "layer_types must be a list"),
        (GEMMA, {"sliding_window": None}, "layer_types has 'sliding_attention', but there is no sliding_window"),
        (GEMMA, {"sliding_window": 0}, "sliding_window must not be 0"),
        (GEMMA, {"sliding_window": -4}, "sliding_window must be a whole number from 0 on, found -4"),
        (GEMMA, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must not be 0"),
        (GEMMA, {"query_pre_attn_scalar": "wide"}, "query_pre_attn_scalar must be a number from 0 on, found 'wide'"),
        (
            GEMMA,
            {"rope_parameters": GEMMA_ROPE | {"sliding_attention": LINEAR}},
            "rope scaling of sliding_attention layers is not supported",
        ),
        (
            GEMMA,
            {"rope_parameters": GEMMA_ROPE | {"full_attention": {"rope_type": "yarn"}}},
            "rope scaling 'yarn' is not supported; only 'linear' and 'llama3' are",
        ),
        (GEMMA, {"rope_parameters": GEMMA_ROPE | {"full_attention": [1]}}, r"must be an object, found \[1\]"),
        (QWEN, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not supported"),
        (QWEN, {"rope_parameters": {"rope_type": "linear"}}, "rope scaling lacks factor"),
        (QWEN, {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor must not be 0"),
        (QWEN, {"rope_parameters": GEMMA_ROPE}, "rope_parameters by the kind of a layer are not supported"),
        (QWEN, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        (QWEN, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        (QWEN, {"attention_bias": True}, "attention_bias is not supported for qwen2"),
        (QWEN, {"mlp_bias": True}, "mlp_bias is not supported for qwen2"),
        (QWEN, {"layer_types": ["sliding_attention"] * 4}, "but there is no sliding_window, or it is not used"),
        (
            QWEN,
            {"use_sliding_window": True, "max_window_layers": "all", "sliding_window": 3, "layer_types": None},
            "max_",
        ),
        (QWEN, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
        (QWEN, {"num_experts": 8}, "num_experts is not supported for qwen2, found 8"),
        (QWEN, {"model_type": "qwen3_moe"}, r"'qwen3_moe' is not supported \(it is a mixture of experts\)"),
        (GEMMA, {"hidden_activation": ["gelu"]}, r"hidden_activation \['gelu'\] is not supported"),
        (QWEN, {"rope_parameters": {"rope_type": {"a": 1}}}, r"rope scaling \{'a': 1\} is not supported"),
        (QWEN, {"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000, found 1000000000"),
        (SMOLLM, {"no_rope_layers": [[]] * 4}, r"no_rope_layers other than 0 and 1 are not supported, found \[\]"),
        (SMOLLM, {"no_rope_layers": [1, 2, 1, 1]}, "no_rope_layers other than 0 and 1 are not supported, found 2"),
        (SMOLLM, {"no_rope_layers": None, "no_rope_layer_interval": "two"}, "no_rope_layer_interval must be a whole"),
    ],
)
def test_what_is_not_computed_is_refused_by_name_in_one_line(tmp_path, variant, changes, message):
    config_of(variant).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(InputError, match=message) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
