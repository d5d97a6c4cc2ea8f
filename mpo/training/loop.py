"""The training loop that SFT, reward model and DPO share, and the microbatches, which PPO uses too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from mpo.config import Training
from mpo.data.batches import Pair
from mpo.data.tokenizer import Tokenizer
from mpo.model.checkpoint import save_model
from mpo.model.llama import Llama, ScalarModel, configure_layers
from mpo.runtime import distributed
from mpo.runtime.flags import exact_div
from mpo.runtime.output import progress
from mpo.runtime.saves import Part, Saves
from mpo.runtime.stage import Stage
from mpo.training.guards import NotFinite, agree_finite, failure, not_finite
from mpo.training.optimisers import learning_rate, make_optimiser, optimiser_step

Metrics = dict[str, Tensor]
Losses = Callable[[list[Pair]], tuple[Tensor, Metrics]]
"""A microbatch of b pairs -> their losses (b,), and metrics (b,) each."""


class Stateful(Protocol):
    """What a loss carries from step to step besides weights (preference/logps.py: RunningMean)."""

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""


def milestones(steps: int, keep: int) -> dict[int, str]:
    """The steps after which an intermediate model is kept, and the name of its folder."""
    at = {round(steps * i / (keep + 1)) for i in range(1, keep + 1)} - {0, steps}
    return {step: f"step-{step}" for step in sorted(at)}


def microbatches(rows: int, microbatch: int, models: Sequence[nn.Module]) -> Iterator[list[int]]:
    """This process's rows of a batch, as many at a time as fit; gradients are averaged after the last microbatch.

    Raises InputError where the rows do not divide by the processes, or a process's rows by the microbatch.
    """
    local = distributed.exact_local_rows(rows, "the rows of an optimiser step")
    size = min(microbatch, len(local))
    for i in range(exact_div(len(local), size, "rows of an optimiser step in each process:", "--microbatch")):
        for model in models:
            distributed.synchronise_gradients(model, (i + 1) * size == len(local))
        yield local[i * size : (i + 1) * size]


def accumulate(
    model: nn.Module, batch: list[Pair], losses_of: Losses, units: Callable[[Pair], float], microbatch: int
) -> dict[str, float]:
    """Add the gradient of the batch's mean loss, microbatch by microbatch; returns the means of loss and metrics.

    Losses and metrics are divided by the number of units (tokens or pairs) in the whole batch. So 1 x 8 and 8 x 1
    microbatches give the same gradient, in any number of processes.

    Raises NotFinite, in every process, where a loss is not finite.
    """
    total = sum(units(pair) for pair in batch)
    metrics: dict[str, float] = {}
    bad = list[int]()
    for index in microbatches(len(batch), microbatch, [model]):
        losses, more = losses_of([batch[i] for i in index])
        bad += not_finite(losses, index)
        (losses.sum() * (distributed.world_size() / total)).backward()  # gradients of processes are averaged, not added
        for name, values in {"loss": losses.detach(), **more}.items():
            metrics[name] = metrics.get(name, 0.0) + float(values.sum()) / total
    agree_finite("the loss", bad)
    return distributed.all_sum(metrics)


def train(
    model: Llama | ScalarModel,
    batches: Sequence[list[Pair]],
    losses_of: Losses,
    units: Callable[[Pair], float],
    config: Training,
    stage: Stage,
    keep: int = 0,
    carried: Stateful | None = None,
    tokenizer: Tokenizer | None = None,
) -> dict[str, float]:
    """Take one step on every batch, from the last save on; returns the means over the last tenth of the steps.

    Args:
        losses_of: the loss.
        units: what the loss is averaged over, counted in each pair (`accumulate`).
        keep: how many intermediate models to keep.
        carried: what the loss carries from step to step.
        tokenizer: is written beside each intermediate model.

    Raises:
        RunError: a loss or gradient is not finite; no weight has been changed by it.
    """
    exact_div(config.batch, config.microbatch, "--batch", "--microbatch")
    distributed.wrap(model)
    configure_layers(model, config.recompute, config.compile)
    optimiser = make_optimiser(model, config.lr, config.weight_decay, kind=config.optimiser)
    saves = Saves(stage, config, {"model": Part(model, optimiser)})
    begin = {"recent": [], "carried": carried.state_dict() if carried else {}}
    done, numbers = saves.restore(begin, len(batches))
    recent: list[dict[str, float]] = numbers["recent"]
    if carried:
        carried.load_state_dict(numbers["carried"])
    model.train()
    kept = milestones(len(batches), keep)
    bar = progress(range(done, len(batches)), stage.name, done)
    for step in bar:
        try:
            metrics = accumulate(model, batches[step], losses_of, units, config.microbatch)
            lr = learning_rate(step, len(batches), config.lr, config.warmup, config.final_lr)
            metrics |= {"grad_norm": optimiser_step(optimiser, model, lr, config.grad_clip), "lr": lr}
        except NotFinite as e:
            rows = [
                {"id": p.row.id, "prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in batches[step]
            ]
            raise failure(stage, step, e, rows, saves.before(step, numbers)) from None
        stage.log(step, metrics)
        if step + 1 in kept:
            save_model(stage.out / kept[step + 1], model, tokenizer)
        recent = [*recent[-max(1, len(batches) // 10) :], metrics]
        numbers = {"recent": recent, "carried": carried.state_dict() if carried else {}}
        saves.after(step + 1, numbers, last=step + 1 == len(batches))
        shown = [name for name in ("loss", "accuracy") if name in metrics]
        bar.set_postfix({name: f"{sum(m[name] for m in recent) / len(recent):.3f}" for name in shown}, refresh=False)
    return {name: sum(m[name] for m in recent) / len(recent) for name in recent[-1]}
