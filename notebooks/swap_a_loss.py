"""A loss of one's own beside DPO's: make book writes docs/swap_a_loss.md and notebooks/swap_a_loss.ipynb from this file."""

# %% [markdown]
# # Swap a loss
#
# You have an idea for a preference loss. This page writes it in five lines, trains it on the pairs that DPO was trained on, and puts
# its row beside DPO's. It was written by [notebooks/swap_a_loss.py](../notebooks/swap_a_loss.py), which is also a
# [notebook](../notebooks/swap_a_loss.ipynb). It needs a finished `make hh`; if there is none, it makes one (three minutes or more).

# %% shown
import os
import subprocess
from pathlib import Path

import mpo

os.chdir(Path(mpo.__file__).parents[1])  # the checkout; a notebook starts in its own folder
from notebooks import show

RUN = Path(os.environ.get("RUN", "runs/hh"))
if not (RUN / "eval" / "manifest.json").exists():
    subprocess.run(["make", "hh", f"RUN={RUN}"], check=True)

# %% [markdown]
# ## The loss
#
# A loss gets the log-probs of both responses under the policy and the reference ([PairLogps](../mpo/preference/losses.py)):
# `pairs.s_w` and `pairs.s_l` are $\log(\pi/\pi_\text{ref})$ of the chosen and the rejected response, and `pairs.D` is their
# difference. It gives one number for each pair. DPO is $-\log \sigma(\beta D)$. It is known that DPO often makes the *chosen*
# response less probable, too, as long as the rejected one falls further. So here is DPO with a price for each nat that the chosen
# response loses:

# %% shown
import torch.nn.functional as F


def anchored(pairs, beta, weight=0.5):
    return -F.logsigmoid(beta * pairs.D) + weight * (-pairs.s_w).clamp(min=0)


mpo.losses.PREFERENCE_LOSSES["anchored"] = anchored

# %% [markdown]
# ## Training
#
# `mpo.train` runs the stage that `make hh` runs ([library](library.md)). It takes every flag of `train_dpo.py --help`; those that are
# not named here have the same values as in the run. A second call with the same flags only loads the result.

# %% shown
out = RUN.parent / f"{RUN.name}-anchored"
mine = mpo.train("dpo", RUN / "split" / "pairs.jsonl", model=RUN / "sft", out=out, loss="anchored:weight=0.5")
print(mine.generate("I lost my wallet."))

# %% [markdown]
# ## Its row beside DPO's
#
# Both models answer the same 400 held-out prompts with the same random numbers. *gold* is the true reward of the built-in world,
# with a 95 % interval over prompts. *KL* is how far the model has moved from SFT, in nats per response. The last two columns are how
# the log-probs of the chosen and the rejected responses had moved by the last steps of training.

# %% shown
folders = {"sft": RUN / "sft", "dpo": RUN / "dpo", "anchored": out}
found = show.evaluate(RUN, "swap", folders, prompts=400)
rows = []
for name in ("dpo", "anchored"):
    gold, low, high = found[name]["gold"]
    last = show.last_steps(folders[name], "reward_chosen", "reward_rejected")
    moved = [f"{value / 0.5:+.2f}" for value in last]  # a reward is beta times a log-ratio
    rows.append([name, f"{gold:.2f} [{low:.2f}, {high:.2f}]", found[name]["kl"][0], *moved])
show.Table(["loss", "gold", "KL", "chosen moved", "rejected moved"], rows)

# %% [markdown]
# One seed says whether the loss works, not whether it is better. For that,
#
#     make ablate GRID=losses
#
# trains every loss in the table on several seeds; a loss that is to be in it goes into
# [mpo/preference/losses.py](../mpo/preference/losses.py) ([losses](losses.md#add-your-own-loss-in-five-lines)).
