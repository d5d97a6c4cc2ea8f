"""Direct preference optimisation (DPO, 2305.18290) in one file of plain PyTorch: python examples/dpo_in_one_file.py

A small Llama first learns to write responses at all, from the preferred ones (supervised fine-tuning, SFT). DPO then
teaches it which of two responses to a prompt is the better one. Nothing but clarity was tried for: batches are padded,
and every layer is torch's own. train_sft.py and train_dpo.py do the same, fast; tests/examples/ holds this file to
them.
"""

import copy
import re

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


def show(name: str, model: Llama) -> None:
    """The mean gold reward of sampled responses to the test prompts, and the first of these."""
    prompts = [row.prompt for row in DATA["test"]]
    responses = [decode(ids) for ids in sample(model, [encode(p) for p in prompts])]
    gold = [gold_reward(p, r) for p, r in zip(prompts, responses, strict=True)]
    print(f"\n{name}: gold reward {sum(gold) / len(gold):.2f} (the best response has 3.3)")
    for i in range(3):
        print(f"    {prompts[i].strip()}{responses[i]}   [{gold[i]:+.1f}]".replace("\n\n", "\n    "))


def main() -> None:
    """SFT on half of the rows, DPO on the other half."""
    torch.manual_seed(1)
    model, train = Llama(), pairs("train")
    train_sft(model, train)
    show("SFT", model)
    train_dpo(model, train)
    show("DPO", model)


if __name__ == "__main__":
    main()
