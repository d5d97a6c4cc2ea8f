"""The whole method on one example: make book writes docs/walkthrough.md and notebooks/walkthrough.ipynb from this file."""

# %% [markdown]
# # One example, all the way through
#
# This page follows one prompt and its two answers through the whole method: supervised fine-tuning (SFT), reward model,
# split, DPO, PPO. Every number on it was computed from a finished `make hh` by
# [notebooks/walkthrough.py](../notebooks/walkthrough.py), which is also a [notebook](../notebooks/walkthrough.ipynb).
# You should know PyTorch; nothing about preferences is assumed.
#
# Notation: $x$ is a prompt, $y$ a response, $y_t$ its token number $t$, and $y_{<t}$ the tokens before it.
# $\pi(y_t \mid x, y_{<t})$ is the probability that the model gives to that token. Logarithms are natural, and their unit is
# the *nat*. A log-prob of -0.69 is a probability of one half; of -2.3, one tenth; of 0, certainty.

# %%
import itertools
import json
import math
import os
import subprocess
from pathlib import Path

import torch

import mpo

os.chdir(Path(mpo.__file__).parents[1])  # the checkout; a notebook starts in its own folder
from mpo.config import PPOConfig
from mpo.data.batches import Pair, encode, make_batch, pair_batch
from mpo.data.rows import read_rows
from mpo.data.tokenizer import load_tokenizer
from mpo.model.checkpoint import load_model, load_scalar
from mpo.model.generate import Sampling
from mpo.model.llama import Llama, initialise
from mpo.model.logprobs import response_logprobs
from mpo.model.scoring import score
from mpo.ppo.equations import kl_estimate, policy_losses
from mpo.ppo.learner import load_learner
from mpo.ppo.rewards import assign_credit
from mpo.ppo.rollout import prompt_batches, roll_out
from mpo.ppo.update import Experience, update
from mpo.preference.losses import PairLogps, sigmoid
from mpo.runtime.files import read_json
from mpo.runtime.seeding import generator
from notebooks import show
from notebooks.show import Picture, Table

RUN = Path(os.environ.get("RUN", "runs/hh"))
LONG = 3 if os.environ.get("QUICK") else 150  # rollouts of a long PPO stage; QUICK=1: does everything work?
if not (RUN / "eval" / "manifest.json").exists():  # three minutes or more; a smaller run does, too
    subprocess.run(["make", "hh", f"RUN={RUN}"], check=True)

# %% [markdown]
# ## 1. The data: which of two answers is better?
#
# Preference data is a list of prompts with two responses each, and a label that says which of them somebody preferred:
# the *chosen* one and the *rejected* one. This is the first pair of the training data that meets three conditions: it asks for
# a fact, both responses have at most 12 tokens, and it ends up among the easy pairs (step 4 says what these are).

# %%
tokenizer = load_tokenizer(RUN / "sft")
rows = {row.id: row for row in read_rows(RUN / "data" / "train.jsonl")}
scores = [json.loads(line) for line in (RUN / "split" / "scores.jsonl").read_text().splitlines()]
easy = [rows[s["id"]] for s in scores if s["part"] == "easy" and rows[s["id"]].domain == "fact"]
pairs = encode(easy, tokenizer, 384, 128)[0]
pair: Pair = next((p for p in pairs if max(len(p.chosen), len(p.rejected)) <= 12), pairs[0])
print(show.quoted(pair.row.prompt, ("chosen", pair.row.chosen), ("rejected", pair.row.rejected)))

# %% [markdown]
# A model reads *tokens*: pieces of text, each with a number. The prompt begins with a token for "begin of text" (BOS), and a
# complete response ends with one for "end of text" (EOS). Without EOS a model could not learn to stop. Prompt and response are
# cut into tokens separately, so that the border between them is in the same place in training and in sampling
# ([batches.py](../mpo/data/batches.py)). In the tables, a dot stands for a space.

# %%
names = ("prompt", "chosen", "rejected")
for name in names:
    ids = getattr(pair, name)
    print(f"{name}, {len(ids)} tokens: {' '.join(show.pieces(tokenizer, ids))}".replace("`", ""))

# %% [markdown]
# ## 2. SFT: learn to answer at all
#
# SFT trains on the chosen responses. Its loss is the mean of minus the log-prob, over the tokens of the response alone; the
# prompt is read, but not learnt:
#
# $$L_\text{SFT} = -\frac{1}{|y|} \sum_t \log \pi(y_t \mid x, y_{<t})$$
#
# Code: `losses_of` in [train_sft.py](../train_sft.py), `response_logprobs` in [logprobs.py](../mpo/model/logprobs.py). Here is
# the chosen response before and after. A model with random weights gives every token about the same probability, one divided by
# the size of the vocabulary.

# %%
sft = load_model(RUN / "sft")
untrained = Llama(sft.config)
initialise(untrained, generator(1, "init"))


def token_logps(model: Llama, response: list[int]) -> torch.Tensor:
    """The log-prob of each token of a response to the prompt, (R,)."""
    with torch.no_grad():
        return response_logprobs(model.eval(), make_batch([(pair.prompt, response)])).logp[0]


before, after = token_logps(untrained, pair.chosen), token_logps(sft, pair.chosen)
probabilities = [f"{100 * p:.1f} %" for p in after.exp().tolist()]
columns = show.pieces(tokenizer, pair.chosen), before.tolist(), after.tolist(), probabilities
Table(["token", "log-prob before", "after SFT", "probability after"], zip(*columns, strict=True))

# %%
size = sft.config.vocab_size
print(f"vocabulary: {size} tokens, so log-probs begin near -ln {size} = {-math.log(size):.2f}")
print(f"loss of this response: {-before.mean():.2f} before, {-after.mean():.2f} nats per token after")

# %% [markdown]
# The model is unsure where several responses are possible, and nearly certain once its own words leave only one way to go on.
#
# In SFT, nothing says which of two responses is better. It makes each as probable as the texts that it has seen suggest:

# %%
sums = {
    name: float(token_logps(sft, response).sum())
    for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected))
}
Table(["after SFT", "log-prob of the whole response"], sums.items())

# %% [markdown]
# ## 3. The reward model: one number for a response
#
# A *reward model* is the SFT model with another head: one number, read at the last token of the response. Bradley and Terry's
# model of choices says how a number becomes a probability: that $y_w$ is preferred to $y_l$ has the probability
# $\sigma(r(x, y_w) - r(x, y_l))$, where $\sigma(z) = 1 / (1 + e^{-z})$. The loss is minus the logarithm of the probability of the
# label:
#
# $$L_\text{RM} = -\log \sigma(r_w - r_l), \qquad \frac{\partial L}{\partial r_w} = -\sigma(r_l - r_w), \qquad
# \frac{\partial L}{\partial r_l} = \sigma(r_l - r_w)$$
#
# So a pair that the model has right, and knows it, moves nothing; a pair that it has wrong moves both scores with all its weight.
# Code: `bradley_terry` in [losses.py](../mpo/preference/losses.py), `ScalarModel` in [llama.py](../mpo/model/llama.py).

# %%
rm = load_scalar(RUN / "rm").eval()
with torch.no_grad():
    chosen_reward, rejected_reward = score(rm, pair_batch([pair])).tolist()
gap, std = chosen_reward - rejected_reward, float(rm.score_std)
wrong = 1 / (1 + math.exp(gap * std))
Table(
    ["", "value"],
    [
        ["reward of the chosen response", chosen_reward],
        ["reward of the rejected response", rejected_reward],
        ["gap", gap],
        ["the same in log-odds: times the standard deviation of raw scores", gap * std],
        ["probability that the chosen one is preferred", 1 - wrong],
        ["loss", -math.log(1 - wrong)],
        ["gradient on the raw score of the chosen response", -wrong],
        ["gradient on the raw score of the rejected response", wrong],
    ],
)

# %% [markdown]
# Only differences of scores have a meaning, so the zero point is free. After training it is set: scores are shifted and divided so
# that chosen responses have mean 0 and standard deviation 1 (`normalise` in [train_rm.py](../train_rm.py)). Without that, the price
# of KL in step 6 would mean another thing for every reward model. Are the probabilities right? On held-out pairs:

# %%
held_out = read_json(RUN / "rm" / "manifest.json")["results"]["held_out"]
accuracy, low, high = held_out["accuracy"]
print(f"the reward model agrees with {accuracy:.1%} [{low:.1%}, {high:.1%}] of the labels of held-out pairs;")
print(f"its probabilities are off by {held_out['calibration_error']:.3f} on average (calibration error)")

# %% [markdown]
# A good part of what is missing cannot be learnt: the labels themselves are noisy, as those of people are
# ([world](world.md) says how they are made).
#
# ## 4. The split: easy and hard pairs
#
# The reward model scores every training pair. MPO splits the pairs by the gap $r_w - r_l$ at a threshold $\gamma$, here the median of
# the absolute gap (`split_by_gap` in [split.py](../mpo/preference/split.py)):
#
# - *easy*, gap $\ge \gamma$: the reward model is sure, and agrees with the label. These pairs go to DPO.
# - *hard*, $|$gap$| < \gamma$: the responses are about equally good. Their prompts go to PPO, which does without the label.
# - *contradicted*, gap $\le -\gamma$: the reward model is sure of the opposite. The label is probably wrong; the prompt goes to
#   PPO, too. (The paper does not say what to do with these pairs.)

# %%
gaps = [s["chosen"] - s["rejected"] for s in scores]
gamma = read_json(RUN / "split" / "manifest.json")["results"]["gamma"]
parts = {name: sum(s["part"] == name for s in scores) for name in ("easy", "hard", "contradicted")}


def draw_gaps(axes: object) -> None:
    """The histogram of gaps, with the threshold and this page's pair."""
    edges = [i * 0.2 for i in range(-20, 26)]
    colours = {"contradicted": "#c8500a", "hard": "#b07c00", "easy": "#0072b2"}
    for name, colour in colours.items():
        axes.hist([g for g, s in zip(gaps, scores, strict=True) if s["part"] == name], edges, color=colour, label=name)
    for x in (-gamma, gamma):
        axes.axvline(x, color="#24292f", linewidth=1, linestyle=":")
    top = axes.get_ylim()[1]
    axes.annotate("this pair", (gap, 0), (gap, 0.45 * top), ha="center", arrowprops={"arrowstyle": "->"})
    axes.set_xlabel("reward of chosen minus rejected")
    axes.set_title("training pairs by gap")
    axes.legend(frameon=False)


print(f"gamma = {gamma:.2f};", ", ".join(f"{name}: {count}" for name, count in parts.items()))
Picture(f"histogram of the gaps: {parts}; this page's pair is at {gap:.2f}", draw_gaps)

# %% [markdown]
# ## 5. DPO: learn from the easy pairs
#
# DPO (direct preference optimisation) trains the language model on pairs without sampling. It treats
# $\beta \log (\pi(y \mid x) / \pi_\text{ref}(y \mid x))$ as the reward of a response, where the *reference* $\pi_\text{ref}$ is the
# model before DPO, which stays as it is. The loss is that of a reward model with this reward:
#
# $$D = \log\frac{\pi(y_w \mid x)}{\pi_\text{ref}(y_w \mid x)} - \log\frac{\pi(y_l \mid x)}{\pi_\text{ref}(y_l \mid x)},
# \qquad L_\text{DPO} = -\log \sigma(\beta D)$$
#
# Before the first step, policy and reference are the same, $D = 0$, and the loss is $\ln 2 = 0.69$. Code: `sigmoid` in
# [losses.py](../mpo/preference/losses.py), `pair_logps` in [logps.py](../mpo/preference/logps.py).

# %%
dpo = load_model(RUN / "dpo")
beta = read_json(RUN / "dpo" / "stage.json")["beta"]
whole = {
    m: [token_logps(model, r).sum() for r in (pair.chosen, pair.rejected)] for m, model in (("sft", sft), ("dpo", dpo))
}
lengths = torch.tensor([float(len(pair.chosen))]), torch.tensor([float(len(pair.rejected))])
logps = PairLogps(*(x[None] for x in (*whole["dpo"], *whole["sft"])), *lengths)
moved = [["chosen", *map(float, (whole["sft"][0], whole["dpo"][0], logps.s_w))]]
moved += [["rejected", *map(float, (whole["sft"][1], whole["dpo"][1], logps.s_l))]]
Table(["response", "log-prob before: reference", "after DPO", "log-ratio"], moved)

# %%
D, loss = float(logps.D), float(sigmoid(logps, beta))
print(f"D = {D:.2f}, beta = {beta}, loss = -log sigmoid({beta} x {D:.2f}) = {loss:.3f}; it was ln 2 = 0.693")
print(f"weight of this pair in the gradient: sigmoid(-beta D) = {1 / (1 + math.exp(beta * D)):.2f}; it was 0.50")

# %% [markdown]
# The weight shows what $\beta$ does. A pair stops mattering once $\beta D$ is large, so a small $\beta$ lets $D$ grow far: the policy
# moves away from the reference, in directions on which no pair has anything to say. What that looks like, with the same pairs and
# steps (KL, in nats per response, is how far the model has moved from SFT; gold is the true reward, which training never sees):

# %%
betas = {"0.5": RUN, "0.02": show.another_run(RUN, "beta", "DPO_FLAGS=--beta 0.02", "POLICIES=sft dpo")}
found = {b: show.results(run) for b, run in betas.items()}
table = [["SFT, before", found["0.5"]["sft"]["gold"][0], 0.0, found["0.5"]["sft"]["eos_rate"]]]
table += [[f"DPO, beta {b}", r["dpo"]["gold"][0], r["dpo"]["kl"][0], r["dpo"]["eos_rate"]] for b, r in found.items()]
Table(["model", "gold", "KL to SFT", "share of responses that end"], table)

# %% [markdown]
# ## 6. PPO: learn from what the model itself writes
#
# PPO (proximal policy optimisation) needs no pairs. The policy writes a response to each prompt (a *rollout*), the reward model
# scores it, and tokens that led to more than was expected become more probable. In MPO it starts from the DPO model, on the prompts
# of the pairs that were not easy, and the DPO model is the reference. Below are six iterations of that stage, computed here.

# %%
sizes = {"batch": 64, "minibatch": 32, "microbatch": 16} if LONG > 3 else {}
config = PPOConfig(**read_json(RUN / "mpo" / "stage.json") | sizes)
learner = load_learner(config)
prompts, _ = encode(read_rows(RUN / "split" / "prompts.jsonl"), tokenizer, config.max_prompt, config.max_response)
sampling = Sampling(config.max_new, config.temperature, tokenizer.eos)
critic = learner.critic.model
for iteration, batch in zip(range(6), prompt_batches(prompts, config), strict=False):
    draw = generator(config.seed, "rollout", iteration)
    rollout = roll_out(
        learner.policy, learner.ref, rm, critic, [p.prompt for p in batch], sampling, draw, config.microbatch
    )
    credit = assign_credit(rollout, config.kl_coef, config)
    metrics = update(learner, Experience(rollout, credit, config.kl_coef), iteration, config)
    print(
        f"iteration {iteration}: score {rollout.scores.mean():+.2f}, KL to the reference {rollout.kl_exact.sum(1).mean():.3f}"
    )

# %% [markdown]
# From the last of these rollouts, the first response of 8 to 14 tokens. Each column of the table is explained below it.

# %%
of_length = [i for i, n in enumerate(rollout.mask.sum(1).tolist()) if 8 <= n <= 14 and rollout.finished[i]]
row = next(iter(of_length), 0)
response = rollout.batch.sequences[row][1]
print(show.quoted(batch[row].row.prompt, ("response", tokenizer.decode(response))))
print(f"  score of the reward model: {rollout.scores[row]:.2f}")
with torch.no_grad():
    now = response_logprobs(learner.policy.eval(), rollout.batch.rows([row])).logp
R = len(response)
advantages = credit.loss_advantages[row : row + 1, :R]
_, of_token = policy_losses(now, rollout.logp[row : row + 1, :R], advantages, config.clip)
k1 = kl_estimate(rollout.logp, rollout.ref_logp, "k1")
columns = [
    t[row, :R].tolist() for t in (rollout.logp, rollout.ref_logp, k1, credit.rewards, rollout.values, credit.deltas)
]
columns += [advantages[0].tolist(), of_token["ratio"][0].tolist()]
clipped = ["yes" if c else "" for c in of_token["clipped"][0].tolist()]
header = ["token", "log π", "log ref", "k1", "reward", "V", "δ", "A", "ratio", "clipped?"]
Table(header, zip(show.pieces(tokenizer, response), *columns, clipped, strict=True))

# %% [markdown]
# **log π, log ref**: the log-prob of the token under the policy that sampled it and under the reference. Both are computed once, when
# the response is complete, and with the temperature of the sampling ([rollout.py](../mpo/ppo/rollout.py)).
#
# **k1** $= \log \pi(y_t) - \log \pi_\text{ref}(y_t)$: summed over the tokens of many responses, an estimate of the KL divergence
# between the two models, that is, of how far the policy has moved (`kl_estimate` in [equations.py](../mpo/ppo/equations.py)). A
# single one may be negative; only the mean is not.
#
# **reward** $r_t = -\beta_\text{KL}\, k1_t$, and at the last token the score besides: $r_T = s - \beta_\text{KL}\, k1_T$
# (`shape_rewards`). The reference has its place in this column. Without it, the policy finds whatever the reward model scores too
# high. [Below](#without-the-reference) is what that looks like.
#
# **V**: what the *critic* expects from there on, before the token is known. The critic is a model of its own that starts as the
# reward model and learns to predict returns, $L_V = \frac12 (V_t - G_t)^2$ with $G_t = A_t + V_t$ (`value_losses`). Without it, every
# token of a response that scored well would be praised alike, the good ones and the bad ones.
#
# **δ** $= r_t + V_{t+1} - V_t$: by how much this token changed the expectation (`td_errors`; $V$ after the last token is 0).
#
# **A** $= \delta_t + \lambda \delta_{t+1} + \lambda^2 \delta_{t+2} + \dots$ with $\lambda = 0.95$: the *advantage*, generalised
# advantage estimation (`gae`). With $\lambda = 0$ the critic is believed in everything, and its errors with it. With $\lambda = 1$ only
# what was sampled counts, and chance with it. Here, as the loss uses it: over all tokens of the rollout, shifted and scaled to mean 0
# and variance 1 (`whiten`).
#
# **ratio** $w = \pi_\text{new}(y_t) / \pi_\text{old}(y_t)$: by how much the update has changed the token's probability. It is exactly 1
# when the first minibatch begins, which is checked (`check_agreement`); here it is after all minibatches. The policy's loss is
#
# $$L_\pi = -\min\big(w A,\; \mathrm{clip}(w, 0.8, 1.2)\, A\big)$$
#
# so that a token that has already changed by more than a fifth in the direction of its advantage gets no more gradient
# (`policy_losses`). The rollout says something about policies close to the one that wrote it, and nothing about others.
#
# **clipped?**: whether the ratio is outside 0.8 to 1.2.
#
# ## What the stages have reached

# %%
found = show.results(RUN)
keys = [p for p in ("sft", "dpo", "mpo") if p in found]
rows_of = [
    [p.upper(), found[p]["reward"][0], found[p]["gold"][0], found[p]["kl"][0], found[p]["eos_rate"]] for p in keys
]
Table(["model", "RM reward", "gold", "KL to SFT", "share of responses that end"], rows_of)

# %% [markdown]
# *RM reward* is what the reward model says, on held-out prompts; *gold* is the true reward of the built-in world, which training never
# sees ([world](world.md)). One seed says little; [results](results.md) compares methods over seeds.
#
# ## What goes wrong without it
#
# The stage of section 6 once more, each time with one thing taken away, and everything else equal.
#
# ### Without the reference
#
# With a price of 0 for the KL (`--kl_coef 0`), and 150 rollouts rather than 50. The reward model's score is what PPO maximises, and it
# rises. The true reward stops, and falls: the policy has found what the reward model likes and people would not. This is called
# *over-optimisation*, or reward hacking.

# %%
pushed = {
    "price 0.05": show.another_run(RUN, "pushed", f"mpo_FLAGS=--iterations {LONG} --keep 9", "POLICIES=sft mpo"),
    "price 0": show.another_run(
        RUN, "no-kl", f"mpo_FLAGS=--iterations {LONG} --keep 9 --kl_coef 0", "POLICIES=sft mpo"
    ),
}
curves = {}
for name, run in pushed.items():
    steps = {int(folder.name[5:]): folder for folder in (run / "mpo").glob("step-*")} | {LONG: run / "mpo"}
    folders = {"sft": run / "sft", "0": RUN / "dpo"} | {str(i): steps[i] for i in sorted(steps)}
    curves[name] = show.evaluate(run, "along", folders)


def draw_along(axes: object) -> None:
    """RM reward and gold along PPO, with and without the price."""
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        points = sorted((int(k), v) for k, v in curve.items() if k.isdigit())
        for kind, colour in (("reward", "#0072b2"), ("gold", "#c8500a")):
            label = f"{'RM reward' if kind == 'reward' else 'gold'}, {name}"
            axes.plot([i for i, _ in points], [v[kind][0] for _, v in points], style, color=colour, label=label)
    axes.set_xlabel("rollouts")
    axes.set_title("RM reward and gold along PPO")
    axes.legend(frameon=False, fontsize=8)


Picture(
    "RM reward and gold reward along 150 rollouts of PPO, with and without a price for the KL", draw_along, height=260
)

# %% [markdown]
# One held-out prompt at three points of the run without a price: before PPO, after a third of it, and at the end. It is the prompt
# whose gold reward falls most after that third.

# %%
run, third = pushed["price 0"], sorted(steps)[len(steps) // 3]
steps = ("0", str(third), str(LONG))
responses = zip(*(show.responses(run, "along", step) for step in steps), strict=True)
worst = max(responses, key=lambda r: r[1]["gold"] - r[2]["gold"])
print(show.quoted(worst[0]["prompt"]))
for step, r in zip(steps, worst, strict=True):
    print(f"\n  {step} rollouts: RM reward {r['reward']:+.2f}, gold {r['gold']:+.1f}\n   {r['response']}")

# %% [markdown]
# ### Without the critic, without the penalty
#
# `--advantage reinforce++` has no critic: a token's advantage is the sum of the rewards from it on, whitened. `--missing_eos_penalty 0`
# takes away the point that a response loses when it does not end within its 64 tokens.

# %%
runs = {
    "as it is": RUN,
    "no critic": show.another_run(RUN, "no-critic", "mpo_FLAGS=--advantage reinforce++", "POLICIES=sft mpo"),
    "no penalty": show.another_run(RUN, "no-penalty", "mpo_FLAGS=--missing_eos_penalty 0", "POLICIES=sft mpo"),
}
found = {name: show.results(run)["mpo"] for name, run in runs.items()}
table = [[n, f["reward"][0], f["gold"][0], f["kl"][0], f["eos_rate"], f["words"]] for n, f in found.items()]
Table(["PPO", "RM reward", "gold", "KL to SFT", "share of responses that end", "words"], table)

# %% [markdown]
# Without the critic, this run ends lower after as many rollouts. Without the penalty, nothing changes here: nearly every response
# ended before PPO began, and goes on to do so.
#
# [Details](details.md) measures these and many other details over several seeds, with intervals.
#
# ## How a pair is computed once
#
# Both responses of a pair continue the same prompt. Here it is computed once: prompt, chosen and rejected response lie end to end in
# one row, and a mask says who sees whom ([packing.py](../kernels/packing.py)). A row of the picture is a token, and the dark squares
# are the tokens that it attends to: those of the prompt and, before it, of its own response. The rejected response does not see the
# chosen one, and its positions continue from the prompt as if the chosen one were not there.

# %%
batch = pair_batch([pair])
N = len(batch.ids)
seen = torch.zeros(N, N, dtype=torch.bool)
for start, length, parent in zip(batch.packing.starts, batch.packing.lengths, batch.packing.parents, strict=True):
    own = slice(int(start), int(start + length))
    seen[own, own] = torch.ones(int(length), int(length), dtype=torch.bool).tril()
    if parent >= 0:
        begin = int(batch.packing.starts[parent])
        seen[own, begin : begin + int(batch.packing.lengths[parent])] = True


def draw_mask(axes: object) -> None:
    """Which token attends to which."""
    axes.imshow(~seen, cmap="gray", vmin=-0.5, vmax=1, interpolation="nearest")
    ends = [int(start) for start in batch.packing.starts] + [N]
    middles = [(a + b) / 2 - 0.5 for a, b in itertools.pairwise(ends)]
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names, rotation=90, va="center")
    axes.tick_params(length=0)
    axes.grid(False)
    for end in ends[1:-1]:
        axes.axhline(end - 0.5, color="#c8500a", linewidth=0.8)
        axes.axvline(end - 0.5, color="#c8500a", linewidth=0.8)


Picture(
    "which token attends to which: both responses see the prompt and themselves, not each other", draw_mask, height=340
)

# %% [markdown]
# ## Where to go from here
#
# [examples/](../examples) has DPO, PPO, the reward model and all of MPO in one short file each, in plain PyTorch.
# [losses](losses.md) has every loss with its equation, and says how to add one. [metrics](metrics.md) says what every number of a
# run means.
