"""Mixed Preference Optimization (arXiv 2403.19443): SFT, reward model, split, DPO, PPO.

As a library (docs/library.md):

    policy = mpo.load("runs/hh/mpo")                      a language model: generate, logp, tokens, pair_logps
    rm = mpo.load("runs/hh/rm")                           a reward model: score, gaps
    mpo.train("dpo", rows, model=policy, out="mine/dpo")  a stage on rows of your own
    mpo.losses, mpo.equations, mpo.split_by_gap           the losses on pairs, the equations of PPO, the split

Nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpo.api.models import Policy as Policy
    from mpo.api.models import RewardModel as RewardModel
    from mpo.api.models import load as load
    from mpo.api.training import train as train
    from mpo.ppo import equations as equations
    from mpo.preference import losses as losses
    from mpo.preference.split import split_by_gap as split_by_gap
    from mpo.runtime.errors import InputError as InputError
    from mpo.runtime.errors import RunError as RunError

_HOMES = {
    "load": "mpo.api.models",
    "Policy": "mpo.api.models",
    "RewardModel": "mpo.api.models",
    "train": "mpo.api.training",
    "losses": "mpo.preference",
    "equations": "mpo.ppo",
    "split_by_gap": "mpo.preference.split",
    "InputError": "mpo.runtime.errors",
    "RunError": "mpo.runtime.errors",
}
"""Short name -> the module that it comes from."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import what a short name stands for when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mpo' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    home = importlib.import_module(_HOMES[name])
    value = getattr(home, name) if hasattr(home, name) else importlib.import_module(f"{home.__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The short names, for completion in a notebook."""
    return sorted({*globals(), *_HOMES})
