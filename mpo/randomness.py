"""One random generator per purpose, keyed by (seed, purpose, step)."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, step: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on these three alone: any step can be replayed on its own.

    On the CPU, where it draws the same whatever computes, but for what a GPU needs too much of.
    """
    key = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key[:8], "big") >> 1)
