"""Follow a stage while it trains: its metrics also go to TensorBoard, Trackio or Weights & Biases (--log).

metrics.jsonl stays the truth: a tracker gets what was written there. Each of the three is a package of its own, which
the project does without. A tracker that fails never stops a stage.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mpo.runtime.errors import InputError
from mpo.runtime.manifest import TRACKER
from mpo.runtime.output import note

PROJECT = "mpo"


class Run(NamedTuple):
    """What a tracker has to know of a stage."""

    id: str  # the name of the tracker's run, which nothing else has
    stage: str
    group: str  # the name of the run folder
    folder: Path  # the run folder
    flags: dict[str, Any]


class Session(NamedTuple):
    """An open run of a tracker."""

    send: Callable[[int, dict[str, float]], None]  # step, metrics
    close: Callable[[], None]


def tensorboard(run: Run) -> Session:
    """Event files in the run folder; `tensorboard --logdir runs/hh/tensorboard` shows them."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / "tensorboard" / run.id))

    def send(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # so that nothing is lost where the stage is killed

    return Session(send, writer.close)


def trackio(run: Run) -> Session:
    """Trackio's own database; `trackio show --project mpo` shows it."""
    import trackio

    trackio.init(project=PROJECT, name=run.id, group=run.group, config=run.flags, resume="allow", embed=False)
    return Session(lambda step, metrics: trackio.log(metrics, step=step), trackio.finish)


def wandb(run: Run) -> Session:
    """Weights & Biases; WANDB_MODE=offline keeps everything in the folder `wandb` of the run."""
    import wandb

    session = wandb.init(
        project=PROJECT,
        id=run.id,
        name=f"{run.group}/{run.stage}",
        group=run.group,
        config=run.flags,
        resume="allow",
        dir=str(run.folder),
        settings=wandb.Settings(console="off"),  # leaves the terminal alone
    )
    return Session(lambda step, metrics: session.log(metrics, step=step), session.finish)


TRACKERS: dict[str, Callable[[Run], Session]] = {"tensorboard": tensorboard, "trackio": trackio, "wandb": wandb}


def check(name: str) -> None:
    """Raise InputError where the package of a tracker is not installed."""
    if name == "none":
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # no origin: a folder of this name, as wandb makes one
        raise InputError(
            f"--log {name}: needs the {name} package; install it with: {sys.executable} -m pip install {name}"
        )


class Tracker:
    """Sends the metrics of one stage to a tracker, each step once, also where the stage is interrupted and goes on."""

    def __init__(self, name: str, out: Path, flags: Mapping[str, Any], recipe: str):
        """`name`: one of TRACKERS. `out`: the stage's folder. `recipe`: another one makes another run."""
        self.name, self.state, self.recipe = name, out / TRACKER, recipe
        known = self._known()
        self.sent = int(known.get("step", -1))  # the last step that was sent
        whole = out.resolve()
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        group = whole.parent.name or PROJECT
        self.id = str(known.get("id") or f"{group}-{whole.name}-{stamp}")
        self.run = Run(self.id, whole.name, group, whole.parent, dict(flags))
        self.session: Session | None = None
        self.failed = False

    def _known(self) -> dict[str, Any]:
        """What an interrupted run of the same stage has left, if anything."""
        try:
            known = json.loads(self.state.read_text(encoding="utf-8"))
            same = (known["tracker"], known["recipe"]) == (self.name, self.recipe)
            return {"id": str(known["id"]), "step": int(known["step"])} if same else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the finite numbers of a step, unless they have been sent before."""
        if self.failed or step <= self.sent:
            return
        try:
            self.session = self.session or TRACKERS[self.name](self.run)
            self.session.send(step, {k: float(v) for k, v in metrics.items() if math.isfinite(v)})
            self.sent = step
            state = {"tracker": self.name, "id": self.id, "recipe": self.recipe, "step": step}
            new = self.state.with_name(f".{TRACKER}.partial")
            new.write_text(json.dumps(state), encoding="utf-8")
            os.replace(new, self.state)
        except Exception as e:  # whatever it is, the stage matters more
            self._give_up(e)

    def close(self) -> None:
        """End the run of the tracker: the stage is finished."""
        if self.session and not self.failed:
            try:
                self.session.close()
            except Exception as e:
                self._give_up(e)

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        first = next(iter(str(error).strip().splitlines()), "")
        what = f"{type(error).__name__}: {first[:200]}"
        note(f"\n--log {self.name}: failed ({what}); the stage goes on without it, and metrics.jsonl has every step")
