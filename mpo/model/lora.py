"""Low-rank adapters (LoRA, 2106.09685): W x + (alpha / r) B A x, where only A and B are trained.

With its adapters off, a model is its base again. So a single set of weights serves as policy and as reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mpo.model.llama import Adapters, Linear, Llama, ScalarModel
from mpo.runtime import distributed
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_json, write_tensors
from mpo.runtime.seeding import generator

if TYPE_CHECKING:
    from mpo.config import Training
    from mpo.kernels.functions import KVCache, Packing

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapters_of(config: Training, base: str) -> Adapters | None:
    """The adapters that a stage's flags ask for; None for none. Raises InputError for an unknown target."""
    if not config.lora_rank:
        return None
    targets = tuple(t.strip() for t in config.lora_targets.split(","))
    if unknown := set(targets) - set(TARGETS):
        raise InputError(f"--lora_targets {config.lora_targets}: {min(unknown)!r} is not one of {', '.join(TARGETS)}")
    base = str(Path(base).resolve()) if Path(base).exists() else base  # peft may be run from any folder
    return Adapters(config.lora_rank, config.lora_alpha, targets, config.seed, base)


class AdaptedLinear(Linear):
    """A linear layer with a fixed weight, and an adapter that can be switched off."""

    def __init__(self, base: Linear, adapters: Adapters):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.bias = base.bias
        self.lora_A = Linear(base.in_features, adapters.rank)
        self.lora_B = Linear(adapters.rank, base.out_features)
        self.scale, self.on = adapters.alpha / adapters.rank, True

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs)"""
        y = super().forward(x)
        return y.add_(self.lora_B(self.lora_A(x.float())), alpha=self.scale) if self.on else y

    def merged(self) -> Tensor:
        """(outputs, inputs): W + (alpha / r) B A, or W with the adapter off; sharded weights are gathered."""
        W, A, B = (
            distributed.full_tensor(layer.detach()) for layer in (self.weight, self.lora_A.weight, self.lora_B.weight)
        )
        return (W + self.scale * (B @ A)).to(W.dtype) if self.on else W


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers of a model that have an adapter, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def attach(model: Llama | ScalarModel, adapters: Adapters) -> None:
    """Give a model adapters. Nothing else of it is trained, except the head of a scalar model."""
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
    """Initial values of all adapters: A uniform in +-1/sqrt(inputs), B zero, so that the model starts as its base."""
    draw, values = generator(adapters.seed, "lora"), {}
    for name, layer in adapted(model).items():
        bound = 1 / math.sqrt(layer.in_features)
        values[f"{name}.lora_A.weight"] = torch.empty(adapters.rank, layer.in_features).uniform_(
            -bound, bound, generator=draw
        )
        values[f"{name}.lora_B.weight"] = torch.zeros(layer.out_features, adapters.rank)
    return values


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its base."""
    layers = adapted(model).values()
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


class BaseModel(nn.Module):
    """A language model with its adapters off: a reference without weights of its own."""

    def __init__(self, model: Llama):
        super().__init__()
        self.adapted = [model]  # in a list, so that it is no submodule: its parameters are not ours

    @property
    def lm_head(self) -> Linear:
        """The head. It has no adapter."""
        return self.adapted[0].lm_head

    def forward(
        self, ids: Tensor, packing: Packing, cache: KVCache | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """See Llama.forward."""
        with switched_off(self.adapted[0]):
            hidden: Tensor = self.adapted[0](ids, packing, cache, wanted)
            return hidden


def critic_on(policy: Llama, adapters: Adapters) -> ScalarModel:
    """A critic on the policy's base, with adapters and a head of its own; at first it values every state at 0."""
    with torch.device("meta"):
        critic = ScalarModel(policy.config)
    for name, p in policy.model.named_parameters():
        if ".lora_" in name:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(critic.model.get_submodule(parent), leaf, p)
    critic.model.frequencies = policy.model.frequencies.clone()
    place = policy.lm_head.weight.device
    critic.score_mean, critic.score_std = torch.zeros((), device=place), torch.ones((), device=place)
    critic.score.weight = nn.Parameter(torch.zeros(1, policy.config.hidden_size, device=place))
    attach(critic, adapters)
    first = {name: value.to(place) for name, value in first_values(critic, adapters).items()}
    critic.load_state_dict(first, strict=False, assign=True)
    return critic


def save_adapters(folder: Path, model: Llama) -> None:
    """Write the adapters in peft's format: adapter_model.safetensors and adapter_config.json."""
    adapters = model.adapters
    assert adapters is not None
    weights = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    complete = {f"base_model.model.{name}": distributed.full_tensor(p.detach()) for name, p in weights.items()}
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
