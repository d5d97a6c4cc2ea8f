"""Random numbers: one generator per purpose, keyed by (seed, purpose, step)."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, step: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on these three alone, so that any step can be replayed by itself.

    On the CPU by default, so that the numbers are the same whatever device computes.
    """
    key = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key[:8], "big") >> 1)
