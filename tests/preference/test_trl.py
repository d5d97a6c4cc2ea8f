"""Parity with trl's own trainers on shared random log-probs, for every loss that both have.

Run by `make parity`, which installs trl; skipped elsewhere. The trainers are not built (that takes a
model and a data set): their loss methods run on bare instances with the attributes they read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from mpo.preference.losses import PREFERENCE_LOSSES, PairLogps

trl = pytest.importorskip("trl", reason="trl is not installed; make parity installs it")

B, R, BETA = 6, 9, 0.3

# TRL's name -> ours, with the constants that make them the same
SHARED = {
    "sigmoid": ("sigmoid", {}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo_mean", {}),  # TRL's IPO is the one by means
    "exo_pair": ("exo_pair", {"e": 0.05}),
    "nca_pair": ("nca_pair", {}),
    "robust": ("robust", {"e": 0.05}),
    "bco_pair": ("bco_pair", {}),  # this TRL has no running mean: our default of 0
    "sppo_hard": ("sppo_hard", {}),
    "aot": ("aot", {"e": 0.05}),
    "aot_unpaired": ("aot_unpaired", {"e": 0.05}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "discopop": ("discopop", {"tau": 0.05}),
    "sft": ("sft", {}),  # lengths are the same here: TRL averages over all tokens of the batch
}


def logps(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token log-probs of the policy (2B, R), chosen first, and the reference's sums (2B,)."""
    draw = torch.Generator().manual_seed(seed)
    policy = -torch.rand(2 * B, R, generator=draw, dtype=torch.float64) * 2
    return policy, policy.sum(1) + torch.randn(2 * B, generator=draw, dtype=torch.float64)


def ours(policy: torch.Tensor, ref: torch.Tensor) -> PairLogps:
    (chosen, rejected), (ref_chosen, ref_rejected) = policy.sum(1).chunk(2), ref.chunk(2)
    length = torch.full((B,), R)
    return PairLogps(chosen, rejected, ref_chosen, ref_rejected, length, length)


def trl_loss(name: str, policy: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """The mean loss of DPOTrainer._compute_loss for these log-probs: 1 prompt token, R response tokens."""
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    same = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    settings = {
        "accelerator": same,
        "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(discopop_tau=0.05),
        "beta": BETA,
        "label_smoothing": 0.05,
        "loss_types": [name],
        "loss_weights": [1.0],
        "f_divergence_type": "reverse_kl",
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    vars(trainer).update(settings | {"ld_alpha": None, "use_weighting": False, "aux_loss_enabled": False})
    rest = torch.zeros(2 * B, R, dtype=torch.float64)
    outputs = {"log_probs": policy, "entropy": rest, "mean_logits": rest, "is_top1": rest.bool()}
    mask = torch.ones(2 * B, R + 1, dtype=torch.int64)
    mask[:, 0] = 0
    ref_chosen, ref_rejected = ref.chunk(2)
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    return trainer._compute_loss(lambda **_: SimpleNamespace(**outputs), inputs, return_outputs=False)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("seed", range(3))
def test_dpo_trainer(name, seed):
    policy, ref = logps(seed)
    theirs = trl_loss(name, policy, ref)
    loss, constants = SHARED[name]
    mine = PREFERENCE_LOSSES[loss](ours(policy, ref), BETA, **constants).mean()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7, check_dtype=False)


def test_every_loss_of_dpo_trainer_is_compared_but_one():
    """sigmoid_norm, DPO on per-token means, is not in the family here."""
    policy, ref = logps(0)
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        trl_loss("?", policy, ref)
    named = set(re.findall(r"'(\w+)'", str(error.value)))
    assert named - {"sigmoid_norm"} == SHARED.keys()


@pytest.mark.parametrize("seed", range(3))
def test_cpo_simpo_and_orpo(seed):
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    policy, ref = logps(seed)
    pairs, (chosen, rejected) = ours(policy, ref), policy.sum(1).chunk(2)
    accelerator = SimpleNamespace(device="cpu")

    def bare(cls, **settings):
        trainer = cls.__new__(cls)
        vars(trainer).update({"accelerator": accelerator, "beta": BETA} | settings)
        return trainer

    cpo = bare(CPOTrainer, loss_type="sigmoid", alpha=0.0, label_smoothing=0.0).cpo_loss(chosen, rejected)[0]
    torch.testing.assert_close(PREFERENCE_LOSSES["cpo"](pairs, BETA, alpha=0.0), cpo)
    simpo = bare(CPOTrainer, loss_type="simpo", simpo_gamma=0.7, alpha=0.0, label_smoothing=0.0)
    expected = simpo.cpo_loss(chosen / R, rejected / R)[0]
    torch.testing.assert_close(PREFERENCE_LOSSES["simpo"](pairs, BETA, gamma=0.7), expected)
    odds = bare(ORPOTrainer).odds_ratio_loss(chosen / R, rejected / R)[0].double()  # computed in fp32 there
    expected = PREFERENCE_LOSSES["sft"](pairs, BETA) - odds
    torch.testing.assert_close(PREFERENCE_LOSSES["orpo"](pairs, BETA, lam=BETA), expected, rtol=1e-5, atol=1e-6)
