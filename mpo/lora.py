"""Low-rank adapters (LoRA, 2106.09685): W x + (alpha / r) B A x, where only A and B learn.

With the adapters off a model is what it was before, so that one set of weights serves as policy and reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mpo import parallel
from mpo.errors import InputError
from mpo.files import write_json, write_tensors
from mpo.model import Adapters, Linear, Llama, ScalarModel
from mpo.randomness import generator

if TYPE_CHECKING:
    from kernels import Pieces
    from mpo.config import Training

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapters_of(config: Training, base: str) -> Adapters | None:
    """From a stage's flags; None where all weights learn. Errors: InputError for an unknown target."""
    if not config.lora_rank:
        return None
    targets = tuple(t.strip() for t in config.lora_targets.split(","))
    if unknown := set(targets) - set(TARGETS):
        raise InputError(f"--lora_targets {config.lora_targets}: {min(unknown)!r} is not one of {', '.join(TARGETS)}")
    return Adapters(config.lora_rank, config.lora_alpha, targets, config.seed, base)


class AdaptedLinear(Linear):
    """A linear layer whose weight stays, with an adapter beside it that can be switched off."""

    def __init__(self, base: Linear, adapters: Adapters):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", None)
        self.lora_A = Linear(base.in_features, adapters.rank)
        self.lora_B = Linear(adapters.rank, base.out_features)
        self.scale, self.on = adapters.alpha / adapters.rank, True

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs)"""
        y = super().forward(x)
        return y.add_(self.lora_B(self.lora_A(x.float())), alpha=self.scale) if self.on else y

    def merged(self) -> Tensor:
        """(outputs, inputs): W + (alpha / r) B A, or W where it is off; sharded ones are put together."""
        W, A, B = (parallel.whole(layer.detach()) for layer in (self.weight, self.lora_A.weight, self.lora_B.weight))
        return (W + self.scale * (B @ A)).to(W.dtype) if self.on else W


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers of a model that have adapters, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def attach(model: Llama | ScalarModel, adapters: Adapters) -> None:
    """Give a model adapters; nothing else of it learns, but for a scalar model's head."""
    model.requires_grad_(False)
    for block in model.model.layers:
        for parent in block.children():
            for name, layer in list(parent.named_children()):
                if name in adapters.targets and isinstance(layer, Linear):
                    setattr(parent, name, AdaptedLinear(layer, adapters))
    if isinstance(model, ScalarModel):
        model.score.requires_grad_(True)
    model.adapters = adapters


def first_values(model: nn.Module, adapters: Adapters) -> dict[str, Tensor]:
    """Of all adapters, by name: A uniform in +-1/sqrt(inputs), B zero, so that the model starts as its base."""
    draw, found = generator(adapters.seed, "lora"), {}
    for name, layer in adapted(model).items():
        bound = 1 / math.sqrt(layer.in_features)
        found[f"{name}.lora_A.weight"] = torch.empty(adapters.rank, layer.in_features).uniform_(
            -bound, bound, generator=draw
        )
        found[f"{name}.lora_B.weight"] = torch.zeros(layer.out_features, adapters.rank)
    return found


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Within it the model is its base."""
    layers = adapted(model).values()
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


class BaseOf(nn.Module):
    """A language model with its adapters off: the reference that needs no weights of its own."""

    def __init__(self, model: Llama):
        super().__init__()
        self.of = [model]  # not a submodule: its parameters are the model's

    @property
    def lm_head(self) -> Linear:
        """The head, which has no adapter."""
        return self.of[0].lm_head

    def forward(self, ids: Tensor, pieces: Pieces) -> Tensor:
        """See Llama.forward."""
        with switched_off(self.of[0]):
            hidden: Tensor = self.of[0](ids, pieces)
            return hidden


def critic_on(policy: Llama, adapters: Adapters) -> ScalarModel:
    """A critic on the policy's own base: adapters and a head of its own, which values everything at 0 at first."""
    with torch.device("meta"):
        critic = ScalarModel(policy.config)
    for name, p in policy.model.named_parameters():
        if ".lora_" in name:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(critic.model.get_submodule(parent), leaf, p)
    critic.model.frequencies = policy.model.frequencies.clone()
    here = policy.lm_head.weight.device
    critic.score_mean, critic.score_std = torch.zeros((), device=here), torch.ones((), device=here)
    critic.score.weight = nn.Parameter(torch.zeros(1, policy.config.hidden_size, device=here))
    attach(critic, adapters)
    first = {name: value.to(here) for name, value in first_values(critic, adapters).items()}
    critic.load_state_dict(first, strict=False, assign=True)
    return critic


def save_adapters(folder: Path, model: Llama) -> None:
    """In peft's file format: adapter_model.safetensors and adapter_config.json."""
    adapters = model.adapters
    assert adapters is not None
    weights = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    complete = {f"base_model.model.{name}": parallel.whole(p.detach()) for name, p in weights.items()}
    write_tensors(folder / "adapter_model.safetensors", complete)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapters.base,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "target_modules": sorted(adapters.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", about)
