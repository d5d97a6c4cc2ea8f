"""What a frozen model knows of preferences: python -m experiments.probe --model FOLDER --data FOLDER --out FILE

A linear probe. The model is not trained. Each response is described by the hidden states of one layer: the one of its
last token, and the mean over its tokens. A logistic regression without a constant learns from the difference between
the chosen and the rejected response, which is Bradley and Terry's model with a linear reward. Its accuracy on held-out
pairs says, in minutes, what a reward model with this trunk can reach at least. Its accuracy with fewer rows hints at
what more rows would bring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpo import evaluation
from mpo.config import Limits, Size
from mpo.data.batches import Pair, encode, make_batch
from mpo.data.rows import read_rows
from mpo.data.tokenizer import shared_tokenizer
from mpo.model.checkpoint import load_model
from mpo.model.llama import Llama
from mpo.runtime.entry import run
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_json
from mpo.runtime.output import interval, progress, table
from mpo.runtime.seeding import generator
from mpo.runtime.setup import setup_torch

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the squared weights, compared by cross-validation
FOLDS = 5
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the training pairs, for the last table


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(Limits):
    """Fit a linear probe on the hidden states of each layer."""

    model: str  # folder of the model
    data: str  # folder of the data stage
    batch: Size = 16  # pairs computed at once
    every: Size = 3  # look at every third layer, and at the last one


@torch.no_grad()
def features(model: Llama, pairs: Sequence[Pair], batch: int) -> Tensor:
    """(layers + 1, pairs, 2D): chosen minus rejected, of the last token's hidden state and of the tokens' mean."""
    states: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *call: states.append(call[2])) for layer in model.model.layers]
    hooks.append(model.model.embed_tokens.register_forward_hook(lambda *call: states.append(call[2])))
    parts = []
    for start in progress(range(0, len(pairs), batch), "hidden states"):
        part = pairs[start : start + batch]
        sequences = [(p.prompt, p.chosen) for p in part] + [(p.prompt, p.rejected) for p in part]
        packed = make_batch(sequences)
        states.clear()
        model.model(packed.ids, packed.packing)
        of_row = packed.response_mask.nonzero()[:, 0]  # (M,): the row of each response token
        lengths = packed.response_mask.sum(1, keepdim=True)  # (2B, 1)
        layers = []
        for x in states:
            sums = torch.zeros(len(sequences), x.shape[1], device=x.device).index_add_(
                0, of_row, x[packed.response_tokens].float()
            )
            both = torch.cat([x[packed.last].float(), sums / lengths], 1)  # (2B, 2D)
            chosen, rejected = both.chunk(2)
            layers.append(chosen - rejected)
        parts.append(torch.stack(layers).cpu())
    for hook in hooks:
        hook.remove()
    return torch.cat(parts, 1)


def fit(x: Tensor, penalty: float) -> Tensor:
    """The weights (D,) that minimise the mean of -log sigmoid(x w) plus penalty * |w|^2, by Newton's method.

    The problem is convex, so the result does not depend on the start.
    """
    n, d = x.shape
    w = torch.zeros(d, dtype=x.dtype)
    for _ in range(30):
        p = torch.sigmoid(x @ w)  # (N,): the probability of the label that was given
        gradient = x.T @ (p - 1) / n + 2 * penalty * w
        hessian = (x.T * (p * (1 - p))) @ x / n + 2 * penalty * torch.eye(d, dtype=x.dtype)
        step = torch.linalg.solve(hessian, gradient)
        w = w - step
        if float(step.abs().max()) < 1e-4 * float(w.abs().max()):
            break
    return w


def accuracy(x: Tensor, w: Tensor) -> Tensor:
    """(N,): 1 where the chosen response has the higher reward."""
    return (x @ w > 0).double()


def cross_validated(x: Tensor, seed: int) -> tuple[float, float]:
    """The penalty with the best accuracy over folds of the training pairs, and this accuracy."""
    order = torch.randperm(len(x), generator=generator(seed, "folds"))
    scores = []
    for penalty in PENALTIES:
        right = []
        for held in order.chunk(FOLDS):
            rest = torch.ones(len(x), dtype=torch.bool)
            rest[held] = False
            right.append(accuracy(x[held], fit(x[rest], penalty)))
        scores.append((float(torch.cat(right).mean()), penalty))
    best, penalty = max(scores)
    return penalty, best


def probe(train: Tensor, test: Tensor, seed: int) -> dict[str, Any]:
    """Fit on the training pairs (N, D); accuracy by cross-validation, and on the test pairs with its interval."""
    scale = train.square().mean(0).sqrt().clamp_min(1e-9)  # the features of a layer differ in size by orders
    x, held_out = train / scale, test / scale
    penalty, inside = cross_validated(x, seed)
    right = accuracy(held_out, fit(x, penalty))
    return {"penalty": penalty, "cross_validated": inside, "held_out": evaluation.bootstrap(right.numpy(), seed)}


def main(config: ProbeConfig) -> None:
    """Compute hidden states; fit a probe on each layer; with the best one, fit it again on fewer rows."""
    if Path(config.out).exists() and not config.overwrite:
        raise InputError(f"--out {config.out}: is there already; name another file, or add --overwrite true")
    setup_torch(config)
    tokenizer = shared_tokenizer([("--model", config.model)])
    model = load_model(config.model)
    model.eval()
    train, test = (
        features(model, encode(read_rows(file), tokenizer, config.max_prompt, config.max_response)[0], config.batch)
        for file in (Path(config.data) / "train.jsonl", Path(config.data) / "test.jsonl")
    )
    looked = sorted({*range(0, len(train), config.every), len(train) - 1})
    layers = {i: probe(train[i], test[i], config.seed) for i in progress(looked, "probes")}
    best = max(looked, key=lambda i: float(layers[i]["cross_validated"]))
    order = torch.randperm(train.shape[1], generator=generator(config.seed, "rows"))
    rows = {n: probe(train[best][order[:n]], test[best], config.seed) for n in (int(s * len(order)) for s in SHARES)}
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(
        Path(config.out), {"layers": layers, "best": best, "rows": rows, "train": len(order), "test": test.shape[1]}
    )
    shown = [[str(i), f"{p['cross_validated']:.3f}", interval(p["held_out"], 3)] for i, p in layers.items()]
    print(table(["layer", "cross-validated", "held out"], shown))
    shown = [[str(n), f"{p['cross_validated']:.3f}", interval(p["held_out"], 3)] for n, p in rows.items()]
    print(f"layer {best}, by the number of training pairs:\n" + table(["pairs", "cross-validated", "held out"], shown))


if __name__ == "__main__":
    run(main, ProbeConfig)
