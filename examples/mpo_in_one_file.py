"""Mixed preference optimisation (MPO, 2403.19443) in one file of plain PyTorch: python examples/mpo_in_one_file.py

Five stages, in some five minutes of one core: a small Llama learns to write responses (SFT); a reward model learns
which of two responses is preferred; the pairs are split by the gap between the rewards of their responses; DPO trains
on the easy pairs, whose gap is large; PPO trains on the prompts of all others, from the DPO model and held close to it.
Batches are padded, and every layer is torch's own. `make hh` does the same, fast; tests/examples/ holds this file to
its stages.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpo.world.build import build  # a world of generated prompts and responses
from mpo.world.gold import gold_reward  # what a response is truly worth there; used to look at results only

# --- Text to token ids: every word is a token ---------------------------------------------------------------

DATA = build("hh", seed=1, train=16000, test=150)  # rows with a prompt, a chosen and a rejected response
DATA = {
    split: [row for row in rows if row.prompt.count("Human:") == 1] for split, rows in DATA.items()
}  # the short ones

TEXTS = [text for row in DATA["train"] for text in (row.prompt, row.chosen, row.rejected)]
PIECE = re.compile(r" ?\w+|\W")  # a word with the space before it, or any other character
PAD, EOS = 0, 1  # EOS ends every response: without it, a model could not learn to stop
MAX_NEW = 48  # tokens of a sampled response, EOS included
VOCABULARY = ["", "<eos>", *sorted({piece for text in TEXTS for piece in PIECE.findall(text)})]
ID = {piece: i for i, piece in enumerate(VOCABULARY)}
Sequence = tuple[list[int], list[int]]  # the ids of a prompt, and those of a response to it
Pair = tuple[Sequence, Sequence]  # a prompt with the chosen response, and with the rejected one


def encode(text: str) -> list[int]:
    return [ID[piece] for piece in PIECE.findall(text) if piece in ID]


def decode(ids: list[int]) -> str:
    return "".join(VOCABULARY[i] for i in ids if i != EOS)


def pairs(split: str) -> list[Pair]:
    return [tuple((encode(r.prompt), [*encode(x), EOS]) for x in (r.chosen, r.rejected)) for r in DATA[split]]


def pad(batch: list[Sequence]) -> tuple[Tensor, Tensor]:
    """B sequences to ids (B, T), padded on the right, and a mask (B, T) that is True on response tokens."""
    T = max(len(prompt) + len(response) for prompt, response in batch)
    ids = torch.tensor([p + r + [PAD] * (T - len(p) - len(r)) for p, r in batch])
    mask = torch.tensor([[len(p) <= t < len(p) + len(r) for t in range(T)] for p, r in batch])
    return ids, mask


# --- The model: Llama (2302.13971) --------------------------------------------------------------------------

WIDTH, LAYERS, HEADS, KV_HEADS, FFN = 96, 3, 4, 2, 256


def rotate(x: Tensor) -> Tensor:
    """(B, H, T, d): turn pairs of numbers by an angle that grows with the position (rotary embeddings, 2104.09864)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)  # (T, d/2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        kv = WIDTH // HEADS * KV_HEADS
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-5), nn.RMSNorm(WIDTH, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, n, bias=False) for n in (WIDTH, kv, kv, WIDTH))
        self.gate, self.up = nn.Linear(WIDTH, FFN, bias=False), nn.Linear(WIDTH, FFN, bias=False)
        self.down = nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D). Every token sees those before it, so padding on the right changes no real token."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(2, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Token ids to hidden states, and to logits with the embedding as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(len(VOCABULARY), WIDTH), nn.RMSNorm(WIDTH, eps=1e-5)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)"""
        return self.norm(self.layers(self.embed(ids)))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> logits (B, T, V)"""
        return self.hidden(ids) @ self.embed.weight.T


def token_logps(model: Llama, ids: Tensor) -> Tensor:
    """(B, T) -> (B, T-1): the log-prob of every token but the first, given the tokens before it."""
    return model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)


@torch.no_grad()
def sample(model: Llama, prompts: list[list[int]]) -> list[list[int]]:
    """A response to each prompt, token by token. Each step computes the whole text again; a KV cache would avoid it."""
    responses: list[list[int]] = [[] for _ in prompts]
    for _ in range(MAX_NEW):
        rows = [i for i, response in enumerate(responses) if response[-1:] != [EOS]]
        if not rows:
            break
        ids, _ = pad([(prompts[i], responses[i]) for i in rows])
        last = torch.tensor([len(prompts[i]) + len(responses[i]) - 1 for i in rows])
        logits = model.hidden(ids)[torch.arange(len(rows)), last] @ model.embed.weight.T  # (b, V)
        for i, token in zip(rows, logits.softmax(-1).multinomial(1).squeeze(1).tolist(), strict=True):
            responses[i].append(token)
    return responses


# --- Training -----------------------------------------------------------------------------------------------


def adamw(model: nn.Module, eps: float = 1e-8) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, eps=eps)


def step(model: nn.Module, optimiser: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # a gradient of a larger norm is scaled down to 1
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    optimiser.zero_grad()


def sft_loss(model: Llama, batch: list[Sequence]) -> Tensor:
    """The mean negative log-prob of all response tokens; prompts are read, not learnt."""
    ids, mask = pad(batch)
    return -(token_logps(model, ids) * mask[:, 1:]).sum() / mask.sum()


def train_sft(model: Llama, data: list[Pair], batch: int = 16, peak: float = 6e-3) -> None:
    """One pass over the chosen responses. The learning rate falls along a line to 0."""
    optimiser, steps = adamw(model), len(data) // batch
    for i in range(steps):
        loss = sft_loss(model, [chosen for chosen, _ in data[i * batch : (i + 1) * batch]])
        step(model, optimiser, loss, peak * min(1, (i + 1) / 10) * (1 - i / steps))
        if i % 100 == 0 or i == steps - 1:
            print(f"SFT {i:4d}: loss {loss:.3f} nats per token")


# --- The reward model, and the split -------------------------------------------------------------------------


class RewardModel(nn.Module):
    """A Llama whose head gives one number. It is called `score`, as in most published reward models."""

    def __init__(self, trunk: Llama) -> None:
        super().__init__()
        self.trunk, self.score = trunk, nn.Linear(WIDTH, 1, bias=False)
        nn.init.normal_(self.score.weight, std=1 / (WIDTH + 1) ** 0.5)  # so that first rewards are about 1 in size
        self.mean, self.std = 0.0, 1.0

    def forward(self, batch: list[Sequence]) -> Tensor:
        """(B,): the reward of each sequence, read at its last token (EOS), which has seen all of it."""
        ids, _ = pad(batch)
        last = torch.tensor([len(prompt) + len(response) - 1 for prompt, response in batch])
        raw = self.score(self.trunk.hidden(ids)[torch.arange(len(batch)), last]).squeeze(1)
        return (raw - self.mean) / self.std


def bradley_terry_loss(rm: RewardModel, batch: list[Pair]) -> tuple[Tensor, Tensor]:
    """-log sigmoid(r(chosen) - r(rejected)): the log-loss of a model in which a gap of r is the log-odds of a label.

    Only differences matter to it, so rewards have no zero point. Returns the mean loss, and the gaps (B,).
    """
    chosen, rejected = [list(side) for side in zip(*batch, strict=True)]
    gap = rm(chosen) - rm(rejected)
    return -F.logsigmoid(gap).mean(), gap.detach()


def train_rm(rm: RewardModel, data: list[Pair], batch: int = 32, peak: float = 1e-3, epochs: int = 2) -> None:
    """Passes over the pairs. More than two or three, and the model learns the labels' errors by heart."""
    optimiser, per_epoch = adamw(rm), len(data) // batch
    steps = epochs * per_epoch
    for i in range(steps):
        at = i % per_epoch * batch
        loss, gap = bradley_terry_loss(rm, data[at : at + batch])
        step(rm, optimiser, loss, peak * min(1, (i + 1) / 10) * (1 - i / steps))
        if i % 100 == 0 or i == steps - 1:
            print(f"RM {i:4d}: loss {loss:.3f} (a coin has 0.693), {(gap > 0).float().mean():.0%} right")


@torch.no_grad()
def normalise(rm: RewardModel, data: list[Pair]) -> None:
    """Give the chosen responses a mean of 0 and a standard deviation of 1.

    The loss leaves the zero point open. PPO needs one, and a scale at which the price of its KL penalty means the same
    for every reward model.
    """
    raw = rm([chosen for chosen, _ in data[:1000]])
    rm.mean, rm.std = float(raw.mean()), float(raw.std())


@torch.no_grad()
def split_by_gap(rm: RewardModel, data: list[Pair]) -> dict[str, list[Pair]]:
    """Easy pairs, hard ones, and those that the reward model contradicts. The threshold is the median of |gap|.

    Where the reward model is sure, and agrees with the label, the pair is easy: DPO can learn from both responses.
    Where it is not, or disagrees, the label may be wrong; PPO takes the prompt, and lets the policy find a response.
    """
    gaps = torch.cat([rm([w for w, _ in part]) - rm([l for _, l in part]) for part in batches(data, 100)])
    gamma = float(gaps.abs().double().quantile(0.5))
    parts: dict[str, list[Pair]] = {"easy": [], "hard": [], "contradicted": []}
    for pair, gap in zip(data, gaps.tolist(), strict=True):
        parts["easy" if gap >= gamma else "contradicted" if gap <= -gamma else "hard"].append(pair)
    return parts


def batches(data: list[Pair], size: int) -> list[list[Pair]]:
    """All pairs, in order; the last batch may be smaller."""
    return [data[i : i + size] for i in range(0, len(data), size)]


# --- DPO on the easy pairs -----------------------------------------------------------------------------------


def response_logps(model: Llama, batch: list[Sequence]) -> Tensor:
    """(B,): the log-prob of each whole response."""
    ids, mask = pad(batch)
    return (token_logps(model, ids) * mask[:, 1:]).sum(1)


def dpo_loss(policy: Llama, ref: Llama, batch: list[Pair], beta: float) -> tuple[Tensor, Tensor]:
    """DPO: -log sigmoid(beta D), D = log(pi/ref)(chosen) - log(pi/ref)(rejected). Source: 2305.18290, eq. 7.

    beta log(pi/ref) acts as a reward, and the loss as that of a reward model. The reference stays as it is: without it,
    the cheapest way to a large D would be to make both responses improbable. Returns the mean loss, and D (B,).
    """
    chosen, rejected = [list(side) for side in zip(*batch, strict=True)]
    with torch.no_grad():
        ref_chosen, ref_rejected = response_logps(ref, chosen), response_logps(ref, rejected)
    D = (response_logps(policy, chosen) - ref_chosen) - (response_logps(policy, rejected) - ref_rejected)
    return -F.logsigmoid(beta * D).mean(), D.detach()


def train_dpo(policy: Llama, data: list[Pair], batch: int = 16, peak: float = 2e-4, beta: float = 0.5) -> None:
    """One pass over the pairs. The reference is the policy as it was at the start."""
    ref, optimiser, steps = copy.deepcopy(policy).requires_grad_(False), adamw(policy), len(data) // batch
    for i in range(steps):
        loss, D = dpo_loss(policy, ref, data[i * batch : (i + 1) * batch], beta)
        step(policy, optimiser, loss, peak * min(1, (i + 1) / 10) * (1 - i / steps))
        if i % 100 == 0 or i == steps - 1:
            print(f"DPO {i:4d}: loss {loss:.3f}, the chosen response is ahead in {(D > 0).float().mean():.0%}")


# --- PPO on the prompts of the others -----------------------------------------------------------------------

Scorer = Callable[[list[list[int]], list[list[int]]], Tensor]  # prompts and responses -> (B,), the reward of each

KL_PRICE, EOS_PENALTY, LAMBDA, CLIP = 0.05, 1.0, 0.95, 0.2


class Critic(nn.Module):
    """A Llama whose head gives the value of a state: the sum of rewards that is expected from there on."""

    def __init__(self, trunk: Llama) -> None:
        super().__init__()
        self.trunk, self.score = trunk, nn.Linear(WIDTH, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T-1): the value of the state in which each token but the first is chosen."""
        return self.score(self.trunk.hidden(ids[:, :-1])).squeeze(2)


@dataclass
class Rollout:
    """Responses of the policy, and what the models say of their tokens: all but the first, (B, T-1) each."""

    ids: Tensor  # (B, T)
    mask: Tensor  # True on response tokens
    scores: Tensor  # (B,): the reward of each response
    logp: Tensor  # under the policy as it was when it sampled them
    ref_logp: Tensor  # under the reference
    values: Tensor  # the critic's, before the update


@torch.no_grad()
def roll_out(policy: Llama, ref: Llama, critic: Critic, prompts: list[list[int]], score: Scorer) -> Rollout:
    """Sample a response to each prompt. A response without EOS is worth less, or the policy would learn to ramble."""
    responses = sample(policy, prompts)
    scores = score(prompts, responses) - EOS_PENALTY * torch.tensor([r[-1] != EOS for r in responses])
    ids, mask = pad(list(zip(prompts, responses, strict=True)))
    return Rollout(ids, mask[:, 1:], scores, token_logps(policy, ids), token_logps(ref, ids), critic(ids))


def advantages_and_returns(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """How much better than expected each token did, and what the critic should have expected. (B, T-1) each.

    The reward of a token is minus the price of its KL to the reference, plus the score at the last one (2203.02155).
    Generalised advantage estimation (1506.02438) is a sum of the errors delta that decays with LAMBDA: with 0 it trusts
    the critic in all that is to come, with 1 only what was sampled.
    """
    mask, values = rollout.mask, rollout.values * rollout.mask
    rewards = -KL_PRICE * (rollout.logp - rollout.ref_logp) * mask
    last = (mask * torch.arange(mask.shape[1])).argmax(1)  # (B,)
    rewards[torch.arange(len(mask)), last] += rollout.scores
    next_values = torch.cat((values[:, 1:], torch.zeros(len(mask), 1)), 1)
    deltas = (rewards + next_values - values) * mask
    advantages, following = torch.zeros_like(deltas), torch.zeros(len(mask))
    for t in reversed(range(deltas.shape[1])):
        following = (deltas[:, t] + LAMBDA * following) * mask[:, t]
        advantages[:, t] = following
    returns = advantages + values
    mean = advantages.sum() / mask.sum()
    centred = (advantages - mean) * mask
    return centred * torch.rsqrt((centred**2).sum() / mask.sum() + 1e-8), returns  # advantages with variance 1


def ppo_losses(
    policy: Llama, critic: Critic, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses of policy and critic on some rows of a rollout (1707.06347, eq. 7): means over their tokens.

    The gradient ends for a token that has become CLIP more, or less, probable than it was, since the rollout says
    nothing of policies far from the one that made it. The critic's values are held back in the same way.
    """
    mask, ids, A, G = rollout.mask[rows], rollout.ids[rows], advantages[rows], returns[rows]
    ratio = (token_logps(policy, ids) - rollout.logp[rows]).exp()
    surrogate = -torch.minimum(ratio * A, ratio.clamp(1 - CLIP, 1 + CLIP) * A)
    values, old = critic(ids), rollout.values[rows]
    near = old + (values - old).clamp(-CLIP, CLIP)
    errors = 0.5 * torch.maximum((values - G) ** 2, (near - G) ** 2)
    return (surrogate * mask).sum() / mask.sum(), (errors * mask).sum() / mask.sum()


def train_ppo(
    policy: Llama,
    ref: Llama,
    critic: Critic,
    prompts: list[list[int]],
    score: Scorer,
    rollouts: int,
    peak: float = 3e-4,
) -> None:
    """Rollouts of 64 responses, each with one pass of two minibatches. The critic learns alone for the first three."""
    optimiser, critics = adamw(policy, eps=1e-5), adamw(critic, eps=1e-5)
    for i in range(rollouts):
        start = i * 64 % (len(prompts) - 63)
        rollout = roll_out(policy, ref, critic, prompts[start : start + 64], score)
        advantages, returns = advantages_and_returns(rollout)
        for rows in torch.randperm(64).split(32):
            policy_loss, value_loss = ppo_losses(policy, critic, rollout, advantages, returns, rows)
            step(policy, optimiser, policy_loss, peak * (i >= 3) * (1 - i / rollouts))
            step(critic, critics, value_loss, 2 * peak * (1 - i / rollouts))
        kl = ((rollout.logp - rollout.ref_logp) * rollout.mask).sum(1).mean()
        if i % 5 == 0 or i == rollouts - 1:
            print(f"PPO {i:4d}: score {rollout.scores.mean():+.2f}, KL to the reference {kl:.2f} nats per response")


def show(name: str, model: Llama) -> None:
    """The mean gold reward of sampled responses to the test prompts, and the first of these."""
    prompts = [row.prompt for row in DATA["test"]]
    responses = [decode(ids) for ids in sample(model, [encode(p) for p in prompts])]
    gold = [gold_reward(p, r) for p, r in zip(prompts, responses, strict=True)]
    print(f"\n{name}: gold reward {sum(gold) / len(gold):.2f} (the best response has 3.3)")
    for i in range(3):
        print(f"    {prompts[i].strip()}{responses[i]}   [{gold[i]:+.1f}]".replace("\n\n", "\n    "))


def main() -> None:
    """The stages in order. The score of PPO is the reward model's; gold rewards are only looked at."""
    torch.manual_seed(1)
    sft, train = Llama(), pairs("train")
    train_sft(sft, train)
    rm = RewardModel(copy.deepcopy(sft))
    train_rm(rm, train)
    normalise(rm, train)
    parts = split_by_gap(rm, train)
    print("split: " + ", ".join(f"{name} {len(part)}" for name, part in parts.items()))
    dpo = copy.deepcopy(sft)
    train_dpo(dpo, parts["easy"])

    @torch.no_grad()
    def score(prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        return rm(list(zip(prompts, responses, strict=True)))

    mpo, critic = copy.deepcopy(dpo), Critic(copy.deepcopy(rm.trunk))
    prompts = [prompt for (prompt, _), _ in parts["hard"] + parts["contradicted"]]
    train_ppo(mpo, dpo.requires_grad_(False), critic, prompts, score, rollouts=40)
    for name, model in (("SFT", sft), ("DPO", dpo), ("MPO", mpo)):
        show(name, model)


if __name__ == "__main__":
    main()
