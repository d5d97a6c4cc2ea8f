"""One way to compute log-probs from hidden states: python -m benchmarks.heads CASE N V D THREADS

N is the number of hidden states, V the size of the vocabulary, D the width. Some ways run in the peers' environment, so
each way imports the libraries that it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import turns

Way = Callable[..., Any]


def plain(h: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropy as a textbook computes them. h (N, D), w (V, D), targets (N,)."""
    logps = (h @ w.T).log_softmax(-1)
    return logps.gather(-1, targets[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


def plain_pair(h: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, rh: torch.Tensor, rw: torch.Tensor) -> Any:
    """Log-probs under both models, exact KL and entropy as a textbook computes them."""
    logps, ref = (h @ w.T).log_softmax(-1), (rh @ rw.T).log_softmax(-1)
    p, at = logps.exp(), targets[:, None]
    return logps.gather(-1, at), ref.gather(-1, at), (p * (logps - ref)).sum(-1), -(p * logps).sum(-1)


def way(case: str) -> Way:
    """The function of a case. Its arguments are hidden, weight, targets; for "-pair" also ref_hidden, ref_weight."""
    if case in ("ours", "ours-pair", "linear"):
        from mpo.kernels import functions as kernels

        if case == "linear":  # the product alone, by this project's kernel
            return lambda h, w, t: kernels.linear(h, w)
        if case == "ours":
            return kernels.token_logprobs
        return lambda h, w, t, rh, rw: kernels.policy_reference(h, w, rh, rw, t)
    if case == "trl":
        from trl.trainer.utils import selective_log_softmax

        return lambda h, w, t: selective_log_softmax((h @ w.T)[None], t[None])
    if case == "cut-cross-entropy":
        from cut_cross_entropy import linear_cross_entropy

        return lambda h, w, t: linear_cross_entropy(h, w, t, reduction="none", impl="torch_compile")
    functions: dict[str, Way] = {
        "product": lambda h, w, t: h @ w.T,
        "product-pair": lambda h, w, t, rh, rw: (h @ w.T, rh @ rw.T),
        "plain": plain,
        "plain-pair": plain_pair,
        "torch.compile": torch.compile(plain),
        "torch.compile-pair": torch.compile(plain_pair),
        "linear_cross_entropy": lambda h, w, t: torch.nn.functional.linear_cross_entropy(h, w, t, reduction="none"),
    }
    return functions[case]


def step(
    case: str, N: int, V: int, D: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], object]:
    """One step of a case at a size. "-backward" adds the gradient of the sum of the log-probs."""
    backward = case.endswith("-backward")
    function = way(case.removesuffix("-backward"))
    draw = torch.Generator().manual_seed(0)
    h, rh = (torch.randn(N, D, generator=draw).to(device, dtype) for _ in range(2))
    w, rw = ((torch.randn(V, D, generator=draw) * 0.1).to(device, dtype) for _ in range(2))
    targets = torch.randint(V, (N,), generator=draw).to(device)
    rest = (rh, rw) if "-pair" in case else ()
    if not backward:
        return torch.no_grad()(lambda: function(h, w, targets, *rest))
    h.requires_grad_(), w.requires_grad_()

    def both() -> None:
        result = function(h, w, targets, *rest)
        (result if isinstance(result, torch.Tensor) else result[0]).sum().backward()
        h.grad = w.grad = None

    return both


if __name__ == "__main__":
    name, (N, V, D, threads) = turns.arguments("python -m benchmarks.heads CASE N V D THREADS", 4)
    torch.set_num_threads(threads)
    turns.serve(step(name, N, V, D))
