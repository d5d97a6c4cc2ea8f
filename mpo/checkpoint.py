"""Models in and out in the Hugging Face layout: config.json, safetensors, tokenizer.model.

Only safetensors and JSON are ever read or written, never pickle. What this project cannot
compute exactly (biases, sliding windows, other architectures) is refused by name. Llama 1 to 3, TinyLlama and
SmolLM2 are "llama"; Mistral is the same model by another name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpo import device, lora, parallel
from mpo.errors import InputError
from mpo.files import read_json, write_json, write_tensors
from mpo.model import Adapters, Llama, LlamaConfig, ScalarModel, new_score_head, rotary_frequencies

M = TypeVar("M", Llama, ScalarModel)
SHARD_BYTES = 4 << 30
# Options that change what a model computes, and that this project does not compute.
UNSUPPORTED = ("attention_bias", "mlp_bias", "sliding_window", "num_local_experts", "quantization_config")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def config_from_json(path: Path) -> LlamaConfig:
    """Read a config.json of the older form (rope_theta, rope_scaling) or the newer (rope_parameters).

    Errors: InputError names the file and the field that is missing or unsupported.
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
    optional = ("max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id")
    fields |= {name: raw[name] for name in optional if raw.get(name) is not None}
    if isinstance(fields.get("eos_token_id"), list):  # Llama 3 lists several
        fields["eos_token_id"] = (*fields["eos_token_id"], None)[0]
    pad = raw.get("pad_token_id")
    pad = None if pad in (-1, fields.get("eos_token_id", 2)) else pad  # EOS as pad would hide every EOS from a mask
    shape = {"num_key_value_heads": raw.get("num_key_value_heads") or heads}
    shape["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // heads
    for name, value in (fields | shape | {"rope_theta": theta} | rope).items():
        whole = not name.startswith(("rms_", "rope_", "low_", "high_", "factor"))
        _number(path, name, value, whole)
    if pad is not None:
        _number(path, "pad_token_id", pad, True)
    if heads % shape["num_key_value_heads"] or shape["head_dim"] % 2:
        raise InputError(f"{path}: {heads} heads of {shape} do not make groups, or rotary pairs")
    tied = bool(raw.get("tie_word_embeddings", False))
    return LlamaConfig(
        **fields, **shape, pad_token_id=pad, rope_theta=theta, rope_scaling=rope, tie_word_embeddings=tied
    )


def _refuse_unsupported(path: Path, raw: dict[str, Any]) -> None:
    """Errors: InputError naming the first option that this project does not compute."""
    if raw.get("model_type") not in ("llama", "mistral"):
        raise InputError(
            f"{path}: model_type {raw.get('model_type')!r:.80} is not supported; 'llama' and 'mistral' are"
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
    """Refuse what is no number, not finite, or negative; ids and sizes must be whole."""
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


def save_model(folder: Path, model: Llama | ScalarModel, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json and model.safetensors, or shards with an index where it is larger.

    A language model opens in transformers as LlamaForCausalLM. The scalar model's head is in
    `score.weight`; its `score_mean` and `score_std` are ours. Adapters are merged into the weights; those of a language
    model are also written by themselves, to the folder `adapters`.
    """
    causal = isinstance(model, Llama)
    parallel.settle(model)
    tensors = {name: t.detach() for name, t in model.state_dict().items() if ".lora_" not in name}
    layers = {f"{name}.weight": layer for name, layer in lora.adapted(model).items()}
    if causal and model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    shards: list[list[str]] = [[]]
    for name, t in tensors.items():
        held = sum(tensors[n].numel() * tensors[n].element_size() for n in shards[-1])
        if shards[-1] and held + t.numel() * t.element_size() > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    for i, shard in enumerate(shards):
        complete = {n: layers[n].merged() if n in layers else parallel.whole(tensors[n]) for n in shard}
        write_tensors(folder / _shard_name(i, len(shards)), complete)
    if len(shards) > 1:
        where = {name: _shard_name(i, len(shards)) for i, shard in enumerate(shards) for name in shard}
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    if isinstance(model, Llama) and model.adapters:
        lora.save_adapters(folder / "adapters", model)
    write_json(
        folder / "config.json",
        config_to_json(model.config, "LlamaForCausalLM" if causal else "MPOScalarModel", model.model.norm.weight.dtype),
    )


def _shard_name(i: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; a name in the index that leaves the folder is refused."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not index.exists():
        raise InputError(f"{folder}: holds neither model.safetensors nor model.safetensors.index.json")
    where = read_json(index)
    where = where.get("weight_map") if isinstance(where, dict) else None
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise InputError(f"{index}: weight_map must map tensor names to file names")
    for name in set(where.values()):
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
            raise InputError(f"{index}: {name!r} is not a safetensors file of this folder")
    return [folder / name for name in sorted(set(where.values()))]


class Tensors:
    """The tensors of a folder's safetensors files, by name; nothing is read but the headers until it is asked for."""

    def __init__(self, folder: Path):
        """Errors: InputError for a file that is damaged, or is none."""
        self.folder, self.files, self.where = folder, dict[Path, Any](), dict[str, Path]()
        for path in _files(folder):
            if not path.is_file():
                raise InputError(f"{path}: no such file, though the index names it")
            try:
                self.files[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as e:
                raise InputError(f"{path}: not a whole safetensors file ({e})") from None
            self.where |= dict.fromkeys(self.files[path].keys(), path)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there."""
        return tuple(self.files[self.where[name]].get_slice(name).get_shape())

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """In this dtype. Errors: InputError where it is not of floating-point numbers, or not finite."""
        tensor: Tensor = self.files[self.where[name]].get_tensor(name)
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise InputError(f"{self.where[name]}: {name} holds numbers that are not finite, or {tensor.dtype}")
        return tensor.to(dtype, copy=True)  # else it would be the file, mapped


def _load(
    kind: type[M],
    folder: Path,
    adapters: Adapters | None,
    new: Callable[[LlamaConfig], dict[str, Tensor]] = lambda config: {},
) -> M:
    """A model from a folder, but for `new` weights: shapes are compared before anything of its size is allocated."""
    config, tensors = config_from_json(folder / "config.json"), Tensors(folder)
    if config.num_hidden_layers > len(tensors.where):
        raise InputError(f"{folder}: config.json says {config.num_hidden_layers} layers, the files hold fewer tensors")
    with torch.device("meta"):
        model = kind(config)
    if adapters:
        lora.attach(model, adapters)
    given = new(config) | (lora.first_values(model, adapters) if adapters else {})
    wanted = {name: t for name, t in model.state_dict().items() if name not in given}
    tied = isinstance(model, Llama) and config.tie_word_embeddings
    if tied:
        del wanted["lm_head.weight"]
    for name, where in tensors.where.items():
        if name not in wanted:
            if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
                continue  # a tied head written out, or a buffer of old checkpoints
            raise InputError(f"{where}: unexpected tensor {name!r} for a {kind.__name__}")
        found, expected = tensors.shape(name), tuple(wanted[name].shape)
        if found != expected:
            raise InputError(f"{where}: {name} is {found}, config.json says {expected}")
    if missing := wanted.keys() - tensors.where.keys():
        raise InputError(f"{folder}: lacks {len(missing)} tensors, first {min(missing)!r}")
    parallel.shard(model)
    for name, empty in model.state_dict().items():
        if name in wanted or name in given:
            dtype = torch.float32 if name.startswith("score") else device.dtype()
            read = given[name] if name in given else tensors.read(name, dtype)
            part = parallel.part_like(read.to(device.here()), empty)
            model.load_state_dict({name: part}, strict=False, assign=True)
    if isinstance(model, Llama) and tied:
        model.tie()
    model.model.frequencies = rotary_frequencies(config).to(device.here())
    return model if adapters else model.requires_grad_(True)


def load_model(folder: str | Path, adapters: Adapters | None = None) -> Llama:
    """Load a language model from a folder in Hugging Face layout, in fp32, with new adapters where asked for.

    Errors: InputError, one line, for a missing, damaged, mismatched or unsupported folder.
    """
    return _load(Llama, Path(folder), adapters)


def load_scalar(folder: str | Path) -> ScalarModel:
    """Load a scalar model (reward model or critic) that `save_model` wrote."""
    return _load(ScalarModel, Path(folder), None)


def scalar_from(folder: str | Path, generator: torch.Generator, adapters: Adapters | None = None) -> ScalarModel:
    """A scalar model with an untrained head on the trunk of a folder's language model."""
    return _load(ScalarModel, Path(folder), adapters, lambda config: new_score_head(config, generator))
