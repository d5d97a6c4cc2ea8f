"""Sample, score, compare: from prompts to everything a PPO update needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from kernels import Advantages
from mpo import device, parallel, ppo
from mpo.data.batches import Batch, make_batch
from mpo.errors import InputError
from mpo.guards import NotFinite, not_finite
from mpo.logprobs import Comparison, compare, response_hidden
from mpo.lora import BaseOf
from mpo.model import Llama, ScalarModel, ValueHead
from mpo.sampling import Sampling, generate
from mpo.scoring import score

AGREE = 1e-3  # nats by which sampled and scored log-probs of a token may differ, in fp32
AGREE_BF16 = 0.1  # one token at a time or all together, sums round differently, and what is rounded to bf16 with them
AGREE_HELD_IN_BF16 = 0.5  # where hidden states are rounded, too, layer after layer


@dataclass(frozen=True)
class Rollout:
    """One response to each of B prompts, and what the models say of it."""

    batch: Batch
    tokens: Comparison  # log-probs under policy and reference, exact KL, entropy: (B, R)
    values: Tensor | None  # (B, R): the critic's, of the state before each response token
    scores: Tensor  # (B,): the reward model's, before any penalty
    finished: Tensor  # (B,): True where the response ends in EOS


def state_values(critic: ScalarModel | ValueHead, batch: Batch, hidden: Tensor) -> Tensor:
    """(B, R): the critic's value of the state in which each response token was chosen.

    hidden (M, D) is what the policy knows of these states; a critic of its own looks for itself.
    """
    if isinstance(critic, ValueHead):
        return batch.spread(critic(hidden))
    return batch.spread(critic(batch.ids, batch.pieces)[batch.before])


@torch.no_grad()
def roll_out(
    policy: Llama,
    ref: Llama | BaseOf,
    rm: ScalarModel,
    critic: ScalarModel | ValueHead | None,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    generator: torch.Generator,
    microbatch: int,
) -> Rollout:
    """Sample with the policy and look at the result with every model, `microbatch` rows at a time in each process.

    Errors: InputError when the log-probs of sampling and of scoring differ by more than AGREE:
    then they are two different distributions and every ratio would be wrong. NotFinite for NaN and infinities.
    """
    for model in filter(None, (policy, ref, rm, critic)):
        model.eval()
    samples = generate(policy, prompts, sampling, generator)
    batch = make_batch(list(zip(prompts, samples.responses, strict=True)))
    B, R = batch.response_mask.shape
    mine, here = parallel.share(B), device.here()
    columns = {name: torch.zeros(len(mine), R, device=here) for name in ("logp", "ref_logp", "kl", "entropy", "values")}
    scores = torch.zeros(len(mine), device=here)
    for begin in range(0, len(mine), microbatch):
        at = slice(begin, begin + microbatch)
        part = batch.rows(mine[at])
        hidden = response_hidden(policy, part)
        found = compare(policy, ref, part, sampling.temperature, hidden)._asdict()
        found |= {} if critic is None else {"values": state_values(critic, part, hidden)}
        for name in columns.keys() & found.keys():
            columns[name][at, : found[name].shape[1]] = found[name]
        scores[at] = score(rm, part)
    scores, columns = parallel.gather(scores, B), {n: parallel.gather(c, B) for n, c in columns.items()}
    for name, of_row in (("the reward model's score", scores), *columns.items()):
        if bad := not_finite(of_row, range(B)):
            raise NotFinite(name, bad)
    values = columns.pop("values")
    tokens = Comparison(**columns, mask=batch.response_mask)
    sampled = torch.cat([torch.tensor(x) for x in samples.logps]).to(here)
    check_agreement(sampled, tokens.logp[tokens.mask], "sampling and scoring")
    return Rollout(batch, tokens, None if critic is None else values, scores, torch.tensor(samples.finished).to(here))


def check_agreement(one: Tensor, other: Tensor, names: str) -> float:
    """The largest difference of two sets of log-probs; an error when it is more than rounding."""
    worst, most = float((one - other).abs().max()), AGREE_BF16 if kernels.in_bf16() else AGREE
    most = most if device.dtype() == torch.float32 else AGREE_HELD_IN_BF16
    if not worst <= most:
        raise InputError(
            f"self-check: log-probs of {names} differ by {worst:.2g} nats (more than {most}); the two "
            "must use the same weights, temperature and masks"
        )
    return worst


def rollout_metrics(rollout: Rollout, found: Advantages) -> dict[str, float]:
    """What to watch in PPO, over the whole rollout (docs/metrics.md)."""
    t, mask = rollout.tokens, rollout.tokens.mask
    k1, k3 = (ppo.kl_estimate(t.logp, t.ref_logp, kind) for kind in ("k1", "k3"))  # 0 where masked
    length = mask.sum(1).float()
    together = torch.stack((rollout.scores, length))
    correlation = torch.corrcoef(together)[0, 1] if float(together.std(1).min()) > 0 else torch.tensor(0.0)
    metrics = {
        "score": float(rollout.scores.mean()),
        "score_std": float(rollout.scores.std()),
        "kl_k1": float(k1.sum(1).mean()),
        "kl_k3": float(k3.sum(1).mean()),
        "kl_exact": float(t.kl.sum(1).mean()),
        "entropy": float(ppo.masked_mean(t.entropy, mask)),
        "length": float(length.mean()),
        "eos_rate": float(rollout.finished.float().mean()),
        "score_length_correlation": float(correlation),
        "advantage_std": float(found.advantages[mask].std()),
    }
    if rollout.values is not None:
        metrics["explained_variance"] = ppo.explained_variance(rollout.values, found.returns, mask)
        metrics["return"] = float(ppo.masked_mean(found.returns, mask))
    return metrics
