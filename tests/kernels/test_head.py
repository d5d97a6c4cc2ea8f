"""Every implementation of the head against float64, with plain torch in the same dtype as the yardstick."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from mpo.kernels import chunked
from tests.support.on_device import DEVICE, ON_GPU, kernels

of_cpu = () if ON_GPU else ("cpu",)
IMPLEMENTATIONS = [name for name in kernels.IMPLEMENTATIONS if name in ("chunked", "gpu", *of_cpu)]
SHAPES = [(1, 1, 1), (1, 2, 3), (5, 7, 13), (12, 32, 32), (13, 31, 33), (37, 96, 1537), (3, 300, 70)]  # N, D, V


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request, monkeypatch):
    """The name of an implementation; each test runs with all of them."""
    monkeypatch.setattr(chunked, "CHUNK", 100)  # so that even small inputs are divided into chunks
    return request.param


def make(n: int, d: int, v: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Random hidden states and head of a policy, those of a reference close to it, and targets."""
    g = torch.Generator().manual_seed(n * 1000 + v)
    hidden, ref_hidden = (torch.randn(n, d, generator=g) * scale for _ in range(2))
    weight = torch.randn(v, d, generator=g) / d**0.5
    ref_weight = weight + 0.1 * torch.randn(v, d, generator=g) / d**0.5
    tensors = (hidden, weight, ref_hidden, ref_weight)
    return *(t.to(dtype) for t in tensors), torch.randint(v, (n,), generator=g)


def truth(inputs: tuple[Tensor, ...], temperature: float) -> tuple[Tensor, ...]:
    """logp, ref_logp, KL and entropy in float64, from their definitions."""
    hidden, weight, ref_hidden, ref_weight, targets = inputs
    z, r = (h.double() @ w.double().T / temperature for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    log_p, log_q = z - z.logsumexp(-1, keepdim=True), r - r.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    rows = torch.arange(len(z), device=z.device)
    return log_p[rows, targets], log_q[rows, targets], (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)


def errors(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """The largest error of each tensor."""
    return [float((a.detach().double() - e).abs().max()) for a, e in zip(actual, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_forward_pass_is_as_near_to_float64_as_plain_torch(impl, shape, dtype, temperature):
    inputs = make(*shape, dtype)
    exact = truth(inputs, temperature)
    ours = errors(kernels.policy_reference(*inputs, temperature, impl=impl), exact)
    plain = errors(kernels.policy_reference(*inputs, temperature, impl="reference"), exact)
    assert all(a <= b + 1e-5 for a, b in zip(ours, plain, strict=True)), (ours, plain)
    hidden, weight, *_, targets = inputs
    single = errors(kernels.token_logprobs(hidden, weight, targets, temperature, impl=impl), (exact[0], exact[3]))
    assert single[0] <= plain[0] + 1e-5
    assert single[1] <= plain[3] + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_as_near_to_float64_as_plain_torch(impl, shape, dtype):
    inputs, temperature = make(*shape, dtype), 0.8
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(2, shape[0], generator=g, dtype=torch.float64)

    def gradients(tensors: tuple[Tensor, ...], how: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors[:2]]
        if how == "truth":
            logp, _, kl, _ = truth((*leaves, *tensors[2:]), temperature)
        else:
            logp, _, kl, _ = kernels.policy_reference(*leaves, *tensors[2:], temperature, impl=how)
        (logp * weights[0] + kl * weights[1]).sum().backward()
        of_logp_and_kl = [leaf.grad.clone() for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        if how == "truth":
            logp = truth((*leaves, *tensors[2:]), temperature)[0]
        else:
            logp, _ = kernels.token_logprobs(*leaves, tensors[4], temperature, impl=how)
        (logp * weights[0]).sum().backward()
        return of_logp_and_kl + [leaf.grad for leaf in leaves]

    exact = gradients(tuple(t.double() if t.is_floating_point() else t for t in inputs), "truth")
    ours, plain = (errors(tuple(gradients(inputs, how)), tuple(exact)) for how in (impl, "reference"))
    sizes = [float(e.abs().max()) for e in exact]
    for a, b, size in zip(ours, plain, sizes, strict=True):
        assert a <= b + (1e-5 if dtype == torch.float32 else 1e-2) * size + 1e-6, (ours, plain, sizes)


def test_extreme_logits_and_ties_match_a_calculation_by_hand(impl):
    weight = torch.tensor([[1e4], [-1e4], [0.0], [1e4]])  # the two largest logits are equal
    targets = torch.tensor([0, 1, 2, 3])
    logp, entropy = kernels.token_logprobs(torch.ones(4, 1), weight, targets, impl=impl)
    ln2 = 0.6931472
    assert logp.tolist() == pytest.approx([-ln2, -2e4 - ln2, -1e4 - ln2, -ln2], rel=1e-6)
    assert entropy.tolist() == pytest.approx([ln2] * 4, rel=1e-5)
    ones, ref = torch.ones(4, 1, requires_grad=True), torch.zeros(4, 1)
    both = kernels.policy_reference(ones, weight, ref, weight, targets, impl=impl)  # the reference is uniform over 4
    assert both.kl.tolist() == pytest.approx([ln2] * 4, rel=1e-5)  # ln 4 - ln 2
    assert both.ref_logp.tolist() == pytest.approx([-2 * ln2] * 4, rel=1e-6)
    (both.logp.sum() + both.kl.sum()).backward()
    assert ones.grad.isfinite().all()


def test_nan_in_a_hidden_state_makes_its_own_log_prob_nan_and_no_other(impl):
    hidden = torch.ones(3, 2)
    hidden[1, 0] = float("nan")
    logp, _ = kernels.token_logprobs(hidden, torch.ones(40, 2), torch.tensor([1, 2, 39]), impl=impl)
    assert logp.isnan().tolist() == [False, True, False]


def test_an_empty_batch_is_allowed(impl):
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.long)
    logp, entropy = kernels.token_logprobs(hidden, weight, targets, impl=impl)
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()
    assert kernels.policy_reference(hidden, weight, hidden, weight, targets, impl=impl).kl.shape == (0,)
    assert kernels.sample_tokens(hidden, weight, torch.zeros(0), impl=impl)[0].shape == (0,)


@pytest.mark.parametrize("bad", [-1, 5])
def test_a_target_outside_the_vocabulary_raises(impl, bad):
    with pytest.raises((IndexError, RuntimeError)):
        kernels.token_logprobs(torch.ones(2, 4), torch.ones(5, 4), torch.tensor([0, bad]), impl=impl)


def test_inputs_may_have_any_strides(impl):
    hidden, weight, *_, targets = make(9, 16, 50, torch.float32)
    expected = kernels.token_logprobs(hidden, weight, targets, impl="reference")[0]
    strided = torch.stack((hidden, hidden), 2)[:, :, 0], weight.t().contiguous().t(), targets.repeat_interleave(2)[::2]
    torch.testing.assert_close(kernels.token_logprobs(*strided, impl=impl)[0], expected)


def test_the_reference_may_have_another_width(impl):
    hidden, weight, *_, targets = make(9, 16, 50, torch.float32)
    ref_hidden, ref_weight, *_ = make(9, 40, 50, torch.float32)
    inputs = hidden, weight, ref_hidden, ref_weight, targets
    assert max(errors(kernels.policy_reference(*inputs, impl=impl), truth(inputs, 1.0))) < 1e-5


def test_a_policy_that_is_its_own_reference_has_equal_log_probs_and_a_kl_of_0(impl):
    hidden, weight, *_, targets = make(20, 16, 500, torch.float32, scale=5.0)
    both = kernels.policy_reference(hidden, weight, hidden, weight, targets, impl=impl)
    assert torch.equal(both.logp, both.ref_logp)
    assert both.kl.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_sampling_inverts_the_cdf(impl, dtype, temperature):
    hidden, weight, *_ = make(64, 24, 777, dtype, scale=3.0)
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(3))
    tokens, logp = kernels.sample_tokens(hidden, weight, uniform, temperature, impl=impl)
    z = hidden.double() @ weight.double().T / temperature
    log_p = z.log_softmax(-1)
    cdf = log_p.exp().cumsum(-1)
    rows = torch.arange(64)
    tolerance = 1e-5 * float(z.abs().max())  # of log-probs; rounding grows with the logits
    # The token is the first one whose cumulative probability exceeds the random number.
    assert (cdf[rows, tokens] >= uniform - tolerance).all()
    before = torch.where(tokens > 0, cdf[rows, (tokens - 1).clamp(min=0)], torch.zeros(64, dtype=torch.double))
    assert (before <= uniform + tolerance).all()
    torch.testing.assert_close(logp.double(), log_p[rows, tokens], atol=tolerance, rtol=0)


def test_sampled_frequencies_follow_the_distribution(impl):
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    n = 2_000 if impl == "gpu" and not ON_GPU else 20_000  # Triton's interpreter is slow
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(4))
    tokens, _ = kernels.sample_tokens(torch.ones(n, 1), probabilities.log()[:, None], uniform, impl=impl)
    share = tokens.bincount(minlength=5) / n
    assert (share - probabilities).abs().max() < 4 * (0.25 / n) ** 0.5


def test_the_compiled_kernels_never_hold_the_logits():
    """At N = 4096 and V = 32,000 the logits would take 524 MB."""
    if "cpu" not in kernels.IMPLEMENTATIONS or ON_GPU:
        pytest.skip("the compiled kernels are not built, or not meant")
    if "sanitize" in os.environ.get("MPO_KERNELS_FLAGS", ""):
        pytest.skip("the address sanitizer keeps freed memory")
    import resource

    hidden, weight, *_, targets = make(4096, 32, 32_000, torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    leaf = hidden.requires_grad_()
    kernels.token_logprobs(leaf, weight, targets, impl="cpu")[0].sum().backward()
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # MiB on Linux
    assert growth < 60


@pytest.mark.parametrize("impl", sorted(kernels.IMPLEMENTATIONS.keys() - ({"cpu"} if ON_GPU else {"gpu"})))
def test_the_order_of_sums_does_not_depend_on_the_timing_of_threads(impl):
    """With three threads, 21 repetitions give the same bytes, forward and backward."""
    draw, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    h, rh = (torch.randn(300, 96, generator=draw) for _ in range(2))
    w = torch.randn(1536, 96, generator=draw) * 0.3
    targets = torch.randint(1536, (300,), generator=draw)
    x = torch.randn(3000, 96, generator=draw)

    def once():
        inputs = [t.clone().requires_grad_() for t in (h, w, x, torch.ones(96))]
        both = kernels.policy_reference(inputs[0], inputs[1], rh, w, targets, impl=impl)
        normed = kernels.rms_norm(inputs[2], inputs[3], 1e-5, impl=impl)
        (both.logp.sum() + both.kl.sum() + normed.square().sum()).backward()
        return [t.detach() for t in both] + [t.grad for t in inputs]

    torch.set_num_threads(3)
    try:
        first = once()
        for _ in range(20):
            for a, b in zip(first, once(), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU (make gpu-check); the interpreter would take hours")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(2048, 256, 8192), (300, 576, 49152), (96, 1024, 128256)], ids=str)
def test_the_head_of_a_real_model_is_as_near_to_float64_as_plain_torch(shape, dtype):
    """Values and gradients, with the widths and vocabularies of models that people use."""
    hidden, weight, ref_hidden, ref_weight, targets = (t.to(DEVICE) for t in make(*shape, dtype))

    def values(how: str) -> list[Tensor]:
        double = how == "truth"
        leaves = [t.double() if double else t.clone() for t in (hidden, weight)]
        inputs = *(leaf.requires_grad_() for leaf in leaves), ref_hidden, ref_weight, targets
        both = truth(inputs, 1.0) if double else kernels.policy_reference(*inputs, impl=how)
        (both[0].sum() + both[2].sum()).backward()
        return [t.detach().cpu() for t in (*both, *(leaf.grad for leaf in leaves))]

    exact = values("truth")
    ours, plain = (errors(tuple(values(how)), tuple(e.double() for e in exact)) for how in ("gpu", "chunked"))
    for a, b, e in zip(ours, plain, exact, strict=True):
        assert a <= 2 * b + (1e-5 if dtype == torch.float32 else 1e-2) * float(e.abs().max()), (ours, plain)
