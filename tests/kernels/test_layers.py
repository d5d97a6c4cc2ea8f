"""The compiled layers of a transformer against their definitions in float64, forward and backward, on odd shapes."""

from __future__ import annotations

import pytest
import torch

from mpo.kernels.functions import LayerWeights, Packing
from tests.support.on_device import ON_GPU, kernels

pytestmark = pytest.mark.skipif(
    "cpu" not in kernels.IMPLEMENTATIONS and not ON_GPU, reason="the compiled kernels are not built"
)
HERE = "reference" if ON_GPU else "cpu"  # on a GPU torch's own operations compute the layers

PACKINGS = {
    "one token": Packing([1]),
    "texts": Packing([5, 1, 33, 12, 70]),
    "families": Packing([7, 3, 1, 13, 40, 24, 50], [-1, 0, 0, -1, 3, 3, 3]),
    "long": Packing([300, 130, 260], [-1, 0, 0]),
}
HEADS = [(4, 2, 6), (8, 8, 32), (3, 1, 40), (2, 2, 64), (6, 3, 24)]  # H, H_kv, d


def compare(function, *inputs, rest=(), tolerance=1e-4 if ON_GPU else 2e-5):
    """Compare the output and every gradient of the compiled function with those of the definition in float64."""
    actual, expected = [], []
    for impl, kind, into in ((HERE, torch.float32, actual), ("reference", torch.float64, expected)):
        leaves = [x.clone().to(kind).requires_grad_() for x in inputs]
        out = function(*leaves, *rest, impl=impl)
        weights = torch.linspace(-1, 1, out.numel(), dtype=kind).view(out.shape)
        (out * weights).sum().backward()
        into += [out.detach(), *(leaf.grad for leaf in leaves)]
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=tolerance * max(1.0, float(exact.abs().max())))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS.keys())
def test_attention_matches_its_definition(packing, heads):
    H, KV, d = heads
    N = int(packing.lengths.sum())
    generator = torch.Generator().manual_seed(N + d)
    q, k, v = (torch.randn(N, h, d, generator=generator) * 1.5 for h in (H, KV, KV))
    compare(kernels.attention, q, k, v, rest=(packing,))


@pytest.mark.parametrize("window", [1, 4, 29, 1000])
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS.keys())
def test_a_window_hides_all_but_the_last_tokens_of_a_text(packing, window):
    """Each text by itself, by a softmax over exactly those keys that are within the window."""
    N = int(packing.lengths.sum())
    g = torch.Generator().manual_seed(N)
    q, k, v = (torch.randn(N, 2, 6, generator=g, dtype=torch.float64) for _ in range(3))
    out = kernels.attention(q.float(), k.float(), v.float(), packing, window=window)
    for segment, (start, length) in enumerate(zip(packing.starts.tolist(), packing.lengths.tolist(), strict=True)):
        parent = int(packing.parents[segment])
        first = int(packing.starts[parent]) if parent >= 0 else start
        before = list(range(first, first + int(packing.parent_lengths[segment])))
        for i in range(start, start + length, 7):
            seen = (before + list(range(start, i + 1)))[-window:]
            weights = (torch.einsum("hd,nhd->hn", q[i], k[seen]) / 6**0.5).softmax(-1)
            expected = torch.einsum("hn,nhd->hd", weights, v[seen])
            torch.testing.assert_close(out[i].double(), expected, rtol=0, atol=1e-5)


def test_a_window_that_hides_nothing_costs_nothing():
    packing = Packing([5, 9, 20], [-1, 0, 0])  # texts of up to 25 tokens
    assert (packing.hiding(24), packing.hiding(25), packing.hiding(None)) == (24, None, None)


def test_attention_with_extreme_scores_matches_its_definition():
    packing, big = Packing([3, 2, 4], [-1, 0, 0]), 1e4
    q, k, v = (torch.randn(9, 2, 8, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    out = kernels.attention(big * q, big * k, v, packing, impl="cpu")
    exact = kernels.attention(big * q.double(), big * k.double(), v.double(), packing, impl="reference")
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-4)  # each query gives one key all the weight


def test_a_packing_with_another_number_of_tokens_is_refused():
    x = torch.randn(5, 1, 4)
    with pytest.raises(ValueError, match="packing of 4 tokens, but 5 queries"):
        kernels.attention(x, x, x, Packing([4]), impl="cpu")


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (200, 96), (65, 256)], ids=str)
def test_rms_norm_matches_its_definition(shape):
    x, weight = torch.randn(shape) * 3, torch.randn(shape[1])
    compare(kernels.rms_norm, x, weight, rest=(1e-5,))


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (300, 96)], ids=str)
def test_swiglu_matches_its_definition(shape):
    compare(kernels.swiglu, torch.randn(shape) * 20, torch.randn(shape))


def test_swiglu_is_exact_far_from_0():
    gate = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]])
    out = kernels.swiglu(gate, torch.ones(1, 5), impl="cpu")
    assert out.tolist() == [[0.0, 0.0, 0.0, 90.0, 1e4]]


@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 6), (150, 4, 32)], ids=str)
def test_rotate_matches_its_definition(shape):
    angles = torch.randn(shape[0], shape[2] // 2).double()
    results = []
    for impl, kind in ((HERE, torch.float32), ("reference", torch.float64)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kind).requires_grad_()
        out = kernels.rotate(x, angles.cos().to(kind), angles.sin().to(kind), impl=impl)
        out.square().mul(torch.linspace(0, 1, shape[2], dtype=kind)).sum().backward()
        results.append((out.detach().double(), x.grad.double()))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("more", ["", "biases", "norms", "biases and norms"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_the_decoder_matches_its_definition_while_texts_end_and_are_copied(heads, more, bf16):
    """Two layers, and a cache that is filled in two parts. The compiled decoder is compared with float64."""
    H, KV, d = heads
    D, F, g = 37, 70, torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    shapes = ((D,), (H * d, D), (KV * d, D), (KV * d, D), (D, H * d), (D,), (F, D), (F, D), (D, F))
    vectors = {"biases": {"q_bias": H * d, "k_bias": KV * d, "v_bias": KV * d}, "norms": {"q_norm": d, "k_norm": d}}
    optional = {name: size for kind, sizes in vectors.items() if kind in more for name, size in sizes.items()}
    layers = [
        LayerWeights(
            *(random(*s) / s[-1] ** 0.5 + (len(s) == 1) for s in shapes),
            **{name: random(size) + 0.5 for name, size in optional.items()},
        )
        for _ in range(2)
    ]
    starts, rest, first = Packing([5, 1]), Packing([30]), random(2, 36, KV, d)
    caches, steps = {}, {}
    kernels.use_bf16(bf16)
    try:
        for impl, kind in (("cpu", torch.float32), ("reference", torch.float64)):
            cache = caches[impl] = kernels.kv_cache(2, 3, 45, KV, d, torch.zeros(1, dtype=kind), impl=impl)
            for part, tokens in ((starts, slice(0, 6)), (rest, slice(6, 36))):
                for layer in range(2):
                    cache.fill(layer, *(layer + first[:, tokens]).to(kind), part)
                cache.begin(part.lengths)
            weights = [LayerWeights(*(None if x is None else x.to(kind) for x in w)) for w in layers]
            steps[impl] = kernels.decoder(weights, layers[0].mlp_norm.to(kind), 1e-5, cache)
    finally:
        kernels.use_bf16(False)
    for rows in ([0, 0, 2, 1], [3, 1, 2], None, [1], [0, 0]):
        if rows:
            for cache in caches.values():
                cache.take(torch.tensor(rows))
        B = len(caches["cpu"].lengths)
        x, angles = random(B, D), random(B, d // 2)
        exact = steps["reference"](x, angles.cos(), angles.sin())
        actual = steps["cpu"](x.float(), angles.cos().float(), angles.sin().float())
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=0.1 if bf16 else 2e-5)


def test_fp32_tensors_use_the_compiled_layers_and_float64_tensors_the_definition():
    x = torch.ones(64, 8)
    for function in ("linear", "rms_norm", "swiglu", "rotate", "attention", "KVCache"):
        assert kernels._implementation(None, function, x, x).__name__ == "mpo.kernels.cpu"
        assert kernels._implementation(None, function, x.double(), x.double()).__name__ == "mpo.kernels.reference"
