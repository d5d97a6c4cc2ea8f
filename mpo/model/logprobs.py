"""From a model and a batch to the log-prob of each response token.

The head, which is the costly part with a real vocabulary, is applied only where a response token is predicted. The
hidden state that predicts a token is that of the token before it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mpo.data.batches import Batch
from mpo.kernels import functions as kernels
from mpo.model.llama import Llama
from mpo.model.lora import BaseModel


class TokenLogprobs(NamedTuple):
    """For each response token, (B, R), zero where the mask is False; fp32, in nats."""

    logp: Tensor
    entropy: Tensor
    mask: Tensor  # True = counts


class Comparison(NamedTuple):
    """Policy and reference for each response token, (B, R), zero where the mask is False; fp32, in nats."""

    logp: Tensor
    ref_logp: Tensor
    kl: Tensor  # exact, over the whole vocabulary
    entropy: Tensor
    mask: Tensor


def response_hidden(model: Llama | BaseModel, batch: Batch) -> Tensor:
    """The hidden states that predict the M response tokens: (M, D)."""
    hidden: Tensor = model(batch.ids, batch.packing, wanted=batch.predictors)
    return hidden


def _targets(batch: Batch) -> Tensor:
    return batch.ids[batch.response_tokens]  # (M,)


def response_logprobs(
    model: Llama, batch: Batch, temperature: float = 1.0, hidden: Tensor | None = None
) -> TokenLogprobs:
    """Log-prob of every response token, and the entropy of its distribution. `hidden`: if it is known already."""
    hidden = response_hidden(model, batch) if hidden is None else hidden
    logp, entropy = kernels.token_logprobs(hidden, model.lm_head.weight, _targets(batch), temperature)
    return TokenLogprobs(batch.unpack(logp), batch.unpack(entropy), batch.response_mask)


def compare(
    policy: Llama, ref: Llama | BaseModel, batch: Batch, temperature: float = 1.0, hidden: Tensor | None = None
) -> Comparison:
    """Log-probs under both models and the exact KL(policy || ref) of each token. `hidden`: the policy's, if known."""
    flat = kernels.policy_reference(
        response_hidden(policy, batch) if hidden is None else hidden,
        policy.lm_head.weight,
        response_hidden(ref, batch),
        ref.lm_head.weight,
        _targets(batch),
        temperature,
    )
    logp, ref_logp, kl, entropy = (batch.unpack(values) for values in flat)
    return Comparison(logp, ref_logp, kl, entropy, batch.response_mask)


def sequence_logps(model: Llama, batch: Batch) -> Tensor:
    """(B,): log-prob of each complete response, EOS included."""
    return response_logprobs(model, batch).logp.sum(-1)
