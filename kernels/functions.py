"""The public functions: a transformer's layers, log-probs of tokens, exact KL, sampling, and the KV cache.

This folder knows nothing of the rest of mpo. Each function takes `impl`, the name of an implementation:

    reference  the definition, in plain torch (reference.py)
    chunked    the head in plain torch, a few rows at a time, so that only few logits exist at once (chunked.py)
    cpu        C++ that `make setup` compiles; never holds the logits (cpu/, cpp/)
    gpu        Triton, for NVIDIA GPUs; never holds the logits (gpu/)

None stands for the one that the environment variable MPO_KERNELS names, or else for the fastest one that takes the
tensors. An implementation that lacks a function uses the definition. An unknown name raises ValueError.
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
from .build import INSTALLED, build_once, library
from .packing import Packing as Packing
from .reference import KVCache as KVCache
from .reference import LayerWeights as LayerWeights
from .weight_cache import constant_weights as constant_weights
from .weight_cache import derived

default = os.environ.get("MPO_KERNELS") or None  # what impl=None stands for; None: the fastest implementation
IMPLEMENTATIONS: dict[str, ModuleType] = {"reference": reference, "chunked": chunked}


def _load_compiled() -> bool:
    """Use the compiled kernels from now on; False where they have not been compiled for this processor."""
    try:
        from . import cpu
    except (OSError, RuntimeError):  # RuntimeError: no home to look in
        return False
    IMPLEMENTATIONS["cpu"] = cpu
    return True


def compile_once() -> None:
    """In an installed package: compile the C++ if that has not been done, and use it from now on.

    In a checkout `make setup` does it. What cannot be compiled is computed in plain torch, after one line that says so.
    """
    global _tried
    if _tried or not INSTALLED or "cpu" in IMPLEMENTATIONS or default not in (None, "cpu"):
        return
    _tried = True
    lack = build_once()
    if not (lack or _load_compiled()):
        lack = f"{library()} cannot be loaded"
    if lack and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"kernels: {lack}; using plain torch, which is slower", file=sys.stderr)


_tried = False
if not _load_compiled() and not INSTALLED and default != "reference":
    print("kernels: kernels/cpp is not compiled for this processor (make setup); using plain torch", file=sys.stderr)

# device_count does not start CUDA, as is_available would; a process that has started it cannot use it after a fork.
if torch.cuda.device_count() or os.environ.get("TRITON_INTERPRET") == "1":
    try:
        from . import gpu

        IMPLEMENTATIONS["gpu"] = gpu
    except ImportError as e:
        print(f"kernels: {e}; using plain torch on the GPU", file=sys.stderr)

_bf16, _bf16_cache = False, False


def use_bf16(on: bool, products: bool = True) -> None:
    """From now on, round to bf16, or stop doing so: the operands of matrix products, and the cache of generation.

    Sums and results stay fp32. Without `products`, only the cache is rounded.
    """
    global _bf16, _bf16_cache
    _bf16, _bf16_cache = on and products, on


def rounding() -> tuple[bool, bool]:
    """What `use_bf16` was last called with."""
    return _bf16_cache, _bf16


def in_bf16() -> bool:
    """True where products or the cache are rounded to bf16."""
    return _bf16_cache


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products of bf16 numbers are faster than those of fp32 numbers on this device.

    On a CPU they need an instruction of their own (AVX512-BF16). Without it each number would be converted first.
    """
    return device.type != "cpu" or ("cpu" in IMPLEMENTATIONS and IMPLEMENTATIONS["cpu"].MULTIPLIES_BF16)


def _rounded(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of the head's product, converted to bf16 after use_bf16(True)."""
    if not _bf16:
        return hidden, weight
    return hidden.bfloat16(), derived("bf16", weight, Tensor.bfloat16)


class PolicyReference(NamedTuple):
    """The results of one pass over policy and reference, for each of N tokens; (N,) each, fp32, in nats."""

    logp: Tensor  # of the target under the policy
    ref_logp: Tensor  # of the target under the reference
    kl: Tensor  # KL(policy || reference), summed over the whole vocabulary
    entropy: Tensor  # of the policy


def _implementation(impl: str | None, function: str, *tensors: Tensor) -> ModuleType:
    """The one dispatch rule: the named implementation, or the last one in IMPLEMENTATIONS that takes these tensors."""
    impl = impl or default
    if torch.compiler.is_compiling():  # torch.compile makes its own kernels, and only from torch's operations
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
    """x W^T: x (..., K), weight W (N, K) -> (..., N). Differentiable in both."""
    result: Tensor = _implementation(impl, "linear", x, weight).linear(x, weight, _bf16)
    return result


def rms_norm(x: Tensor, weight: Tensor, eps: float, impl: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight: x (..., D), weight (D,) -> (..., D). Differentiable in both.

    Source: 1910.07467.
    """
    result: Tensor = _implementation(impl, "rms_norm", x, weight).rms_norm(x, weight, eps)
    return result


def swiglu(gate: Tensor, up: Tensor, impl: str | None = None) -> Tensor:
    """silu(gate) * up: (N, F) each -> (N, F). Differentiable in both. Source: 2002.05202."""
    result: Tensor = _implementation(impl, "swiglu", gate, up).swiglu(gate, up)
    return result


def rotate(x: Tensor, cos: Tensor, sin: Tensor, impl: str | None = None) -> Tensor:
    """Rotary positions: x (N, H, d), cos and sin of the angles (N, d/2) -> (N, H, d). Differentiable in x.

    Source: 2104.09864.
    """
    result: Tensor = _implementation(impl, "rotate", x, cos).rotate(x, cos, sin)
    return result


def attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None = None, impl: str | None = None
) -> Tensor:
    """Causal attention within packed texts (packing.py), with grouped queries. Source: 2305.13245.

    Args:
        q: queries (N, H, d).
        k, v: keys and values (N, H_kv, d); each of their heads serves H / H_kv heads of queries.
        packing: how the N tokens make up texts.
        window: how many tokens a token attends to, itself and those before it; None for all. A window that hides
            anything is computed by the definition, whatever `impl` is.

    Returns:
        (N, H, d), differentiable in q, k and v.

    Raises:
        ValueError: the packing has another number of tokens than q. Only the compiled kernel checks this.
    """
    if (hiding := packing.hiding(window)) is not None:
        return reference.attention(q, k, v, packing, _bf16, hiding)
    result: Tensor = _implementation(impl, "attention", q, k).attention(q, k, v, packing, _bf16)
    return result


def kv_cache(
    layers: int, rows: int, length: int, heads: int, dim: int, like: Tensor, impl: str | None = None
) -> reference.KVCache:
    """An empty KV cache, with the interface of reference.KVCache.

    Args:
        layers: how many layers store keys and values.
        rows: texts in the cache.
        length: the most tokens that one text may have.
        heads: heads of keys, H_kv.
        dim: width d of a head.
        like: a tensor whose device the cache takes, and whose dtype, except that use_bf16(True) means bf16.
    """
    module = _implementation(impl, "KVCache", like, like)
    dtype = torch.bfloat16 if _bf16_cache else like.dtype
    result: reference.KVCache = module.KVCache(layers, rows, length, heads, dim, dtype, like.device)
    return result


def decoder(
    layers: Sequence[LayerWeights], norm: Tensor, eps: float, cache: reference.KVCache
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function that takes one more token of each text through all layers of a Llama, Qwen2 or Qwen3. No gradients.

    The weights must not change as long as the function is used, since it may hold copies of them.

    Args:
        layers: the weights of each layer.
        norm: the weight of the last RMSNorm (D,).
        eps: of every RMSNorm.
        cache: made by `kv_cache`, and already filled with the beginnings of B texts. It decides the implementation.

    Returns:
        A function of the tokens' embeddings (B, D), and of cos and sin of their angles (B, d/2), that stores their
        keys and values in the cache and returns their hidden states after the last norm (B, D).
    """
    return cache.decoder(layers, norm, eps, _bf16)


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs of given tokens, and the entropy of the distribution softmax(hidden @ weight.T / temperature).

    Args:
        hidden: hidden states (N, D).
        weight: the head (V, D).
        targets: one token for each hidden state, (N,) int64 in [0, V).
        temperature: divides the logits.

    Returns:
        logp (N,) and entropy (N,), fp32, in nats. logp is differentiable in hidden and weight.

    Raises:
        IndexError: a target is outside [0, V). In plain torch this is a RuntimeError.
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
    """Log-probs of given tokens under policy and reference, exact KL(policy || reference), and the policy's entropy.

    Args:
        hidden, weight: the policy's hidden states (N, D) and head (V, D).
        ref_hidden, ref_weight: those of the reference, (N, D_ref) and (V, D_ref).
        targets: one token for each hidden state, (N,) int64 in [0, V).
        temperature: divides the logits of both.

    Returns:
        Four tensors (N,), fp32, in nats. logp and kl are differentiable in hidden and weight.

    Raises:
        IndexError: a target is outside [0, V). In plain torch this is a RuntimeError.
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
    """Draw tokens from softmax(hidden @ weight.T / temperature), by inverting the cumulative distribution.

    Args:
        hidden: hidden states (N, D).
        weight: the head (V, D).
        uniform: random numbers (N,) in [0, 1), one for each draw; there is no other randomness.
        temperature: divides the logits.

    Returns:
        The tokens (N,) int64, and their log-probs under the same distribution (N,), fp32, in nats.
    """
    hidden, weight = _rounded(hidden, weight)
    module = _implementation(impl, "sample_tokens", hidden, weight)
    result: tuple[Tensor, Tensor] = module.sample_tokens(hidden, weight, uniform, temperature)
    return result
