"""Losses on preference pairs, as pure functions: tensors in, one unreduced loss for each pair out.

Notation: s_w and s_l are log(pi/pi_ref) of the chosen and the rejected response, summed over tokens; D = s_w - s_l;
|w| and |l| are their lengths in tokens; e is the probability that the label is wrong; sig is the logistic function.

A new loss is a function here and a line in PREFERENCE_LOSSES (docs/losses.md). The type of a constant says which values
a --loss flag may give it (mpo/config.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo.config import LabelNoise, NonNegative, Positive, Range


@dataclass(frozen=True)
class PairLogps:
    """The log-probs of B pairs of responses, in nats, and what else a loss may need. Each tensor is (B,)."""

    chosen: Tensor  # log pi of the chosen response, summed over its tokens
    rejected: Tensor
    ref_chosen: Tensor  # log pi_ref of the same; zeros if no reference is loaded
    ref_rejected: Tensor
    chosen_len: Tensor  # number of tokens, including EOS
    rejected_len: Tensor
    noise: Tensor | None = None  # e of each pair, NaN if its row does not give it
    mean_log_ratio: float = 0.0  # mean of (s_w + s_l)/2 over all batches before this one

    @property
    def s_w(self) -> Tensor:
        """log(pi/pi_ref) of the chosen response."""
        return self.chosen - self.ref_chosen

    @property
    def s_l(self) -> Tensor:
        """log(pi/pi_ref) of the rejected response."""
        return self.rejected - self.ref_rejected

    @property
    def D(self) -> Tensor:  # a capital, as in the papers
        """The difference of the two log-ratios, s_w - s_l."""
        return self.s_w - self.s_l

    def label_noise(self, e: float) -> Tensor | float:
        """The probability that each label is wrong: that of its row or, if the row gives none, e."""
        return e if self.noise is None else self.noise.nan_to_num(nan=e)


# --- the reward model ---------------------------------------------------------------------------


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, e: float = 0.0) -> Tensor:
    """Reward-model loss (B,): -(1-e) log sig(r_w - r_l - margin) - e log sig(r_l - r_w - margin).

    Args:
        chosen, rejected: (B,), the rewards r_w and r_l.
        margin: (B,) or 0, by how much the chosen response should win.
        e: label smoothing, the share of the labels that are assumed to be wrong.

    Source: Bradley & Terry 1952; the margin is from Llama 2 (2307.09288, eq. 2), the smoothing from 2401.06080.
    """
    gap = chosen - rejected
    return -(1 - e) * F.logsigmoid(gap - margin) - e * F.logsigmoid(-gap - margin)


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(B,): (r_w + r_l)^2, which keeps raw rewards around 0. Source: 2312.09244."""
    return (chosen + rejected) ** 2


# --- differences of log-ratios: DPO and its relatives -------------------------------------------


def sigmoid(pairs: PairLogps, beta: float) -> Tensor:
    """DPO: -log sig(beta D). Source: 2305.18290, eq. 7."""
    return -F.logsigmoid(beta * pairs.D)


def cdpo(pairs: PairLogps, beta: float, e: LabelNoise = 0.1) -> Tensor:
    """Conservative DPO: -(1-e) log sig(beta D) - e log sig(-beta D). Source: a note by E. Mitchell, 2023."""
    e_ = pairs.label_noise(e)
    return -(1 - e_) * F.logsigmoid(beta * pairs.D) - e_ * F.logsigmoid(-beta * pairs.D)


def robust(pairs: PairLogps, beta: float, e: LabelNoise = 0.1) -> Tensor:
    """Robust DPO: unbiased for DPO's loss on the true labels if a share e < 1/2 is flipped. Source: 2403.00409.

    [-(1-e) log sig(beta D) + e log sig(-beta D)] / (1 - 2e)
    """
    e_ = pairs.label_noise(e)
    return (-(1 - e_) * F.logsigmoid(beta * pairs.D) + e_ * F.logsigmoid(-beta * pairs.D)) / (1 - 2 * e_)


def hinge(pairs: PairLogps, beta: float) -> Tensor:
    """The hinge of SLiC, on DPO's margin: max(0, 1 - beta D). Source: 2305.10425 and 2309.06657."""
    return (1 - beta * pairs.D).clamp(min=0)


def ipo(pairs: PairLogps, beta: float) -> Tensor:
    """IPO on sums over tokens, as in the paper: (D - 1/(2 beta))^2. Source: 2310.12036, eq. 17 (its tau is beta)."""
    return (pairs.D - 1 / (2 * beta)) ** 2


def ipo_mean(pairs: PairLogps, beta: float) -> Tensor:
    """IPO on means over tokens, as in TRL: (s_w/|w| - s_l/|l| - 1/(2 beta))^2."""
    return (pairs.s_w / pairs.chosen_len - pairs.s_l / pairs.rejected_len - 1 / (2 * beta)) ** 2


def exo_pair(pairs: PairLogps, beta: float, e: Annotated[float, Range(above=0, below=0.5)] = 1e-3) -> Tensor:
    """EXO: KL of [sig(beta D), sig(-beta D)] from [1-e, e], where e > 0. Source: 2402.00856, eq. 16."""
    e_ = torch.as_tensor(pairs.label_noise(e), dtype=pairs.chosen.dtype)
    log_p, log_q = F.logsigmoid(beta * pairs.D), F.logsigmoid(-beta * pairs.D)
    return log_p.exp() * (log_p - torch.log(1 - e_)) + log_q.exp() * (log_q - torch.log(e_))


def discopop(pairs: PairLogps, beta: float, tau: Positive = 0.05) -> Tensor:
    """DiscoPOP: (1-m)(-log sig(beta D)) + m exp(-beta D), with m = sig(beta D / tau). Source: 2406.08414, eq. 5.

    A language model discovered this loss.
    """
    m = torch.sigmoid(beta * pairs.D / tau)
    return (1 - m) * -F.logsigmoid(beta * pairs.D) + m * torch.exp(-beta * pairs.D)


def aot(pairs: PairLogps, beta: float, e: LabelNoise = 0.0) -> Tensor:
    """AOT: cdpo, in which D is sorted(log pi_w/pi_l) - sorted(log ref_w/ref_l), each sorted over the batch.

    Source: 2406.05882, its paired form. It compares the pairs of a batch: see WHOLE_BATCH.
    """
    policy = (pairs.chosen - pairs.rejected).sort().values
    return _smoothed(beta * (policy - (pairs.ref_chosen - pairs.ref_rejected).sort().values), e)


def aot_unpaired(pairs: PairLogps, beta: float, e: LabelNoise = 0.0) -> Tensor:
    """The unpaired form of `aot`: cdpo, in which D is sorted(s_w) - sorted(s_l). Source: 2406.05882."""
    return _smoothed(beta * (pairs.s_w.sort().values - pairs.s_l.sort().values), e)


def _smoothed(logits: Tensor, e: float) -> Tensor:
    return -(1 - e) * F.logsigmoid(logits) - e * F.logsigmoid(-logits)


# --- each response on its own -------------------------------------------------------------------


def nca_pair(pairs: PairLogps, beta: float) -> Tensor:
    """NCA: -log sig(beta s_w) - 0.5 log sig(-beta s_w) - 0.5 log sig(-beta s_l). Source: 2402.05369."""
    rest = F.logsigmoid(-beta * pairs.s_w) + F.logsigmoid(-beta * pairs.s_l)
    return -F.logsigmoid(beta * pairs.s_w) - 0.5 * rest


def bco_pair(pairs: PairLogps, beta: float) -> Tensor:
    """BCO: -log sig(beta s_w - d) - log sig(-(beta s_l - d)). Source: 2404.04656.

    d is beta times the running mean of (s_w + s_l)/2. Here the mean is over the batches before this one, so that it
    does not depend on the microbatch.
    """
    d = beta * pairs.mean_log_ratio
    return -F.logsigmoid(beta * pairs.s_w - d) - F.logsigmoid(-(beta * pairs.s_l - d))


def sppo_hard(pairs: PairLogps, beta: float) -> Tensor:
    """SPPO with hard labels: (s_w - 1/(2 beta))^2 + (s_l + 1/(2 beta))^2. Source: 2405.00675, eq. 4.7."""
    return (pairs.s_w - 1 / (2 * beta)) ** 2 + (pairs.s_l + 1 / (2 * beta)) ** 2


def apo_zero(pairs: PairLogps, beta: float) -> Tensor:
    """APO-zero, which moves the chosen response up and the rejected one down.

    1 - sig(beta s_w) + sig(beta s_l). Source: 2408.06266, eq. 7.
    """
    return 1 - torch.sigmoid(beta * pairs.s_w) + torch.sigmoid(beta * pairs.s_l)


def apo_down(pairs: PairLogps, beta: float) -> Tensor:
    """APO-down, which moves both responses down, the chosen one less.

    sig(beta s_w) + 1 - sig(beta D). Source: 2408.06266, eq. 8.
    """
    return torch.sigmoid(beta * pairs.s_w) + 1 - torch.sigmoid(beta * pairs.D)


def kto(pairs: PairLogps, beta: float) -> Tensor:
    """KTO on pairs: 1 - sig(beta (s_w - z_l)) + 1 - sig(beta (z_w - s_l)). Source: 2402.01306.

    The baselines are z_w = max(0, mean s_w) and z_l = max(0, mean s_l), over the batch. They replace the paper's KL
    estimate from mismatched pairs, as in the paired form of the authors' code and of older TRL. This loss compares the
    pairs of a batch: see WHOLE_BATCH.
    """
    z_w, z_l = (s.detach().mean().clamp(min=0) for s in (pairs.s_w, pairs.s_l))
    return 2 - torch.sigmoid(beta * (pairs.s_w - z_l)) - torch.sigmoid(beta * (z_w - pairs.s_l))


# --- with a likelihood term, or without a reference ---------------------------------------------


def sft(pairs: PairLogps, beta: float) -> Tensor:
    """Negative log-likelihood of the chosen response, per token: -log pi_w / |w|. Ignores beta."""
    return -pairs.chosen / pairs.chosen_len


def rpo(pairs: PairLogps, beta: float, alpha: NonNegative = 1.0) -> Tensor:
    """DPO with a likelihood term, which TRL calls RPO: sigmoid + alpha sft. Source: 2404.19733, eq. 1."""
    return sigmoid(pairs, beta) + alpha * sft(pairs, beta)


def simpo(pairs: PairLogps, beta: float, gamma: NonNegative = 0.5) -> Tensor:
    """SimPO: -log sig(beta (log pi_w/|w| - log pi_l/|l|) - gamma). Source: 2405.14734, eq. 6."""
    return -F.logsigmoid(beta * (pairs.chosen / pairs.chosen_len - pairs.rejected / pairs.rejected_len) - gamma)


def orpo(pairs: PairLogps, beta: float, lam: NonNegative = 0.1) -> Tensor:
    """ORPO: sft - lam log sig(log odds_w - log odds_l). Source: 2403.07691, eq. 6 and 7. Ignores beta.

    odds = p / (1 - p), where p = exp(log pi / |y|) for a response of |y| tokens. TRL calls lam "beta".
    """
    mean_w, mean_l = pairs.chosen / pairs.chosen_len, pairs.rejected / pairs.rejected_len
    log_odds = (mean_w - mean_l) - (_log1mexp(mean_w) - _log1mexp(mean_l))
    return sft(pairs, beta) - lam * F.logsigmoid(log_odds)


def cpo(pairs: PairLogps, beta: float, alpha: NonNegative = 1.0) -> Tensor:
    """CPO: -log sig(beta (log pi_w - log pi_l)) + alpha sft. Source: 2401.08417.

    The paper writes the likelihood term as a sum over tokens. Here it is the mean, as in its authors' code and in TRL.
    """
    return -F.logsigmoid(beta * (pairs.chosen - pairs.rejected)) + alpha * sft(pairs, beta)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, without cancellation. x is at most -1e-6, since the logarithm diverges at 0."""
    x = x.clamp(max=-1e-6)
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


PreferenceLoss = Callable[..., Tensor]
"""(pairs, beta, the loss's own constants by name) -> the loss of each pair (B,)."""

PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": sigmoid,
    "cdpo": cdpo,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "ipo_mean": ipo_mean,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
    "rpo": rpo,
    "kto": kto,
    "sft": sft,
}
REFERENCE_FREE = {"simpo", "orpo", "cpo", "sft"}  # no reference model is loaded
NOISE_AWARE = {"cdpo", "robust", "exo_pair"}  # these use the label noise that a row may give
WHOLE_BATCH = {"aot", "aot_unpaired", "kto"}  # these compare the pairs of a batch: --microbatch must equal --batch


def pair_metrics(pairs: PairLogps, beta: float) -> dict[str, Tensor]:
    """What to watch in preference training (docs/metrics.md): each (B,), without gradients."""
    with torch.no_grad():
        return {
            "reward_chosen": beta * pairs.s_w,
            "reward_rejected": beta * pairs.s_l,
            "reward_margin": beta * pairs.D,
            "accuracy": (pairs.s_w > pairs.s_l).float(),
            "logp_chosen": pairs.chosen.clone(),
            "logp_rejected": pairs.rejected.clone(),
        }
