"""A reward model (2009.01325) in one file of plain PyTorch: python examples/reward_model_in_one_file.py

A small Llama with a head that gives one number, read at the last token of a response: the reward. It learns from pairs,
of which one response was preferred to the other. train_rm.py does the same from an SFT model, fast;
tests/examples/ holds this file to it. Batches are padded, and every layer is torch's own.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpo.world.build import build  # a world of generated prompts and responses

# --- Text to token ids: every word is a token ---------------------------------------------------------------

DATA = build("hh", seed=1, train=16000, test=1600)  # rows with a prompt, a chosen and a rejected response
DATA = {
    split: [row for row in rows if row.prompt.count("Human:") == 1] for split, rows in DATA.items()
}  # the short ones

TEXTS = [text for row in DATA["train"] for text in (row.prompt, row.chosen, row.rejected)]
PIECE = re.compile(r" ?\w+|\W")  # a word with the space before it, or any other character
PAD, EOS = 0, 1  # EOS ends every response: without it, a model could not learn to stop
VOCABULARY = ["", "<eos>", *sorted({piece for text in TEXTS for piece in PIECE.findall(text)})]
ID = {piece: i for i, piece in enumerate(VOCABULARY)}
Sequence = tuple[list[int], list[int]]  # the ids of a prompt, and those of a response to it
Pair = tuple[Sequence, Sequence]  # a prompt with the chosen response, and with the rejected one


def encode(text: str) -> list[int]:
    return [ID[piece] for piece in PIECE.findall(text) if piece in ID]


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
def show(rm: RewardModel, data: list[Pair]) -> None:
    """Accuracy on held-out pairs, and whether a gap is the log-odds that it claims to be."""
    gap = rm([chosen for chosen, _ in data]) - rm([rejected for _, rejected in data])
    right, N = float((gap > 0).float().mean()), len(gap)
    error = 1.96 * (right * (1 - right) / N) ** 0.5
    print(f"\nheld out: {right:.1%} +- {error:.1%} of {N} pairs right")
    sure = torch.sigmoid(gap.abs() * rm.std)  # the probability that the response with the higher reward is preferred
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        bin = (low <= sure) & (sure < low + 0.1 + 1e-6)
        if bin.any():
            claimed, true = float(sure[bin].mean()), float((gap[bin] > 0).float().mean())
            print(f"    where it is {claimed:.0%} sure, it is right in {true:.0%} of {int(bin.sum())} pairs")


def main() -> None:
    """Train on the training rows; measure on the test rows."""
    torch.manual_seed(1)
    rm = RewardModel(Llama())
    train_rm(rm, pairs("train"))
    normalise(rm, pairs("train"))
    show(rm, pairs("test"))
    for row in DATA["test"][:3]:
        print(f"\n    {row.prompt.strip()}".replace("\n\n", "\n    "))
        for text in (row.chosen, row.rejected):
            with torch.no_grad():
                reward = float(rm([(encode(row.prompt), [*encode(text), EOS])]))
            print(f"        {reward:+.2f} {text.strip()}")


if __name__ == "__main__":
    main()
