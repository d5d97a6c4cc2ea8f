"""The definitions of the head against independent loops in float64; linear layers; the choice of an implementation."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from tests.support.on_device import kernels


def logits_of(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> list[list[float]]:
    """hidden @ weight.T / temperature, as nested lists."""
    return [
        [sum(h * w for h, w in zip(row, column, strict=True)) / temperature for column in weight.tolist()]
        for row in hidden.tolist()
    ]


def log_normaliser(logits: list[float]) -> float:
    """log sum exp of the logits."""
    largest = max(logits)
    return largest + math.log(sum(math.exp(x - largest) for x in logits))


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    """Hidden states and head of the policy, those of the reference, and targets."""
    g = torch.Generator().manual_seed(0)
    shapes = (5, 7), (13, 7), (5, 7), (13, 7)
    tensors = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    return *tensors, torch.tensor([0, 12, 3, 3, 7])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_log_probs_kl_and_entropy_match_a_loop(inputs, temperature):
    hidden, weight, ref_hidden, ref_weight, targets = inputs
    logp, entropy = kernels.token_logprobs(hidden.float(), weight.float(), targets, temperature)
    both = kernels.policy_reference(
        hidden.float(), weight.float(), ref_hidden.float(), ref_weight.float(), targets, temperature
    )
    p, q = logits_of(hidden, weight, temperature), logits_of(ref_hidden, ref_weight, temperature)
    for i, t in enumerate(targets.tolist()):
        zp, zq = log_normaliser(p[i]), log_normaliser(q[i])
        expected_kl = sum(math.exp(a - zp) * ((a - zp) - (b - zq)) for a, b in zip(p[i], q[i], strict=True))
        expected_entropy = -sum(math.exp(a - zp) * (a - zp) for a in p[i])
        assert logp[i].item() == pytest.approx(p[i][t] - zp, abs=2e-5)
        assert both.logp[i].item() == pytest.approx(p[i][t] - zp, abs=2e-5)
        assert both.ref_logp[i].item() == pytest.approx(q[i][t] - zq, abs=2e-5)
        assert both.kl[i].item() == pytest.approx(expected_kl, abs=2e-5)
        assert entropy[i].item() == pytest.approx(expected_entropy, abs=2e-5)
        assert both.entropy[i].item() == pytest.approx(expected_entropy, abs=2e-5)


def test_gradients_match_finite_differences(inputs):
    hidden, weight, _, _, targets = inputs
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    kernels.token_logprobs(hidden, weight, targets)[0].sum().backward()
    step = 1e-6
    for tensor, name in ((hidden, "hidden"), (weight, "weight")):
        moved = tensor.detach().double()
        for at in ((0, 0), (3, 6), (4, 2)):
            totals = []
            for sign in (1, -1):
                shifted = moved.clone()
                shifted[at] += sign * step
                h = shifted if name == "hidden" else hidden.detach().double()
                w = shifted if name == "weight" else weight.detach().double()
                rows = logits_of(h, w, 1.0)
                totals.append(sum(r[t] - log_normaliser(r) for r, t in zip(rows, targets.tolist(), strict=True)))
            assert tensor.grad[at].item() == pytest.approx((totals[0] - totals[1]) / (2 * step), abs=1e-4)


def test_sampling_inverts_the_cdf_and_returns_the_log_prob_of_each_token():
    # Logits ln(1), ln(2), ln(5) give the probabilities 1/8, 2/8, 5/8, so the CDF jumps at 0.125 and 0.375.
    weight = torch.tensor([[math.log(1.0)], [math.log(2.0)], [math.log(5.0)]])
    uniform = torch.tensor([0.0, 0.124, 0.126, 0.374, 0.376, 0.999999])
    tokens, logps = kernels.sample_tokens(torch.ones(6, 1), weight, uniform)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    expected = [math.log(p) for p in (1 / 8, 1 / 8, 2 / 8, 2 / 8, 5 / 8, 5 / 8)]
    assert logps.tolist() == pytest.approx(expected, abs=1e-6)


def test_extreme_logits_give_finite_results():
    weight = torch.tensor([[1e4], [-1e4], [0.0]])
    logp, entropy = kernels.token_logprobs(torch.ones(3, 1), weight, torch.tensor([0, 1, 2]))
    assert logp.tolist() == [0.0, -2e4, -1e4]
    assert entropy.isfinite().all()
    tokens, _ = kernels.sample_tokens(torch.ones(2, 1), weight, torch.tensor([0.0, 0.99999]))
    assert tokens.tolist() == [0, 0]


def test_an_empty_input_is_allowed_and_an_unknown_implementation_is_not():
    empty = kernels.token_logprobs(torch.zeros(0, 4), torch.zeros(5, 4), torch.zeros(0, dtype=torch.long))
    assert [t.shape for t in empty] == [(0,), (0,)]
    with pytest.raises(ValueError, match="expected one of reference"):
        kernels.token_logprobs(torch.zeros(1, 4), torch.zeros(5, 4), torch.zeros(1, dtype=torch.long), impl="x")


if "cpu" in kernels.IMPLEMENTATIONS:
    from mpo.kernels.cpu import binding

needs_cpu = pytest.mark.skipif("cpu" not in kernels.IMPLEMENTATIONS, reason="the compiled kernels are not built")


@needs_cpu
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (5, 7, 3), (64, 128, 352), (33, 352, 129), (961, 24, 1), (70, 1024, 800)]
)
def test_the_compiled_linear_layer_is_about_as_near_to_float64_as_plain_torch(m, k, n):
    g = torch.Generator().manual_seed(m)
    x, weight, dy = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((m, k), (n, k), (m, n)))
    exact = (x @ weight.T, dy @ weight, dy.T @ x)
    errors = {}
    for impl in ("reference", "cpu"):
        leaves = x.float().requires_grad_(), weight.float().requires_grad_()
        y = kernels.linear(*leaves, impl=impl)
        y.backward(dy.float())
        actual = (y.detach(), leaves[0].grad, leaves[1].grad)
        errors[impl] = [float((a - b).abs().max()) for a, b in zip(actual, exact, strict=True)]
    for ours, plain in zip(errors["cpu"], errors["reference"], strict=True):
        assert ours <= 2 * plain + 1e-6  # both round, so neither is exact


@needs_cpu
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1100, 40, 70), (61, 1100, 1500), (300, 512, 96), (64, 2048, 33)],
    ids=["parts of rows", "blocks of k and columns", "rows in the same sets of a cache", "the same, few rows"],
)
def test_products_larger_than_a_block_match_float64_with_any_number_of_threads(m, k, n, bf16):
    g = torch.Generator().manual_seed(m)
    a, b = torch.randn(m, k, generator=g), torch.randn(k, n, generator=g)
    exact = (a.bfloat16().double() @ b.bfloat16().double()) if bf16 else a.double() @ b.double()
    threads, products = torch.get_num_threads(), {}
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for name, (left, right) in {
                "x W^T": (a, b.t().contiguous().t()),
                "dy W": (a, b),
                "dy^T x": (a.t().contiguous().t(), b),
            }.items():
                products[count, name] = binding.matmul(left, right, bf16)
    finally:
        torch.set_num_threads(threads)
    for (_, name), product in products.items():
        torch.testing.assert_close(product.double(), exact, rtol=0, atol=2e-6 * k)
        assert torch.equal(product, products[1, name])  # threads change no bit


@needs_cpu
def test_a_row_of_a_product_does_not_depend_on_the_rows_beside_it():
    a, b = torch.randn(700, 300), torch.randn(300, 50)
    whole = binding.matmul(a, b)
    for rows in (slice(0, 120), slice(100, 301), slice(3, 700)):
        assert torch.equal(binding.matmul(a[rows].clone(), b), whole[rows])


@needs_cpu
def test_thin_and_small_products_in_fp32_are_those_of_torch_and_still_round_in_bf16():
    """A scalar head, and the products of an adapter of rank 4."""
    x, dy, one, A, B = (
        torch.randn(90, 40),
        torch.randn(90, 4),
        torch.randn(1, 40),
        torch.randn(4, 40),
        torch.randn(40, 4),
    )
    assert torch.equal(kernels.linear(x, one), torch.nn.functional.linear(x, one))
    assert torch.equal(binding.matmul(dy, B.t()), dy @ B.t())
    assert torch.equal(binding.matmul(dy.t(), x), dy.t() @ x)
    assert torch.equal(binding.matmul(x, x.t()[:, :20]), x @ x.t()[:, :20])  # not thin, but small
    rounded = dy.bfloat16().double() @ A.bfloat16().double()
    torch.testing.assert_close(binding.matmul(dy, A, bf16=True).double(), rounded, rtol=1e-5, atol=1e-5)


@needs_cpu
def test_the_compiled_linear_layer_accepts_any_strides_and_leading_shape():
    g = torch.Generator().manual_seed(1)
    big, weight = torch.randn(6, 5, 20, generator=g), torch.randn(9, 10, generator=g)
    for x in (big[:, :, ::2], big[:, 1:4, :10], big.transpose(0, 1)[:, :, 10:], big[:0, :, :10]):
        for w in (weight, weight.flip(0), torch.randn(10, 9, generator=g).t()):
            expected = torch.nn.functional.linear(x, w)
            torch.testing.assert_close(kernels.linear(x, w, impl="cpu"), expected, rtol=1e-5, atol=1e-5)
            x_, w_ = x.clone().requires_grad_(), w.clone().requires_grad_()
            kernels.linear(x_, w_, impl="cpu").sum().backward()  # the gradient of a sum is expanded, with stride 0
            torch.testing.assert_close(w_.grad, x.sum((0, 1)).expand(9, 10), rtol=1e-4, atol=1e-4)


@needs_cpu
def test_only_tensors_that_require_a_gradient_get_one():
    x, weight = torch.randn(4, 3), torch.randn(2, 3, requires_grad=True)
    kernels.linear(x, weight, impl="cpu").sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_the_default_implementation_can_be_set_to_plain_torch(monkeypatch):
    x, weight = torch.randn(40, 30), torch.randn(20, 30)
    monkeypatch.setattr(kernels, "default", "reference")
    assert torch.equal(kernels.linear(x, weight), torch.nn.functional.linear(x, weight))
    assert kernels.linear(x.double(), weight.double(), impl="reference").dtype == torch.float64
    with pytest.raises(ValueError, match="expected one of reference"):
        kernels.linear(x, weight, impl="fast")


def test_bf16_tensors_are_computed_by_plain_torch():
    x, weight = torch.randn(4, 3).bfloat16(), torch.randn(2, 3).bfloat16()
    assert torch.equal(kernels.linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("impl", [name for name in kernels.IMPLEMENTATIONS if name in ("cpu", "gpu")])
@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 33, 7), (70, 64, 96), (300, 50, 601)], ids=str)
def test_products_in_bf16_round_their_operands_but_not_the_sums(shape, impl):
    M, N, K = shape
    x, w, weights = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
    rounded = [t.bfloat16().double().requires_grad_() for t in (x, w)]
    y = rounded[0] @ rounded[1].T
    y.backward(weights.bfloat16().double())
    kernels.use_bf16(True)
    try:
        leaves = [x.requires_grad_(), w.requires_grad_()]
        actual = kernels.linear(*leaves, impl=impl)
        actual.backward(weights)
        torch.testing.assert_close(kernels.linear(x, w, impl="reference").detach(), y.float(), rtol=1e-4, atol=1e-4)
    finally:
        kernels.use_bf16(False)
    torch.testing.assert_close(actual.detach().double(), y.detach(), rtol=1e-5, atol=1e-4)
    for leaf, exact in zip(leaves, rounded, strict=True):
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-4)


def test_without_products_only_the_cache_is_rounded_to_bf16():
    x, weight = torch.randn(70, 30), torch.randn(20, 30)
    exact = kernels.linear(x, weight)
    kernels.use_bf16(True, products=False)
    try:
        assert torch.equal(kernels.linear(x, weight), exact)
        assert kernels.kv_cache(1, 1, 4, 1, 4, x, impl="reference").store.dtype == torch.bfloat16
        assert kernels.in_bf16()
    finally:
        kernels.use_bf16(False)
    assert not kernels.in_bf16()


@needs_cpu
def test_a_processor_multiplies_bf16_where_it_says_so():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "MPO_KERNELS_FLAGS" in os.environ or "flags" not in flags:
        pytest.skip("the kernels are built for another processor, or this one does not list its instructions")
    assert kernels.multiplies_bf16(torch.device("cpu")) == ("avx512_bf16" in flags)
    assert kernels.multiplies_bf16(torch.device("cuda"))


@needs_cpu
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_linear_layer_keeps_for_its_gradient_only_what_it_needs(bf16):
    """Of a frozen weight no gradient is computed, so the input need not be kept; and the other way round."""
    kept = list[torch.Tensor]()
    kernels.use_bf16(bf16)
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            for x, weight, expected in (
                (torch.randn(70, 30, requires_grad=True), torch.randn(20, 30), "weight"),
                (torch.randn(70, 30), torch.randn(20, 30, requires_grad=True), "x"),
            ):
                kept.clear()
                kernels.linear(x, weight, impl="cpu").sum().backward()
                assert [list(t.shape) for t in kept] == [[20, 30] if expected == "weight" else [70, 30]]
    finally:
        kernels.use_bf16(False)


@needs_cpu
def test_rounding_to_bf16_keeps_nan_and_infinity():
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [2.0, 1.0]])
    kernels.use_bf16(True)
    try:
        sums = kernels.linear(x, torch.ones(1, 2), impl="cpu").squeeze(1)
    finally:
        kernels.use_bf16(False)
    assert sums.isnan().tolist() == [True, False, False]
    assert sums[1:].tolist() == [float("inf"), 3.0]


@needs_cpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_declaring_the_weights_constant_does_not_change_the_samples(dtype):
    hidden, weight, uniform = torch.randn(29, 17).to(dtype), torch.randn(203, 17).to(dtype), torch.rand(29)
    plain = kernels.sample_tokens(hidden, weight, uniform, 0.7, impl="cpu")
    with kernels.constant_weights():
        for _ in range(2):
            for one, other in zip(plain, kernels.sample_tokens(hidden, weight, uniform, 0.7, impl="cpu"), strict=True):
                assert torch.equal(one, other)
