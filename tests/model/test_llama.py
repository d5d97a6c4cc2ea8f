"""The Llama model: packing, the KV cache, real weights, and the results of the library transformers."""

from __future__ import annotations

import json

import pytest
import torch

from mpo.kernels import functions as kernels
from mpo.kernels.functions import Packing
from mpo.model.checkpoint import load_model, save_model
from mpo.model.llama import PRESETS, LlamaConfig, configure_layers, rotary_frequencies
from tests.conftest import STORIES, needs_stories, small_model


def test_hidden_states_do_not_depend_on_how_texts_are_packed():
    model = small_model()
    texts = [torch.randint(0, 61, (n,)) for n in (5, 1, 9)]
    alone = torch.cat([model(t, Packing([len(t)])) for t in texts])
    packed = model(torch.cat(texts), Packing([5, 1, 9]))
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    in_segments = model(torch.cat(texts), Packing([2, 3, 1, 4, 5], [-1, 0, -1, -1, 3]))
    torch.testing.assert_close(in_segments, alone, rtol=0, atol=1e-5)


def test_children_of_one_root_segment_do_not_attend_to_each_other():
    model = small_model()
    prompt, one, other = (torch.randint(0, 61, (n,)) for n in (4, 3, 6))
    shared = model(torch.cat((prompt, one, other)), Packing([4, 3, 6], [-1, 0, 0]))
    for child, together in ((one, shared[4:7]), (other, shared[7:])):
        alone = model(torch.cat((prompt, child)), Packing([4 + len(child)]))[4:]
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_hidden_states_that_are_wanted_are_those_of_all_and_so_are_their_gradients(recompute):
    """The same position may be wanted twice: a prompt's last token predicts the first token of both responses."""
    ids, packing, wanted = torch.randint(0, 61, (30,)), Packing([10, 6, 14], [-1, 0, 0]), torch.tensor([9, 9, 3, 29])
    results = []
    for asked in (None, wanted):
        model = small_model()
        configure_layers(model, recompute, False)
        hidden = model(ids, packing) if asked is None else model(ids, packing, wanted=asked)
        assert hidden.shape == (30 if asked is None else 4, 24)
        hidden = hidden[wanted] if asked is None else hidden
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        results.append((hidden.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_compiled_layers_compute_the_same_states_and_gradients():
    """Also when the number and the lengths of the segments change. A break in the graph would raise (fullgraph)."""
    plain, compiled = small_model(), small_model()
    configure_layers(compiled, recompute=True, compiled=True, backend="aot_eager")
    for packing in (Packing([30, 20, 20], [-1, 0, 0]), Packing([7, 9, 11, 40])):
        ids, results = torch.randint(0, 61, (int(packing.lengths.sum()),)), []
        for model in (plain, compiled):
            model.zero_grad()
            hidden = model(ids, packing)
            hidden.square().mean().backward()
            results.append([hidden.detach(), *(p.grad for p in model.parameters())])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_compiled_model_fills_the_same_cache_with_every_implementation_of_it():
    """PPO samples from the model that it trains, and --compile compiles that model."""
    cases = [("llama", impl) for impl in {"reference", *kernels.IMPLEMENTATIONS} & {"reference", "cpu"}]
    for family, impl in [*cases, ("gemma3_text", "reference")]:  # whose layers have norms of their own
        plain, compiled = (small_model(model_type=family) for _ in range(2))
        configure_layers(compiled, recompute=False, compiled=True, backend="eager")
        ids, results = torch.arange(12), []
        for model in (plain, compiled):
            like = model.lm_head.weight
            cache = kernels.kv_cache(2, 2, 12, 2, 6, like, impl=impl)
            hidden = model(ids, Packing([7, 5]), cache)
            torch.testing.assert_close(hidden, plain(ids, Packing([7, 5])), rtol=0, atol=1e-5)
            results.append(torch.cat((hidden, model.model.decoder(cache)(torch.tensor([3, 4])))))
        assert torch.equal(*results), (family, impl)


@torch.no_grad()  # the cache is for inference
def test_decoding_with_a_cache_matches_one_forward_pass():
    model = small_model()
    texts = [torch.randint(0, 61, (n,)) for n in (9, 5, 6)]
    whole = [model(t, Packing([len(t)])) for t in texts]
    cache = model.kv_cache(3, 9)
    starts = [6, 2, 3]
    ids = torch.cat([t[:n] for t, n in zip(texts, starts, strict=True)])
    first = model(ids, Packing(starts), cache).split(starts)
    torch.testing.assert_close(first[1], whole[1][:2], rtol=0, atol=1e-5)
    decode = model.model.decoder(cache)
    for step in range(3):
        hidden = decode(torch.stack([t[n + step] for t, n in zip(texts, starts, strict=True)]))
        expected = torch.stack([w[n + step] for w, n in zip(whole, starts, strict=True)])
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
        if step == 1:  # the text in row 0 has ended
            cache.take(torch.tensor([1, 2]))
            texts, starts, whole = texts[1:], starts[1:], whole[1:]


@needs_stories
def test_a_real_model_matches_an_independent_implementation():
    expected = json.loads((STORIES / "expected.json").read_text())
    model = load_model(STORIES)
    ids = torch.tensor([expected["greedy_ids"]])
    logps = model.logits(ids).log_softmax(-1)[0, :-1]
    assert logps.argmax(-1).tolist() == expected["greedy_ids"][1:]
    total = logps.gather(1, ids[0, 1:, None]).sum().item()
    assert total == pytest.approx(expected["sum_logprob"], abs=1e-3)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": 4},
        {"rope_theta": 500.0, "rope_scaling": LLAMA3, "max_position_embeddings": 512},
        {"head_dim": 10, "num_key_value_heads": 1},
    ],
    ids=["tied-gqa", "untied-mha", "llama3-rope", "own-head-dim"],
)
def test_transformers_computes_the_same_logits_from_a_saved_folder(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small_model(**shape)
    save_model(tmp_path, model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, 61, (2, 200))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model.logits(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("old_form", [True, False])
def test_a_folder_saved_by_transformers_gives_the_same_logits(old_form, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
        tie_word_embeddings=False,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    if old_form:  # the form that transformers wrote before version 5
        file = tmp_path / "config.json"
        raw = json.loads(file.read_text())
        raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
        file.write_text(json.dumps(raw))
    ids = torch.randint(0, 61, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path).logits(ids), theirs(ids).logits, rtol=0, atol=1e-4)


def test_recomputing_activations_gives_the_same_gradients_and_keeps_fewer_numbers():
    keeping, recomputing = small_model(num_hidden_layers=4), small_model(num_hidden_layers=4)
    configure_layers(recomputing, recompute=True, compiled=False)
    ids, packing, sizes = torch.randint(0, 61, (50,)), Packing([30, 20]), []
    for model in (keeping, recomputing):
        total = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda t, total=total: total.append(t.numel()) or t, lambda t: t):
            loss = model(ids, packing).square().sum()
        loss.backward()
        sizes.append(sum(total))
    for a, b in zip(keeping.parameters(), recomputing.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
    assert sizes[1] < sizes[0] / 4


# Configs of real models with smaller sizes. What matters here is which fields their config.json has.
FAMILIES = {
    "mistral": ("Mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "llama3": (
        "Llama",
        {"rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5}, "eos_token_id": [2, 5]},
    ),
    "wide heads": ("Mistral", {"sliding_window": None, "head_dim": 10}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_model_families_with_the_llama_architecture_match_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    name, more = FAMILIES[family]
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, **more)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load_model(tmp_path)
    ids = torch.randint(0, 61, (2, 90))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=0, atol=1e-4)


def test_llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones():
    config = LlamaConfig(head_dim=64, rope_theta=500000.0, rope_scaling=LLAMA3)
    (plain,) = rotary_frequencies(LlamaConfig(head_dim=64, rope_theta=500000.0))
    (scaled,) = rotary_frequencies(config)
    assert scaled[0] == plain[0]  # wavelength 2 pi, far below 64 / 4
    assert scaled[-1].item() == pytest.approx(plain[-1].item() / 8)  # a wavelength far above 64 / 1


def test_the_7b_preset_has_as_many_parameters_as_llama_2():
    with torch.device("meta"):
        from mpo.model.llama import Llama

        model = Llama(PRESETS["7b"].__class__(**{**PRESETS["7b"].__dict__, "vocab_size": 32000}))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616  # the published number
