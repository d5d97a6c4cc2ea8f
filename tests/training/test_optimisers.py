"""Schedule, step, and the optimisers that take less memory: by hand, and against torch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mpo.model.checkpoint import load_model, save_model
from mpo.model.llama import cast_weights
from mpo.training.guards import NotFinite
from mpo.training.optimisers import LowMemory, adamw, learning_rate, make_optimiser, optimiser_step, rounded
from tests.conftest import small_model


def test_the_schedule_by_hand():
    rates = [learning_rate(s, 100, 1.0, 0.1, 0.2) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.2 + 0.8 * 0.5)  # halfway down the cosine
    assert rates[99] == pytest.approx(0.2, abs=1e-3)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_a_gradient_that_is_not_finite_touches_no_weight():
    model = torch.nn.Linear(2, 1)
    before = model.weight.clone()
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    (model(torch.ones(1, 2)) * math.nan).sum().backward()
    with pytest.raises(NotFinite, match="the gradient"):
        optimiser_step(optimiser, model, 1.0, 1.0)
    assert torch.equal(model.weight, before)


def gradients(shape, steps, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) * 10 ** (i % 3 - 1) for i in range(steps)]


def stepped(optimiser, p, grads):
    for g in grads:
        p.grad = g.clone()
        optimiser.step()
    return p.detach()


def test_adamw_is_torchs():
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    groups = [{"params": [ours], "weight_decay": 0.1}]
    found = stepped(LowMemory(groups, adamw, 0.03, 1e-8), ours, gradients((3, 4), 7))
    oracle = torch.optim.AdamW([theirs], lr=0.03, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    torch.testing.assert_close(found, stepped(oracle, theirs, gradients((3, 4), 7)), rtol=1e-6, atol=1e-7)


def adafactor_by_hand(p, grads, lr, decay):
    """Algorithm 4 of the paper with its first moment left out, in Python's own numbers."""
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


def test_adafactor_by_hand():
    p = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    model = nn.Module()
    model.weight, grads = p, gradients((3, 4), 6)
    expected = adafactor_by_hand(p.tolist(), [g.tolist() for g in grads], 0.03, 0.1)
    optimiser = make_optimiser(model, 0.03, 0.1, kind="adafactor")
    torch.testing.assert_close(stepped(optimiser, p, grads), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    held = {name: tuple(value.shape) for name, value in optimiser.state[p].items()}
    assert held == {"rows": (3,), "columns": (4,), "step": ()}  # not (3, 4)


def test_rounding_is_right_on_average_and_goes_to_a_neighbour():
    """1 + 2^-7 is the number above 1 in bf16; 1 + 2^-9 lies a quarter of the way there."""
    for sign in (1.0, -1.0):
        x = torch.full((40_000,), sign * (1 + 2**-9))
        found = rounded(x, torch.Generator().manual_seed(3)).float() * sign
        assert set(found.tolist()) == {1.0, 1 + 2**-7}
        share = float((found > 1).float().mean())
        assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 40_000))
    exact = torch.tensor([0.0, -3.0, 1 + 2**-7, 2.0**100])
    assert torch.equal(rounded(exact, torch.Generator().manual_seed(1)).float(), exact)


def test_small_steps_of_a_bf16_weight_are_not_lost():
    """200 steps of 1e-4 from 1: to nearest none would be taken, since half of the next number's distance is 2e-3."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    found = stepped(make_optimiser(model, 1e-4, 0.0), model.weight, [torch.ones(64, 64, dtype=torch.bfloat16)] * 200)
    assert found.dtype == torch.bfloat16
    assert float(found.float().mean()) == pytest.approx(0.98, abs=1e-3)


def test_a_model_held_in_bf16_is_saved_and_opens_so(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small_model()
    exact = model.logits(torch.arange(3, 23)[None])
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
    assert float((ours - other).abs().mean()) < 2 * error  # two ways of rounding the same model
    again = load_model(tmp_path)  # in fp32, where nothing else is asked for
    assert again.lm_head.weight.dtype == torch.float32
    assert torch.equal(again.lm_head.weight.bfloat16(), model.lm_head.weight)
