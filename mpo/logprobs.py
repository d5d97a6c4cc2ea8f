"""From a model and a batch to per-token log-probs: the one bridge between model and kernels.

Hidden states are taken at response positions only, so that the head (the costly part with a
real vocabulary) never sees a prompt token. A token is predicted by the hidden state of the one
before it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

import kernels
from mpo.data.batches import Batch
from mpo.lora import BaseOf
from mpo.model import Llama


class TokenLogprobs(NamedTuple):
    """Per response token, each (B, R), zero where the mask is False; fp32, in nats."""

    logp: Tensor
    entropy: Tensor
    mask: Tensor  # True = counts


class Comparison(NamedTuple):
    """Policy against reference per response token, each (B, R), zero where the mask is False."""

    logp: Tensor
    ref_logp: Tensor
    kl: Tensor  # exact, over the whole vocabulary
    entropy: Tensor
    mask: Tensor


def response_hidden(model: Llama | BaseOf, batch: Batch) -> Tensor:
    """Hidden states that predict the response tokens: (M, D), M = number of response tokens."""
    hidden: Tensor = model(batch.ids, batch.pieces)  # (N, D)
    return hidden.index_select(0, batch.before)


def _targets(batch: Batch) -> Tensor:
    return batch.ids[batch.response_tokens]  # (M,)


def response_logprobs(
    model: Llama, batch: Batch, temperature: float = 1.0, hidden: Tensor | None = None
) -> TokenLogprobs:
    """Log-prob of every response token, and the entropy of its distribution; `hidden` where it is known already."""
    hidden = response_hidden(model, batch) if hidden is None else hidden
    logp, entropy = kernels.token_logprobs(hidden, model.lm_head.weight, _targets(batch), temperature)
    return TokenLogprobs(batch.spread(logp), batch.spread(entropy), batch.response_mask)


def compare(
    policy: Llama, ref: Llama | BaseOf, batch: Batch, temperature: float = 1.0, hidden: Tensor | None = None
) -> Comparison:
    """Log-probs of both models and their exact per-token KL(policy || ref), in one pass; `hidden`: the policy's."""
    flat = kernels.policy_reference(
        response_hidden(policy, batch) if hidden is None else hidden,
        policy.lm_head.weight,
        response_hidden(ref, batch),
        ref.lm_head.weight,
        _targets(batch),
        temperature,
    )
    logp, ref_logp, kl, entropy = (batch.spread(values) for values in flat)
    return Comparison(logp, ref_logp, kl, entropy, batch.response_mask)


def sequence_logps(model: Llama, batch: Batch) -> Tensor:
    """(B,): log-prob of each whole response, EOS included."""
    return response_logprobs(model, batch).logp.sum(-1)
