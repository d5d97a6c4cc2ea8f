"""One detail of the method taken away: patches of the package, for the measurements of docs/details.md alone.

    python -m experiments.patches NAME train_ppo.py --out ...

runs a stage as its script does. If the patch NAME is one of this stage, it is applied first; the name `none` stands for
no patch. A patch replaces functions of the package in this process. It is no flag, since nobody should train with it.

A stage that was made with a patch says so in its manifest. A patch whose functions were not all called stops the stage
at its end, before it counts as finished: otherwise a patch that does nothing would look like a detail that does not
matter.
"""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_dpo
import train_ppo
import train_rm
import train_sft
from mpo.data.batches import Batch, Pair, make_batch
from mpo.model import checkpoint
from mpo.model import generate as generation
from mpo.model.generate import Samples, Sampling
from mpo.model.llama import Block, Llama, ScalarModel, initialise
from mpo.model.logprobs import response_logprobs
from mpo.model.scoring import score
from mpo.ppo import learner, rewards, rollout, update
from mpo.ppo.equations import token_weights, whiten
from mpo.preference.losses import PairLogps
from mpo.runtime.entry import run
from mpo.runtime.errors import InputError, RunError
from mpo.runtime.seeding import generator
from mpo.runtime.stage import Stage
from mpo.tools import memory
from mpo.tools.check import CONFIGS

CUT = 16  # tokens that `cut` leaves of a response
COLD = 0.7  # the temperature at which `cold_sampler` samples
TOP_P = 0.9  # the probability of the likeliest tokens, from which `top_p` draws
DROPOUT = 0.1
HEAD = 10  # how many times larger `large_head` makes the first weights of the reward model's head


@dataclass
class Patcher:
    """Replaces attributes of modules, and knows which of the new functions have not been called."""

    assign: Callable[[Any, str, Any], None] = setattr
    unused: set[str] = field(default_factory=set)

    def function(self, module: Any, name: str, change: Callable[[Any], Any]) -> None:
        """Put change(old) in the place of module.name, the old function."""
        old, where = getattr(module, name), f"{module.__name__}.{name}"
        new = change(old)
        self.unused.add(where)

        @functools.wraps(old)
        def counted(*args: Any, **named: Any) -> Any:
            self.unused.discard(where)
            return new(*args, **named)

        self.assign(module, name, counted)

    def constant(self, module: Any, name: str, value: Any) -> None:
        """Give a constant of a module another value."""
        if getattr(module, name) == value:
            raise RunError(f"{module.__name__}.{name} is {value} without the patch")
        self.assign(module, name, value)

    def no_check(self, module: Any, name: str) -> None:
        """Switch off a self-check that would refuse to go on without the detail."""
        self.function(module, name, lambda check: lambda *values: 0.0)


# --- SFT -------------------------------------------------------------------------------------------


def ends(batch: Batch) -> Tensor:
    """(B, R): True at the last token of each response."""
    lengths = batch.response_mask.sum(1, keepdim=True)  # (B, 1)
    return torch.arange(batch.response_mask.shape[1], device=lengths.device) == lengths - 1


def no_eos(p: Patcher) -> None:
    """SFT does not learn EOS, as where labels equal to the pad token are masked, and pad is EOS."""

    def change(old: Any) -> Any:
        def masked(model: Llama, batch: Batch, *more: Any) -> Any:
            tokens = old(model, batch, *more)
            return tokens._replace(logp=tokens.logp * ~ends(batch))

        return masked

    p.function(train_sft, "response_logprobs", change)


def cut(p: Patcher) -> None:
    """SFT cuts long responses, which thereby lose their EOS, in place of dropping their rows."""

    def change(encode: Any) -> Any:
        def encode_and_cut(*args: Any) -> Any:
            pairs, counts = encode(*args)
            return [replace(pair, chosen=pair.chosen[:CUT]) for pair in pairs], counts

        return encode_and_cut

    p.function(train_sft, "encode", change)


def prompt_loss(p: Patcher) -> None:
    """SFT's loss is over the prompt's tokens, too, all but BOS."""

    def change(train: Any) -> Any:
        def train_on_all(model: Llama, batches: Any, losses_of: Any, units: Any, *more: Any) -> Any:
            def of_all(pairs: list[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
                batch = make_batch([(pair.prompt[:1], pair.prompt[1:] + pair.chosen) for pair in pairs])
                return -response_logprobs(model, batch).logp.sum(1), {}

            return train(model, batches, of_all, lambda pair: len(pair.prompt) - 1 + len(pair.chosen), *more)

        return train_on_all

    p.function(train_sft, "train", change)


# --- reward model -----------------------------------------------------------------------------------


def new_trunk(p: Patcher) -> None:
    """The reward model begins with random weights in place of the SFT model's."""

    def change(load: Any) -> Any:
        def load_new(*args: Any) -> ScalarModel:
            rm: ScalarModel = load(*args)
            head = rm.score.weight.detach().clone()
            initialise(rm, generator(0, "new trunk"))
            with torch.no_grad():
                rm.score.weight.copy_(head)
                for weight in (w for w in rm.parameters() if w.dim() == 1):  # of the norms
                    weight.fill_(1.0)
            return rm

        return load_new

    p.function(train_rm, "load_as_scalar", change)


def large_head(p: Patcher) -> None:
    """The first weights of the reward model's head are ten times as large."""

    def change(new_head: Any) -> Any:
        def larger(*args: Any) -> dict[str, Tensor]:
            head: dict[str, Tensor] = new_head(*args)
            return head | {"score.weight": HEAD * head["score.weight"]}

        return larger

    p.function(checkpoint, "new_score_head", change)


# --- DPO --------------------------------------------------------------------------------------------


def of_each_logp(p: Patcher, change: Callable[[PairLogps], PairLogps]) -> None:
    """Change the log-probs that DPO's loss is computed from."""
    p.function(train_dpo, "pair_logps", lambda old: lambda *args: change(old(*args)))


def mean_logps(p: Patcher) -> None:
    """Log-probs are means over a response's tokens, not sums."""

    def means(x: PairLogps) -> PairLogps:
        w, l = x.chosen_len, x.rejected_len
        return replace(
            x,
            chosen=x.chosen / w,
            rejected=x.rejected / l,
            ref_chosen=x.ref_chosen / w,
            ref_rejected=x.ref_rejected / l,
        )

    of_each_logp(p, means)


def bf16_logps(p: Patcher) -> None:
    """Log-probs of responses are rounded to bf16, of policy and reference alike."""

    def rounded(x: PairLogps) -> PairLogps:
        names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
        return replace(x, **{name: getattr(x, name).bfloat16().float() for name in names})

    of_each_logp(p, rounded)


def no_reference(p: Patcher) -> None:
    """DPO forgets the reference: its log-probs count as 0. The check that log-ratios are 0 at first is switched off."""

    def change(old: Any) -> Any:
        return lambda ref, pairs, batch: {pair.row.id: (0.0, 0.0) for pair in pairs}

    p.function(train_dpo, "reference_logps", change)
    p.no_check(train_dpo, "self_check")


# --- PPO: rollouts ----------------------------------------------------------------------------------


def of_the_sampler(p: Patcher, change: Callable[[Any], Any]) -> None:
    """Change how rollouts are sampled, but not how they are scored, and switch off the check that both agree."""
    p.function(rollout, "generate", change)
    p.no_check(rollout, "check_agreement")


def cold_sampler(p: Patcher) -> None:
    """Rollouts are sampled at another temperature than they are scored at."""

    def change(generate: Any) -> Any:
        def colder(policy: Llama, prompts: Any, sampling: Sampling, draw: Any) -> Samples:
            samples: Samples = generate(policy, prompts, replace(sampling, temperature=COLD), draw)
            return samples

        return colder

    of_the_sampler(p, change)


def likeliest(hidden: Tensor, weight: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw from the likeliest tokens, as many as have TOP_P of the probability together; and their true log-probs."""
    logps, ids = (hidden @ weight.T).float().div(temperature).log_softmax(-1).sort(-1, descending=True)  # (B, V)
    probs = logps.exp()
    kept = probs * (probs.cumsum(-1) - probs < TOP_P)  # the likeliest one always is
    cdf = kept.cumsum(-1)
    at = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp(max=logps.shape[1] - 1)  # (B, 1)
    at = torch.minimum(at, (kept > 0).sum(-1, keepdim=True) - 1)  # where rounding leads beyond the last
    return ids.gather(1, at).squeeze(1), logps.gather(1, at).squeeze(1)


def top_p(p: Patcher) -> None:
    """Rollouts are sampled from the likeliest tokens only, but scored under the whole distribution.

    The log-probs of sampling are those of the whole distribution, too. So the check that both agree does not notice.
    """
    p.function(generation, "next_tokens", lambda old: likeliest)


def stale_sampler(p: Patcher) -> None:
    """Rollouts are sampled with the weights from before the last update, as an engine does that is one step behind."""

    def change(generate: Any) -> Any:
        older: list[Llama] = []

        def with_older(policy: Llama, *more: Any) -> Samples:
            now = copy.deepcopy(policy)
            samples: Samples = generate(older.pop() if older else policy, *more)
            older.append(now)
            return samples

        return with_older

    of_the_sampler(p, change)


def retokenised(p: Patcher) -> None:
    """Sampled responses become text and are tokenised again before they are scored, so that their ids may change."""
    known = []

    def remember(load: Any) -> Any:
        def loaded(*args: Any) -> Any:
            known.append(load(*args))
            return known[-1]

        return loaded

    def change(generate: Any) -> Any:
        def again(*args: Any) -> Samples:
            samples: Samples = generate(*args)
            tokenizer, pairs = known[-1], zip(samples.responses, samples.finished, strict=True)
            ids = [tokenizer.response_ids(tokenizer.decode(r), finished) or r for r, finished in pairs]
            return replace(samples, responses=ids, logps=[[0.0] * len(r) for r in ids])

        return again

    p.function(train_ppo, "shared_tokenizer", remember)
    of_the_sampler(p, change)


def two_bos(p: Patcher) -> None:
    """The prompts of PPO begin with BOS twice, as where a template writes it and the tokenizer adds another."""

    def change(load: Any) -> Any:
        def doubled(*args: Any) -> Any:
            encoded, counts = load(*args)
            twice = [[replace(pair, prompt=pair.prompt[:1] + pair.prompt) for pair in pairs] for pairs in encoded]
            return twice, counts

        return doubled

    p.function(train_ppo, "load_prompts", change)


def of_the_scorer(p: Patcher, scored: Callable[[ScalarModel, Batch, int], Tensor]) -> None:
    """Score rollouts in another way: scored(reward model, batch, EOS) -> (B,)."""

    def change(roll_out: Any) -> Any:
        def otherwise(*args: Any) -> Any:
            *most, _ = args
            eos = args[5].eos  # of the Sampling
            return roll_out(*most, lambda rm, batch: scored(rm, batch, eos))

        return otherwise

    p.function(train_ppo, "roll_out", change)


def before_eos(p: Patcher) -> None:
    """The reward model is read one token before the last, though it was trained on the last."""

    def scored(rm: ScalarModel, batch: Batch, eos: int) -> Tensor:
        values: Tensor = rm(batch.ids, batch.packing, wanted=batch.predictors[ends(batch)[batch.response_mask]])
        return values

    of_the_scorer(p, scored)


def faked_eos(p: Patcher) -> None:
    """An unfinished response is scored as if it had ended: an EOS is added for the reward model."""

    def scored(rm: ScalarModel, batch: Batch, eos: int) -> Tensor:
        ended = [(prompt, r if r[-1] == eos else [*r, eos]) for prompt, r in batch.sequences]
        return score(rm, make_batch(ended))

    of_the_scorer(p, scored)


def raw_scores(p: Patcher) -> None:
    """Reward model and critic give raw scores, as if they had not been normalised after training."""

    def change(load: Any) -> Any:
        def load_raw(*args: Any) -> ScalarModel:
            model: ScalarModel = load(*args)
            model.score_mean.zero_()
            model.score_std.fill_(1.0)
            return model

        return load_raw

    p.function(train_ppo, "load_scalar", change)
    p.function(learner, "load_scalar", change)


# --- PPO: rewards and advantages --------------------------------------------------------------------


def last_column(p: Patcher) -> None:
    """The score is added in the last column of the batch, where only the longest responses have a token."""

    def change(old: Any) -> Any:
        def shaped(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
            result = -kl_coef * kl * mask
            result[:, -1] += scores
            return result

        return shaped

    p.function(rewards, "shape_rewards", change)


def whitened_scores(p: Patcher) -> None:
    """The scores of each rollout are brought to mean 0 and standard deviation 1."""

    def change(old: Any) -> Any:
        def whitened(*args: Any) -> Tensor:
            scores: Tensor = old(*args)
            return (scores - scores.mean()) / scores.std().clamp(min=1e-8)

        return whitened

    p.function(rewards, "penalised_scores", change)


def critic_from_policy(p: Patcher) -> None:
    """The critic begins as the policy with a head of zeros, not as the reward model."""
    p.function(train_ppo, "load_learner", lambda load: lambda config, same_ids: load(config, same_ids=False))


def value_after(p: Patcher) -> None:
    """The critic's value of a state is read at the token that was chosen in it, so that it knows this token."""

    def change(old: Any) -> Any:
        def after(critic: ScalarModel, batch: Batch, hidden: Tensor) -> Tensor:
            return batch.unpack(critic(batch.ids, batch.packing, wanted=batch.response_tokens))

        return after

    p.function(rollout, "state_values", change)
    p.function(update, "state_values", change)


def no_whitening(p: Patcher) -> None:
    """The policy's loss uses GAE's advantages as they are."""
    p.function(rewards, "whiten", lambda old: lambda x, mask: x * mask)


def whitened_padding(p: Patcher) -> None:
    """Mean and variance of the advantages count the zeros after the end of a response, too."""

    def change(old: Any) -> Any:
        return lambda x, mask: whiten(x * mask, torch.ones_like(mask)) * mask

    p.function(rewards, "whiten", change)


def whitened_minibatches(p: Patcher) -> None:
    """Advantages are whitened once more in each minibatch. Whitening twice is the same as whitening there alone."""

    def change(step: Any) -> Any:
        def whitened(models: Any, experience: update.Experience, chosen: Tensor, *more: Any) -> Any:
            credit, mask = experience.credit, experience.rollout.mask
            advantages = credit.loss_advantages.clone()
            advantages[chosen] = whiten(advantages[chosen], mask[chosen])
            return step(models, replace(experience, credit=replace(credit, loss_advantages=advantages)), chosen, *more)

        return whitened

    p.function(update, "step", change)


# --- PPO: the update --------------------------------------------------------------------------------


def dropout(p: Patcher) -> None:
    """Dropout in the policy's layers while it is updated. The check that every ratio is 1 at first is switched off."""

    def drop(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return F.dropout(output, DROPOUT, module.training)

    def change(load: Any) -> Any:
        def with_dropout(*args: Any, **named: Any) -> learner.Learner:
            loaded: learner.Learner = load(*args, **named)
            for block in (module for module in loaded.policy.modules() if isinstance(module, Block)):
                block.self_attn.register_forward_hook(drop)
                block.mlp.register_forward_hook(drop)
            return loaded

        return with_dropout

    p.function(train_ppo, "load_learner", change)
    p.no_check(update, "check_agreement")


def adams_epsilon(p: Patcher) -> None:
    """Adam's epsilon is 1e-8, its own default."""
    p.constant(learner, "ADAM_EPS", 1e-8)


def loss_by_response(p: Patcher) -> None:
    """PPO's loss is averaged over each response's tokens first, then over responses, so that long ones count less."""
    p.function(
        update, "token_weights", lambda old: lambda mask, estimator, max_new: token_weights(mask, "grpo", max_new)
    )


# --- the table and the program ----------------------------------------------------------------------


@dataclass(frozen=True)
class Patch:
    """What is changed in which stage."""

    script: str
    apply: Callable[[Patcher], None]


OF_STAGE: dict[str, Sequence[Callable[[Patcher], None]]] = {
    "train_sft.py": (no_eos, cut, prompt_loss),
    "train_rm.py": (new_trunk, large_head),
    "train_dpo.py": (mean_logps, bf16_logps, no_reference),
    "train_ppo.py": (
        *(cold_sampler, top_p, stale_sampler, retokenised, two_bos, before_eos, faked_eos, raw_scores, last_column),
        *(whitened_scores, critic_from_policy, value_after, no_whitening, whitened_padding, whitened_minibatches),
        *(dropout, adams_epsilon, loss_by_response),
    ),
}
PATCHES = {apply.__name__: Patch(script, apply) for script, patches in OF_STAGE.items() for apply in patches}
NONE = "none"


def mark(p: Patcher, name: str) -> None:
    """Let the manifest of the stage name the patch, and refuse to finish a stage in which it did nothing."""
    finish = Stage.finish

    def finish_marked(self: Stage, **results: Any) -> None:
        if p.unused:
            raise RunError(
                f"patch {name}: never called: {', '.join(sorted(p.unused))}; the result would say nothing about it. If "
                "the stage was stopped after its last step, run it again with --overwrite true"
            )
        finish(self, **results, patch=name)

    p.assign(Stage, "finish", finish_marked)


def main(argv: Sequence[str]) -> None:
    """Run argv[1], a stage's script, with the patch argv[0] if it is one of this stage. Raises InputError."""
    name, script, *_ = [*argv, "", ""]
    if name not in (NONE, *PATCHES):
        raise InputError(f"{name or 'no patch'}: expected {NONE} or one of {', '.join(PATCHES)}, then a script")
    if script not in CONFIGS:
        raise InputError(f"{script or 'no script'}: expected one of {', '.join(CONFIGS)}")
    sys.argv = [script, *argv[2:]]
    if name != NONE and PATCHES[name].script == script:
        patcher = Patcher()
        PATCHES[name].apply(patcher)
        mark(patcher, name)
    stage = importlib.import_module(Path(script).stem)
    run(stage.main, CONFIGS[script], getattr(stage, "check", None), memory.show)


if __name__ == "__main__":
    main(sys.argv[1:])
