"""config.json of the Hugging Face layout, read into a LlamaConfig and written from one; also generation_config.json.

Llama 1 to 3, TinyLlama and SmolLM2 have model_type "llama"; Mistral is the same model under another name. Whatever
this project cannot compute exactly (biases, experts, other architectures) is refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpo.model.llama import LlamaConfig
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json


class Family(NamedTuple):
    """What a model_type stands for in transformers."""

    architecture: str  # of its language model
    defaults: dict[str, Any]  # of the options that its config.json leaves out


FAMILIES = {
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048}),
    "mistral": Family(
        "MistralForCausalLM",
        {"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
}
# Options that change what a model computes and that this project does not compute.
UNSUPPORTED = ("attention_bias", "mlp_bias", "num_local_experts", "quantization_config")
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
    raw = {"rms_norm_eps": 1e-6} | FAMILIES[raw["model_type"]].defaults | raw
    heads = raw["num_attention_heads"]
    rope, theta = _rope(path, raw)
    fields = {name: raw[name] for name in _SIZES}
    optional = ("max_position_embeddings", "sliding_window", "rms_norm_eps")
    fields |= {name: raw[name] for name in optional if raw.get(name) is not None}
    bos, eos, pad = raw.get("bos_token_id", LlamaConfig.bos_token_id), stop_ids(raw), raw.get("pad_token_id")
    pad = None if pad == -1 or eos == (pad,) else pad  # if EOS were the pad, a mask made from ids would hide every EOS
    shape = {"num_key_value_heads": raw.get("num_key_value_heads") or heads}
    shape["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // heads
    for name, value in (fields | shape | {"rope_theta": theta} | rope).items():
        whole = not name.startswith(("rms_", "rope_", "low_", "high_", "factor"))
        _number(path, name, value, whole)
    for name, value in (("bos_token_id", bos), ("pad_token_id", pad), *(("eos_token_id", id) for id in eos)):
        if value is not None:
            _number(path, name, value, True)
    if heads % shape["num_key_value_heads"] or shape["head_dim"] % 2:
        raise InputError(
            f"{path}: num_attention_heads {heads} must be a multiple of num_key_value_heads "
            f"{shape['num_key_value_heads']}, and head_dim {shape['head_dim']} must be even"
        )
    return LlamaConfig(
        **fields,
        **shape,
        model_type=raw["model_type"],
        bos_token_id=bos,
        eos_token_id=eos[0] if len(eos) == 1 else eos,
        pad_token_id=pad,
        rope_theta=theta,
        rope_scaling=rope,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )


def stop_ids(raw: dict[str, Any]) -> tuple[Any, ...]:
    """The ids that end a text, as config.json or generation_config.json lists them: one, several or none."""
    given = raw.get("eos_token_id")
    if isinstance(given, list | tuple):
        return tuple(given)
    return () if given is None else (given,)


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """The generation_config.json of a folder, or None. Raises InputError for a file that is no JSON object."""
    path = folder / "generation_config.json"
    content = read_json(path) if path.is_file() else None
    if content is not None and not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    for id in stop_ids(content or {}):
        _number(path, "eos_token_id", id, True)
    return content


def with_ids_of(
    config: LlamaConfig, generation: dict[str, Any] | None, bos: int, eos: int
) -> tuple[LlamaConfig, dict[str, Any] | None]:
    """Both configs with the BOS and EOS of this project's training, so that other programs stop where the model does.

    Every id that ended a text before still does. For a tokenizer without BOS, `bos` is EOS; config.json then keeps the
    BOS that it had.
    """
    stops = tuple(dict.fromkeys((*stop_ids(config.__dict__), *stop_ids(generation or {}), eos)))
    ids: dict[str, Any] = {"eos_token_id": stops[0] if len(stops) == 1 else stops}
    if bos != eos:
        ids["bos_token_id"] = bos
    pad = None if config.pad_token_id == eos else config.pad_token_id
    changed = {name: id for name, id in ids.items() if name in (generation or {}) or name == "eos_token_id"}
    return replace(config, pad_token_id=pad, **ids), None if generation is None else generation | changed


def _refuse_unsupported(path: Path, raw: dict[str, Any]) -> None:
    """Raise InputError naming the first option that this project does not compute."""
    if str(raw.get("model_type")) not in FAMILIES:
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


def config_to_json(config: LlamaConfig, scalar: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The config.json of a model: both the older and the newer names of the rotary settings."""
    rope = {"rope_type": "llama3", **config.rope_scaling} if config.rope_scaling else None
    plain = {k: v for k, v in config.__dict__.items() if k != "rope_scaling"}
    if config.sliding_window is None and "sliding_window" not in FAMILIES[config.model_type].defaults:
        del plain["sliding_window"]
    return {
        "architectures": ["MPOScalarModel" if scalar else FAMILIES[config.model_type].architecture],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **plain,
        "eos_token_id": None if config.eos_token_id == () else config.eos_token_id,
        "rope_scaling": rope,
        "rope_parameters": {"rope_theta": config.rope_theta, **(rope or {"rope_type": "default"})},
    }
