"""config.json of the Hugging Face layout: read into a LlamaConfig, and written from one.

Llama 1 to 3, TinyLlama and SmolLM2 have model_type "llama"; Mistral is the same model under another name. Whatever
this project cannot compute exactly (biases, sliding windows, other architectures) is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mpo.model.llama import LlamaConfig
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json

FAMILIES = ("llama", "mistral")
# Options that change what a model computes and that this project does not compute.
UNSUPPORTED = ("attention_bias", "mlp_bias", "sliding_window", "num_local_experts", "quantization_config")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def config_from_json(path: Path) -> LlamaConfig:
    """Read a config.json, in the older form (rope_theta, rope_scaling) or the newer (rope_parameters).

    Raises InputError naming the file and the field that is missing or unsupported.
    """
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a JSON object")
    _refuse_unsupported(path, raw)
    for name in _SIZES:
        if not isinstance(raw.get(name), int) or raw[name] < 1:
            raise InputError(f"{path}: {name} must be a positive integer, found {raw.get(name)!r}")
    heads = raw["num_attention_heads"]
    rope, theta = _rope(path, raw)
    fields = {name: raw[name] for name in _SIZES}
    optional = ("max_position_embeddings", "rms_norm_eps", "eos_token_id")
    fields |= {name: raw[name] for name in optional if raw.get(name) is not None}
    if isinstance(fields.get("eos_token_id"), list):  # Llama 3 lists several
        fields["eos_token_id"] = (*fields["eos_token_id"], None)[0]
    bos, pad = raw.get("bos_token_id", LlamaConfig.bos_token_id), raw.get("pad_token_id")
    pad = None if pad in (-1, fields.get("eos_token_id", 2)) else pad  # a mask made from EOS pads would hide every EOS
    shape = {"num_key_value_heads": raw.get("num_key_value_heads") or heads}
    shape["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // heads
    for name, value in (fields | shape | {"rope_theta": theta} | rope).items():
        whole = not name.startswith(("rms_", "rope_", "low_", "high_", "factor"))
        _number(path, name, value, whole)
    for name, value in (("bos_token_id", bos), ("pad_token_id", pad)):
        if value is not None:
            _number(path, name, value, True)
    if heads % shape["num_key_value_heads"] or shape["head_dim"] % 2:
        raise InputError(f"{path}: {heads} heads of {shape} do not make groups, or rotary pairs")
    tied = bool(raw.get("tie_word_embeddings", False))
    return LlamaConfig(
        **fields,
        **shape,
        bos_token_id=bos,
        pad_token_id=pad,
        rope_theta=theta,
        rope_scaling=rope,
        tie_word_embeddings=tied,
    )


def _refuse_unsupported(path: Path, raw: dict[str, Any]) -> None:
    """Raise InputError naming the first option that this project does not compute."""
    if raw.get("model_type") not in FAMILIES:
        raise InputError(
            f"{path}: model_type {raw.get('model_type')!r:.80} is not supported; {' and '.join(FAMILIES)} are"
        )
    for name in UNSUPPORTED:
        if raw.get(name):
            raise InputError(f"{path}: {name} is not supported, found {raw[name]!r:.80}")
    layers = raw.get("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise InputError(f"{path}: layer_types other than 'full_attention' are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported; only 'silu' is")


def _number(path: Path, name: str, value: Any, whole: bool) -> None:
    """Raise InputError for what is not a number, not finite or negative; ids and sizes must be whole."""
    kind = int if whole else (int, float)
    good = isinstance(value, kind) and not isinstance(value, bool) and 0 <= value < 2**40
    if not good:
        raise InputError(f"{path}: {name} must be a {'whole ' if whole else ''}number from 0 on, found {value!r:.80}")


def _rope(path: Path, raw: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The rotary scaling ({} for none) and theta, from either form of config.json."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise InputError(f"{path}: rope_parameters must be an object, found {given!r:.80}")
    rope = dict(given)
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if kind == "default":
        return {}, theta
    if kind != "llama3":
        raise InputError(f"{path}: rope scaling {kind!r} is not supported; only 'llama3' is")
    needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [name for name in needed if name not in rope]:
        raise InputError(f"{path}: rope scaling lacks {', '.join(missing)}")
    return {name: rope[name] for name in needed}, theta


def config_to_json(config: LlamaConfig, architecture: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The config.json of a model: both the older and the newer names of the rotary settings."""
    rope = {"rope_type": "llama3", **config.rope_scaling} if config.rope_scaling else None
    plain = {k: v for k, v in config.__dict__.items() if k != "rope_scaling"}
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **plain,
        "rope_scaling": rope,
        "rope_parameters": {"rope_theta": config.rope_theta, **(rope or {"rope_type": "default"})},
    }
