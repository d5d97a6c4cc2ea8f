"""The linear probe: its features against single forward passes, its fit against gradient descent in float64."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.probe import ProbeConfig, features, fit, main
from mpo.data.batches import Pair
from mpo.data.rows import Row
from mpo.kernels.packing import Packing
from mpo.runtime.errors import InputError
from tests.conftest import small_model


def states_of(model, prompt, response):
    """The hidden states of a response, (layers + 1, R, D): each layer computed by itself, on this text alone."""
    ids = torch.tensor(prompt + response)
    packing = Packing([len(ids)], [-1], ids.device)
    x, ropes = model.model.embed(ids), model.model.ropes(packing.positions)
    states = [x]
    for i, (layer, rope) in enumerate(zip(model.model.layers, ropes, strict=True)):
        states.append(x := layer(x, rope, packing, None, i, None))
    return torch.stack(states)[:, len(prompt) :]


def test_a_feature_is_the_difference_of_last_and_mean_hidden_states():
    model = small_model().eval()
    row = Row("a", "p", "c", "r")
    pairs = [Pair(row, [1, 7, 8], [9, 10, 2], [11, 2]), Pair(row, [1, 5], [6, 2], [12, 13, 14, 2])]
    for batch in (1, 2):
        x = features(model, pairs, batch)
        for i, pair in enumerate(pairs):
            with torch.no_grad():
                chosen, rejected = (states_of(model, pair.prompt, side) for side in (pair.chosen, pair.rejected))
            expected = torch.cat([chosen[:, -1] - rejected[:, -1], chosen.mean(1) - rejected.mean(1)], 1)
            torch.testing.assert_close(x[:, i], expected, rtol=1e-4, atol=1e-5)


def test_the_fit_is_the_minimum_that_gradient_descent_finds():
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(60, 4, generator=draw, dtype=torch.float64) + torch.tensor([1.0, 0.0, -0.5, 0.0])
    penalty, w = 0.01, torch.zeros(4, dtype=torch.float64)
    for _ in range(20_000):
        w = w - 0.1 * ((x.T * (torch.sigmoid(x @ w) - 1)).mean(1) + 2 * penalty * w)
    torch.testing.assert_close(fit(x, penalty), w, rtol=1e-4, atol=1e-6)


def test_the_command_writes_its_numbers_once(hh_run, tmp_path, capsys):
    config = ProbeConfig(model=str(hh_run / "sft"), data=str(hh_run / "data"), out=str(tmp_path / "x.json"), threads=1)
    main(config)
    assert "layer" in capsys.readouterr().out
    written = json.loads((tmp_path / "x.json").read_text())
    assert set(written) == {"layers", "best", "rows", "train", "test"}
    assert str(written["best"]) in written["layers"]
    assert list(map(int, written["rows"]))[-1] == written["train"]
    with pytest.raises(InputError, match="is there already"):
        main(config)
