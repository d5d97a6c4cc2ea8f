"""Kernels: a transformer's layers, log-probs of tokens, exact KL, sampling. Knows nothing of mpo.

Every public function takes `impl=`: the name of an implementation, or None for the best one here.
"reference" (reference.py) is the definition in plain torch, and what MPO_KERNELS=reference in the
environment makes of None; "cpu" (cpu/, cpp/) is compiled by `make setup` and never holds the
logits; "chunked" (chunked.py) does without a compiler, and holds few of them; "gpu" (gpu/) is Triton's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import chunked, reference
from .packing import Packing as Packing
from .reference import KVCache as KVCache
from .reference import LayerWeights as LayerWeights
from .weight_cache import constant_weights as constant_weights
from .weight_cache import derived

default = os.environ.get("MPO_KERNELS") or None  # the implementation where none is named; None: the best one
IMPLEMENTATIONS: dict[str, ModuleType] = {"reference": reference, "chunked": chunked}
try:
    from . import cpu

    IMPLEMENTATIONS["cpu"] = cpu
except OSError:
    if default != "reference":
        print(
            "kernels: kernels/cpp is not compiled for this processor (make setup); using plain torch", file=sys.stderr
        )


if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    try:
        from . import gpu

        IMPLEMENTATIONS["gpu"] = gpu
    except ImportError:
        print("kernels: triton is not installed; using plain torch on the GPU", file=sys.stderr)

_bf16 = False


def use_bf16(on: bool) -> None:
    """Whether matrix products round what they multiply to bf16 from now on; sums and results stay fp32."""
    global _bf16
    _bf16 = on


def in_bf16() -> bool:
    """Whether they do."""
    return _bf16


def _rounded(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The head's operands, in bf16 where that is wanted."""
    if not _bf16:
        return hidden, weight
    return hidden.bfloat16(), derived("bf16", weight, Tensor.bfloat16)


class PolicyReference(NamedTuple):
    """Per-token results of one pass over policy and reference, each of shape (N,)."""

    logp: Tensor
    ref_logp: Tensor
    kl: Tensor
    entropy: Tensor


def _implementation(impl: str | None, function: str, *tensors: Tensor) -> ModuleType:
    """The one dispatch rule: the named implementation, or the last of the list that takes these tensors."""
    impl = impl or default
    if torch.compiler.is_compiling():  # which makes its own programs, of torch's operations
        return reference
    if impl is not None:
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
        return IMPLEMENTATIONS[impl] if hasattr(IMPLEMENTATIONS[impl], function) else reference
    for module in reversed(IMPLEMENTATIONS.values()):
        if hasattr(module, function) and (module is reference or module.takes(function, *tensors)):
            return module
    return reference


def linear(x: Tensor, weight: Tensor, impl: str | None = None) -> Tensor:
    """x (..., K) times weight (N, K) transposed -> (..., N), differentiable in both."""
    result: Tensor = _implementation(impl, "linear", x, weight).linear(x, weight, _bf16)
    return result


def rms_norm(x: Tensor, weight: Tensor, eps: float, impl: str | None = None) -> Tensor:
    """x (N, D) over its root mean square, times weight (D,) -> (N, D) (1910.07467); differentiable in both."""
    result: Tensor = _implementation(impl, "rms_norm", x, weight).rms_norm(x, weight, eps)
    return result


def swiglu(gate: Tensor, up: Tensor, impl: str | None = None) -> Tensor:
    """silu(gate) * up, all (N, F) (2002.05202); differentiable in both."""
    result: Tensor = _implementation(impl, "swiglu", gate, up).swiglu(gate, up)
    return result


def rotate(x: Tensor, cos: Tensor, sin: Tensor, impl: str | None = None) -> Tensor:
    """Rotary positions (2104.09864): x (N, H, d), cos and sin (N, d/2) -> (N, H, d); differentiable in x."""
    result: Tensor = _implementation(impl, "rotate", x, cos).rotate(x, cos, sin)
    return result


def attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, impl: str | None = None) -> Tensor:
    """Causal attention within packed texts (packing.py), with grouped queries (2305.13245).

    Args: q (N, H, d); k, v (N, H_kv, d), each head of which serves H / H_kv query heads.
    Returns: (N, H, d); differentiable in all three.
    """
    result: Tensor = _implementation(impl, "attention", q, k).attention(q, k, v, packing, _bf16)
    return result


def kv_cache(
    layers: int, rows: int, length: int, heads: int, dim: int, like: Tensor, impl: str | None = None
) -> reference.KVCache:
    """An empty cache (reference.KVCache) for `rows` texts of at most `length` tokens, typed like `like`, or bf16."""
    module = _implementation(impl, "KVCache", like, like)
    dtype = torch.bfloat16 if _bf16 else like.dtype
    result: reference.KVCache = module.KVCache(layers, rows, length, heads, dim, dtype, like.device)
    return result


def decoder(
    layers: Sequence[LayerWeights], norm: Tensor, eps: float, cache: reference.KVCache, impl: str | None = None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A step of generation through all layers of a Llama (reference.decoder), whose weights do not change meanwhile.

    Args: layers; norm (D,), the last one; cache, filled, of the same implementation.
    Returns: a function of x (B, D), the embeddings of one more token of each row, and of cos and sin (B, d/2)
    of its angles, that stores its keys and values and returns its normed hidden states (B, D).
    """
    step: Callable[[Tensor, Tensor, Tensor], Tensor] = _implementation(impl, "decoder", norm, norm).decoder(
        layers, norm, eps, cache, _bf16
    )
    return step


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of its distribution, softmax(hidden @ weight.T / temperature).

    Args: hidden (N, D); weight (V, D), the head; targets (N,) int64 in [0, V).
    Returns: logp (N,) and entropy (N,), fp32, in nats; logp is differentiable in hidden and weight.
    """
    hidden, weight = _rounded(hidden, weight)
    module = _implementation(impl, "token_logprobs", hidden, weight)
    result: tuple[Tensor, Tensor] = module.token_logprobs(hidden, weight, targets, temperature)
    return result


def policy_reference(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    impl: str | None = None,
) -> PolicyReference:
    """Log-probs under policy and reference, exact KL(policy || reference) and policy entropy.

    Args: hidden, ref_hidden (N, D); weight, ref_weight (V, D); targets (N,).
    Returns: four (N,) fp32 tensors in nats; logp and kl are differentiable in the policy's hidden and weight.
    """
    (hidden, weight), (ref_hidden, ref_weight) = _rounded(hidden, weight), _rounded(ref_hidden, ref_weight)
    module = _implementation(impl, "policy_reference", hidden, weight)
    parts = module.policy_reference(hidden, weight, ref_hidden, ref_weight, targets, temperature)
    return PolicyReference(*parts)


def sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token from softmax(hidden @ weight.T / temperature), by inverting its CDF at `uniform`.

    Args: hidden (N, D); weight (V, D); uniform (N,) in [0, 1), the only randomness.
    Returns: tokens (N,) int64 and their log-probs (N,) fp32 under that same distribution.
    """
    hidden, weight = _rounded(hidden, weight)
    module = _implementation(impl, "sample_tokens", hidden, weight)
    result: tuple[Tensor, Tensor] = module.sample_tokens(hidden, weight, uniform, temperature)
    return result
