"""Models in and out in the Hugging Face layout: config.json, safetensors with an index if there are several, and all
that another program needs beside them.

Only safetensors and JSON are ever read or written, never pickle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpo.data.tokenizer import Tokenizer
from mpo.data.tokenizer_files import FILES
from mpo.model import lora
from mpo.model.hf_config import (
    SCALE,
    config_from_json,
    config_to_json,
    read_generation_config,
    read_scale,
    refuse_other_heads,
    with_ids_of,
)
from mpo.model.llama import Adapters, Llama, LlamaConfig, ScalarModel, new_score_head, rotary_frequencies
from mpo.runtime import device, distributed
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, write_json, write_tensors

M = TypeVar("M", Llama, ScalarModel)
SHARD_BYTES = 4 << 30
INDEX, GENERATION = "model.safetensors.index.json", "generation_config.json"


def save_model(
    folder: Path, model: Llama | ScalarModel, tokenizer: Tokenizer | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a model, in one file or in several with an index if it is larger than `shard_bytes`, and its tokenizer.

    The folder then holds all that another program needs: config.json and, if the model came with one,
    generation_config.json, both with the EOS that the tokenizer ends responses with; and the tokenizer's files with its
    chat template. A language model opens in transformers as the family that it came from, and a scalar model as that
    family's model for sequence classification (`_as_classifier`). Adapters are merged into the weights; those of a
    language model are also written to the subfolder `adapters`.
    """
    causal = isinstance(model, Llama)
    distributed.reshard(model)
    tensors = {name: t.detach() for name, t in model.state_dict().items() if ".lora_" not in name}
    scale = {} if isinstance(model, Llama) else _as_classifier(model, tensors)
    layers = {f"{name}.weight": layer for name, layer in lora.adapted(model).items()}
    if causal and model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    shards: list[list[str]] = [[]]
    for name, t in tensors.items():
        size = sum(tensors[n].numel() * tensors[n].element_size() for n in shards[-1])
        if shards[-1] and size + t.numel() * t.element_size() > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    for i, shard in enumerate(shards):
        complete = {n: layers[n].merged() if n in layers else distributed.full_tensor(tensors[n]) for n in shard}
        write_tensors(folder / _shard_name(i, len(shards)), complete)
    if len(shards) > 1:
        where = {name: _shard_name(i, len(shards)) for i, shard in enumerate(shards) for name in shard}
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    if isinstance(model, Llama) and model.adapters:
        lora.save_adapters(folder / "adapters", model)
        if tokenizer:
            tokenizer.save(folder / "adapters")
    config, generation = model.config, model.generation_config
    if tokenizer:
        config, generation = with_ids_of(config, generation, tokenizer.bos, tokenizer.eos)
        if causal:
            tokenizer.save(folder)
        else:
            config = replace(config, pad_token_id=tokenizer.save_padded(folder))
    if generation is not None:
        write_json(folder / GENERATION, generation)
    dtype = model.model.norm.weight.dtype
    write_json(folder / "config.json", config_to_json(config, not causal, dtype) | scale)
    if distributed.is_main():
        written = {_shard_name(i, len(shards)) for i in range(len(shards))} | ({INDEX} if len(shards) > 1 else set())
        written |= ({GENERATION} if generation else set()) | (tokenizer.vocabulary.files.keys() if tokenizer else set())
        _remove_others(folder, ("model*.safetensors", INDEX, GENERATION, *(FILES if tokenizer else ())), written)
        if not model.adapters:
            _remove_others(folder / "adapters", ("adapter_model.safetensors", "adapter_config.json", *FILES), set())


def _as_classifier(model: ScalarModel, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Fold a scalar model's scale into the head among its `tensors`; returns what config.json records of the scale.

    transformers' head has no bias, and no direction of the hidden states is constant. So the head can take up the
    division by `score_std`, but not the subtraction of `score_mean`, which changes no preference: the score in other
    programs is the one here plus mpo_score_mean.
    """
    mean, std = float(tensors.pop("score_mean")), float(tensors.pop("score_std"))
    tensors["score.weight"] = tensors["score.weight"] / std
    return dict(zip(SCALE, (mean / std, std), strict=True))


def _remove_others(folder: Path, patterns: Sequence[str], written: Set[str]) -> None:
    """Remove what another model that was saved here before has left, so that no two models are mixed."""
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        if str(path.relative_to(folder)) not in written:
            path.unlink()


def _shard_name(i: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises InputError for a name in the index that leads out of the folder."""
    index = folder / INDEX
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not index.exists():
        raise InputError(f"{folder}: holds neither model.safetensors nor {INDEX}")
    where = read_json(index)
    where = where.get("weight_map") if isinstance(where, dict) else None
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise InputError(f"{index}: weight_map must map tensor names to file names")
    for name in set(where.values()):
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
            raise InputError(f"{index}: {name!r} is not a safetensors file of this folder")
    return [folder / name for name in sorted(set(where.values()))]


class Tensors:
    """The tensors of a folder's safetensors files, by name. Only headers are read until a tensor is asked for."""

    def __init__(self, folder: Path):
        """Raises InputError for a missing or damaged file."""
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
        """The shape of a tensor that exists."""
        return tuple(self.files[self.where[name]].get_slice(name).get_shape())

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor in this dtype. Raises InputError where it does not hold finite floating-point numbers."""
        tensor: Tensor = self.files[self.where[name]].get_tensor(name)
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise InputError(f"{self.where[name]}: {name} holds numbers that are not finite, or {tensor.dtype}")
        return tensor.to(dtype, copy=True)  # otherwise it would be a view of the mapped file


def _load(
    kind: type[M],
    folder: Path,
    adapters: Adapters | None,
    new: Callable[[LlamaConfig], dict[str, Tensor]] = lambda config: {},
) -> M:
    """A model from a folder, except for `new` weights. Shapes are compared before anything of its size is allocated."""
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
        _check_tied(folder, tensors)
    for name, where in tensors.where.items():
        if name not in wanted:
            if _is_left_out(name):
                continue
            if name == "score.weight" and kind is Llama:
                raise InputError(f"{folder}: is a reward model, which does not write text")
            raise InputError(f"{where}: unexpected tensor {name!r} for a {kind.__name__}")
        shape, expected = tensors.shape(name), tuple(wanted[name].shape)
        if shape != expected:
            raise InputError(f"{where}: {name} is {shape}, config.json says {expected}")
    missing = wanted.keys() - tensors.where.keys()
    if missing and missing == {name for name in wanted if name.startswith("score")}:
        raise InputError(f"{folder}: is a language model, not a reward model")
    if missing:
        raise InputError(f"{folder}: lacks {len(missing)} tensors, first {min(missing)!r}")
    distributed.shard(model)
    for name, empty in model.state_dict().items():
        if name in wanted or name in given:
            dtype = torch.float32 if name.startswith("score") else device.weight_dtype()
            read = given[name] if name in given else tensors.read(name, dtype)
            part = distributed.distribute_like(read.to(device.current()), empty)
            model.load_state_dict({name: part}, strict=False, assign=True)
    if isinstance(model, Llama) and tied:
        model.tie()
    model.model.frequencies = rotary_frequencies(config).to(device.current())
    model.generation_config = read_generation_config(folder)
    return model if adapters else model.requires_grad_(True)


def _is_left_out(name: str) -> bool:
    """Whether a tensor may be in the files though the model has none: a tied head, or a buffer of old checkpoints."""
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def _check_tied(folder: Path, tensors: Tensors) -> None:
    """Raise InputError for a head of its own in the files of a model that has none, by its config.json."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if {head, embedding} <= tensors.where.keys() and not (
        tensors.shape(head) == tensors.shape(embedding) and torch.equal(tensors.read(head), tensors.read(embedding))
    ):
        raise InputError(
            f"{tensors.where[head]}: {head} differs from {embedding}, though tie_word_embeddings is true in "
            f"{folder / 'config.json'}; set it to false there if the model has a head of its own"
        )


def load_model(folder: str | Path, adapters: Adapters | None = None) -> Llama:
    """Load a language model from a folder in the Hugging Face layout, with new adapters if asked for.

    Raises InputError, in one line, for a folder that is missing, damaged, inconsistent or not supported.
    """
    return _load(Llama, Path(folder), adapters)


def load_scalar(folder: str | Path, centred: bool = True) -> ScalarModel:
    """Load a reward model: one that `save_model` wrote, or any other that transformers opens with a head of one number.

    With `centred`, the mean that `save_model` recorded is subtracted from every score. Without, the scores are those of
    transformers. For a model of other programs there is no such mean. Raises InputError as `load_model` does, and,
    naming it, for another kind of head.
    """
    folder = Path(folder)
    mean, std = read_scale(folder / "config.json") or (0.0, 1.0)
    if "score_std" in _check_head(folder).where:  # as this project wrote reward models once: unscaled, with the scale
        model = _load(ScalarModel, folder, None)
    else:
        scale = {"score_mean": torch.tensor(mean * std), "score_std": torch.tensor(std)}
        model = _load(ScalarModel, folder, None, lambda config: scale)
        with torch.no_grad():
            model.score.weight *= std
    if not centred:
        model.score_mean.zero_()
    return model


def _check_head(folder: Path) -> Tensors:
    """The tensors of a reward model. Raises InputError for a head other than one linear layer that gives one number."""
    config_from_json(folder / "config.json")  # refuses a file that is not valid
    tensors = Tensors(folder)
    head = {name for name in tensors.where if not name.startswith("model.") and not _is_left_out(name)}
    head -= {"score_mean", "score_std"}
    if not head:
        return tensors  # a language model, which _load refuses
    if head != {"score.weight"}:
        names = ", ".join(sorted(head)[:3])
        raise InputError(
            f"{folder}: has {names:.200} besides the layers; the head of a reward model must be one linear layer "
            "without bias, score.weight"
        )
    numbers, *_ = tensors.shape("score.weight") or (0,)
    if numbers != 1:
        raise InputError(f"{folder}: its head gives {numbers} numbers (num_labels); that of a reward model gives 1")
    refuse_other_heads(folder / "config.json")
    return tensors


def load_as_scalar(folder: str | Path, generator: torch.Generator, adapters: Adapters | None = None) -> ScalarModel:
    """Load a language model's trunk with an untrained scalar head."""
    return _load(ScalarModel, Path(folder), adapters, lambda config: new_score_head(config, generator))
