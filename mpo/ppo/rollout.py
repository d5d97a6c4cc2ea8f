"""Sample responses and look at them with every model: from prompts to all that a PPO update needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpo.config import PPOConfig
from mpo.data.batches import Batch, Pair, make_batch
from mpo.kernels import functions as kernels
from mpo.model.generate import Sampling, generate
from mpo.model.llama import Llama, ScalarModel, ValueHead
from mpo.model.logprobs import compare, response_hidden
from mpo.model.lora import BaseModel
from mpo.model.scoring import Scorer, score, state_values
from mpo.runtime import device, distributed
from mpo.runtime.errors import InputError
from mpo.runtime.flags import exact_div
from mpo.runtime.seeding import generator
from mpo.training.guards import NotFinite, not_finite

# How far the log-probs of a token, sampled and scored, may differ, in nats. One token at a time and all together, sums
# round differently; in bf16 more so, most of all where hidden states are rounded layer after layer.
TOLERANCE = 1e-3
TOLERANCE_BF16_MIXED = 0.1
TOLERANCE_BF16 = 0.5


@dataclass(frozen=True)
class Rollout:
    """B responses, with what the models say of each token. A prompt may have several (--group). Masked values are 0."""

    batch: Batch
    mask: Tensor  # (B, R): True on response tokens
    logp: Tensor  # (B, R): under the policy that sampled
    ref_logp: Tensor  # (B, R): under the reference
    kl_exact: Tensor  # (B, R): KL(policy || reference), summed over the whole vocabulary
    entropy: Tensor  # (B, R): of the policy
    values: Tensor | None  # (B, R): the critic's, of the state before each token; None without a critic
    scores: Tensor  # (B,): the reward model's, before any penalty
    finished: Tensor  # (B,): True where the response ends in EOS


def prompt_batches(pairs: Sequence[Pair], config: PPOConfig) -> Iterator[list[Pair]]:
    """Endless batches of rows, each row `group` times. Every row comes once before any comes again."""
    prompts = exact_div(config.batch, config.group, "--batch", "--group")
    epoch, waiting = 0, list[int]()
    while True:
        while len(waiting) < prompts:
            waiting += torch.randperm(len(pairs), generator=generator(config.seed, "prompts", epoch)).tolist()
            epoch += 1
        yield [pairs[i] for i in waiting[:prompts] for _ in range(config.group)]
        waiting = waiting[prompts:]


@torch.no_grad()
def roll_out(
    policy: Llama,
    ref: Llama | BaseModel,
    rm: ScalarModel,
    critic: ScalarModel | ValueHead | None,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    generator: torch.Generator,
    microbatch: int,
    scorer: Scorer = score,
) -> Rollout:
    """Sample a response to each prompt and measure it with every model, `microbatch` rows at a time.

    `scorer` is how the reward model scores (scoring.py).

    Raises:
        InputError: the log-probs of sampling and of scoring differ by more than rounding. They would then be two
            different distributions, and every ratio would be wrong.
        NotFinite: a score, log-prob or value is NaN or infinite.
    """
    for model in filter(None, (policy, ref, rm, critic)):
        model.eval()
    samples = generate(policy, prompts, sampling, generator)
    batch = make_batch(list(zip(prompts, samples.responses, strict=True)))
    B, R = batch.response_mask.shape
    local, here = distributed.local_rows(B), device.current()
    names = ("logp", "ref_logp", "kl_exact", "entropy", "values")
    columns = {name: torch.zeros(len(local), R, device=here) for name in names}
    scores = torch.zeros(len(local), device=here)
    for begin in range(0, len(local), microbatch):
        at = slice(begin, begin + microbatch)
        part = batch.rows(local[at])
        hidden = response_hidden(policy, part)
        tokens = compare(policy, ref, part, sampling.temperature, hidden)
        values = torch.zeros_like(tokens.logp) if critic is None else state_values(critic, part, hidden)
        of_part = tokens.logp, tokens.ref_logp, tokens.kl, tokens.entropy, values
        for column, values_of_part in zip(columns.values(), of_part, strict=True):
            column[at, : values_of_part.shape[1]] = values_of_part
        scores[at] = scorer(rm, part)
    for frozen in (ref, rm):
        distributed.reshard(frozen)
    scores = distributed.all_gather(scores, B)
    columns = {name: distributed.all_gather(column, B) for name, column in columns.items()}
    for name, column in (("the reward model's score", scores), *columns.items()):
        if bad := not_finite(column, range(B)):
            raise NotFinite(name, bad)
    mask, finished = batch.response_mask, torch.tensor(samples.finished).to(here)
    sampled = torch.cat([torch.tensor(x) for x in samples.logps]).to(here)
    check_agreement(sampled, columns["logp"][mask], "sampling and scoring")
    values = columns.pop("values")
    return Rollout(batch, mask, **columns, values=None if critic is None else values, scores=scores, finished=finished)


def check_agreement(one: Tensor, other: Tensor, names: str) -> float:
    """The largest difference between two sets of log-probs. Raises InputError where it is more than rounding."""
    tolerance = TOLERANCE_BF16_MIXED if kernels.in_bf16() else TOLERANCE
    tolerance = tolerance if device.weight_dtype() == torch.float32 else TOLERANCE_BF16
    worst = float((one - other).abs().max())
    if not worst <= tolerance:
        raise InputError(
            f"self-check: log-probs of {names} differ by {worst:.2g} nats (more than {tolerance}); the two "
            "must use the same weights, temperature and masks"
        )
    return worst
