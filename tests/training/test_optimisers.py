"""The schedule, a step, and the optimisers that need less memory, against calculations by hand and torch's AdamW."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from mpo.model.checkpoint import load_model, save_model
from mpo.model.llama import cast_weights
from mpo.runtime.errors import InputError
from mpo.training.guards import NotFinite
from mpo.training.optimisers import (
    OneByOne,
    adamw,
    learning_rate,
    make_optimiser,
    newton_schulz,
    optimiser_step,
    rounded,
)
from tests.conftest import small_model


def test_the_learning_rate_warms_up_and_then_falls_along_a_line():
    rates = [learning_rate(s, 100, 1.0, 0.1, 0.2) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.2 + 0.8 * 0.5)  # halfway down
    assert rates[99] == pytest.approx(0.2, abs=0.01)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_a_gradient_of_nan_changes_no_weight():
    model = torch.nn.Linear(2, 1)
    before = model.weight.clone()
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    (model(torch.ones(1, 2)) * math.nan).sum().backward()
    with pytest.raises(NotFinite, match="the gradient"):
        optimiser_step(optimiser, model, 1.0, 1.0)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(("grad_clip", "left"), [(1.0, 0.2), (5.0, 1.0), (0.0, 1.0), (1e9, 1.0)])
def test_a_gradient_above_the_clip_is_scaled_down_to_it_and_a_clip_of_0_leaves_it(grad_clip, left):
    """The gradient is (3, 4), of norm 5. SGD at a rate of 0.1 takes a tenth of what is left of it from the weights."""
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.tensor([[3.0, 4.0]])).sum().backward()
    assert optimiser_step(optimiser, model, 0.1, grad_clip) == pytest.approx(5.0)
    expected = before - 0.1 * left * torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_an_infinite_gradient_changes_no_weight_whether_it_is_clipped_or_not(grad_clip):
    model = torch.nn.Linear(2, 1)
    before = model.weight.clone()
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    (model(torch.ones(1, 2)) * math.inf).sum().backward()
    with pytest.raises(NotFinite, match="the gradient"):
        optimiser_step(optimiser, model, 1.0, grad_clip)
    assert torch.equal(model.weight, before)


def gradients(shape, steps, seed=1):
    """Random gradients whose size changes from step to step."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) * 10 ** (i % 3 - 1) for i in range(steps)]


def after_steps(optimiser, p, grads):
    """The weight after one step with each gradient."""
    for g in grads:
        p.grad = g.clone()
        optimiser.step()
    return p.detach()


def test_our_adamw_matches_torchs():
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    groups = [{"params": [ours], "weight_decay": 0.1}]
    actual = after_steps(OneByOne(groups, adamw, 0.03, 1e-8), ours, gradients((3, 4), 7))
    oracle = torch.optim.AdamW([theirs], lr=0.03, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    expected = after_steps(oracle, theirs, gradients((3, 4), 7))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def adafactor_loop(p, grads, lr, decay):
    """Algorithm 4 of 1804.04235 without its first moment, on Python's own numbers. Returns the weight."""
    (rows, columns), R, C = (len(p), len(p[0])), [0.0] * len(p), [0.0] * len(p[0])
    for t, g in enumerate(grads, 1):
        b = 1 - t**-0.8
        squares = [[x * x + 1e-30 for x in row] for row in g]
        R = [b * r + (1 - b) * sum(row) / columns for r, row in zip(R, squares, strict=True)]
        C = [b * c + (1 - b) * sum(row[j] for row in squares) / rows for j, c in enumerate(C)]
        mean = sum(R) / rows
        u = [[x / math.sqrt(r * c / mean) for x, c in zip(row, C, strict=True)] for row, r in zip(g, R, strict=True)]
        rms = math.sqrt(sum(x * x for row in u for x in row) / (rows * columns))
        u = [[x / max(1.0, rms) for x in row] for row in u]
        p = [
            [x * (1 - lr * decay) - lr * y for x, y in zip(row, of_row, strict=True)]
            for row, of_row in zip(p, u, strict=True)
        ]
    return p


def test_adafactor_matches_a_loop_and_keeps_one_row_and_one_column():
    p = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    model = nn.Module()
    model.weight, grads = p, gradients((3, 4), 6)
    expected = adafactor_loop(p.tolist(), [g.tolist() for g in grads], 0.03, 0.1)
    optimiser = make_optimiser(model, 0.03, 0.1, kind="adafactor")
    torch.testing.assert_close(after_steps(optimiser, p, grads), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    shapes = {name: tuple(value.shape) for name, value in optimiser.state[p].items()}
    assert shapes == {"rows": (3,), "columns": (4,), "step": ()}  # not (3, 4)


def test_adafactor_leaves_the_rows_of_tokens_that_do_not_occur_as_they_are():
    """They have no gradient. In fp32, the mean square of such a row, 1e-30, times a small one is 0."""
    g = torch.zeros(3, 4)
    g[1] = torch.tensor([1e-5, 2e-5, -1e-5, 3e-5])
    p = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    model = nn.Module()
    model.weight, expected = p, adafactor_loop(p.tolist(), [g.tolist()] * 3, 0.03, 0.0)
    torch.set_flush_denormal(True)  # as in every stage
    actual = after_steps(make_optimiser(model, 0.03, 0.0, kind="adafactor"), p, [g] * 3)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def muon_by_svd(p, grads, lr, decay):
    """Muon with U V^T from numpy's SVD in float64 in place of the polynomial, whose error is a part of the method."""
    p, m = p.double().numpy(), np.zeros(p.shape)
    for g in (g.double().numpy() for g in grads):
        m = 0.95 * m + 0.05 * g
        u, s, vt = np.linalg.svd(0.05 * g + 0.95 * m, full_matrices=False)
        s = s / np.linalg.norm(s)
        for _ in range(5):  # the polynomial acts on each singular value by itself
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        p = p * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(p.shape)) * (u * s) @ vt
    return torch.tensor(p, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(3, 4), (8, 3), (5, 5)])
def test_muon_moves_a_layers_matrix_by_its_orthogonal_momentum_and_everything_else_by_adamw(shape):
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(shape[1], shape[0]) for _ in range(2))
    model.embed = nn.Embedding(7, 3)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: gradients(p.shape, 4, seed=i) for i, (name, p) in enumerate(start.items())}
    optimiser = make_optimiser(model, 0.03, 0.1, kind="muon")
    for t in range(4):
        for name, p in model.named_parameters():
            p.grad = grads[name][t].clone()
        optimiser.step()
    for name, p in model.named_parameters():
        if name.startswith("layers.") and p.dim() == 2:
            expected = muon_by_svd(start[name], grads[name], 0.03, 0.1)
            assert set(optimiser.state[p]) == {"exp_avg", "step"}
        else:
            theirs = nn.Parameter(start[name])
            decay = 0.1 if p.dim() > 1 else 0.0
            oracle = torch.optim.AdamW([theirs], lr=0.03, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
            expected = after_steps(oracle, theirs, grads[name])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_polynomial_brings_singular_values_near_1_and_keeps_the_directions():
    x = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(1))
    u, s, vt = torch.linalg.svd(newton_schulz(x), full_matrices=False)
    assert 0.65 < float(s.min()) < float(s.max()) < 1.25
    u0, _, vt0 = torch.linalg.svd(x, full_matrices=False)
    cosine = ((u @ vt) * (u0 @ vt0)).sum((1, 2)) / 24
    torch.testing.assert_close(cosine, torch.ones(3), atol=1e-4, rtol=0)


def test_matrices_that_muon_stacks_and_those_it_does_not_change_equally(monkeypatch):
    weights = list[torch.Tensor]()
    for stack in (2**22, 1):
        monkeypatch.setattr("mpo.training.optimisers.STACK", stack)
        model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(6, 4, bias=False) for _ in range(3))})
        for i, p in enumerate(model.parameters()):
            p.data = torch.linspace(-1, 1, 24).view(4, 6)
            p.grad = gradients((4, 6), 3)[i]
        make_optimiser(model, 0.1, 0.0, kind="muon").step()
        weights.append(torch.stack([p.detach() for p in model.parameters()]))
    torch.testing.assert_close(*weights)
    assert not torch.allclose(weights[0][0], weights[0][1], atol=1e-2)


def test_muon_changes_small_bf16_weights_and_refuses_adapters():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4, bias=False)])}).bfloat16()
    p = model["layers"][0].weight
    before = p.detach().float().clone()
    after_steps(make_optimiser(model, 1e-3, 0.0, kind="muon"), p, [torch.eye(4).bfloat16()] * 100)
    moved = (p.detach().float() - before).diag().mean()  # U V^T of the identity is the identity, of length about 1
    assert float(moved) == pytest.approx(-100 * 1e-3 * 0.2 * 2, rel=0.4)
    model["layers"][0].lora_a = nn.Parameter(torch.zeros(2, 4))
    with pytest.raises(InputError, match="--optimiser muon: is for whole matrices"):
        make_optimiser(model, 1e-3, 0.0, kind="muon")


def test_rounding_is_right_on_average_and_gives_a_neighbouring_number():
    """In bf16 the next number above 1 is 1 + 2^-7, so 1 + 2^-9 must be rounded up in a quarter of all cases."""
    for sign in (1.0, -1.0):
        x = torch.full((40_000,), sign * (1 + 2**-9))
        values = rounded(x, torch.Generator().manual_seed(3)).float() * sign
        assert set(values.tolist()) == {1.0, 1 + 2**-7}
        share = float((values > 1).float().mean())
        assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 40_000))
    exact = torch.tensor([0.0, -3.0, 1 + 2**-7, 2.0**100])
    assert torch.equal(rounded(exact, torch.Generator().manual_seed(1)).float(), exact)


def test_small_steps_of_a_bf16_weight_are_not_lost():
    """200 steps of 1e-4 down from 1. Rounding to the nearest would lose each: the next bf16 number is 4e-3 below 1."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    ones = [torch.ones(64, 64, dtype=torch.bfloat16)] * 200
    weight = after_steps(make_optimiser(model, 1e-4, 0.0), model.weight, ones)
    assert weight.dtype == torch.bfloat16
    assert float(weight.float().mean()) == pytest.approx(0.98, abs=1e-3)


def test_a_model_in_bf16_is_saved_in_bf16_and_transformers_reads_it_as_such(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small_model()
    exact = model.logits(torch.arange(3, 23)[None]).detach()
    cast_weights(model, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.frequencies.dtype == torch.float32
    save_model(tmp_path, model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    with torch.no_grad():
        ours = model.logits(torch.arange(3, 23)[None]).float()
        other = theirs(torch.arange(3, 23)[None]).logits.float()
    error = float((ours - exact).abs().mean())
    assert 0 < error < 0.1 * float(exact.std())
    assert float((ours - other).abs().mean()) < 2 * error  # the same model, rounded in two ways
    again = load_model(tmp_path)  # fp32 is the default dtype
    assert again.lm_head.weight.dtype == torch.float32
    assert torch.equal(again.lm_head.weight.bfloat16(), model.lm_head.weight)
