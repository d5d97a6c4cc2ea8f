"""config.json of the Hugging Face layout, read into a LlamaConfig and written from one; also generation_config.json.

families.py lists the families. Whatever this project cannot compute exactly (experts, quantised weights, other
architectures) is refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpo.model.families import BIASES, FAMILIES, OPTIONS, REFUSED
from mpo.model.llama import ACTIVATIONS, LlamaConfig
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json

# Options that change what a model computes and that this project does not compute, in any family.
UNSUPPORTED = (
    *("num_local_experts", "num_experts", "n_routed_experts", "quantization_config"),
    *("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"),
)
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MOST_LAYERS = 10_000  # a file is read before anything else is known of it, and makes lists of this length
_FULL, _SLIDING = "full_attention", "sliding_attention"
# What a reward model's config.json says besides. With "regression", pipelines of transformers leave the score as it is.
ONE_NUMBER = {"id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
SCALE = ("mpo_score_mean", "mpo_score_std")  # this project's own entries; transformers keeps them in its config
OLD_SCALAR = "MPOScalarModel"  # what reward models were called that had the scale among their tensors


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
    if raw["num_hidden_layers"] > MOST_LAYERS:
        raise InputError(f"{path}: num_hidden_layers must be at most {MOST_LAYERS}, found {raw['num_hidden_layers']}")
    raw = {"rms_norm_eps": 1e-6} | FAMILIES[raw["model_type"]].defaults | raw
    return LlamaConfig(
        model_type=raw["model_type"],
        **_numbers(path, raw),
        **_special_ids(path, raw),
        **_options(path, raw),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )


def _numbers(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Sizes, the norms' eps and the rotary positions. Raises InputError for those that are no numbers or do not fit."""
    heads, family = raw["num_attention_heads"], FAMILIES[raw["model_type"]]
    rope, theta, local = _rope(path, raw)
    fields = {name: raw[name] for name in _SIZES} | {"rope_theta": theta}
    optional = ["max_position_embeddings", "rms_norm_eps", "sliding_window", "query_pre_attn_scalar"]
    fields |= {n: raw[n] for n in optional if raw.get(n) is not None and (n not in OPTIONS or n in family.options)}
    fields["num_key_value_heads"] = raw.get("num_key_value_heads") or heads
    fields["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // heads
    fields |= {} if local is None else {"rope_local_base_freq": local}
    for name, value in (fields | rope).items():
        _number(path, name, value, not name.startswith(("rms_", "rope_", "low_", "high_", "factor", "query_")))
    kv_heads, d = fields["num_key_value_heads"], fields["head_dim"]
    if heads % kv_heads or d % 2:
        raise InputError(
            f"{path}: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}, and head_dim "
            f"{d} must be even"
        )
    for name in ("sliding_window", "query_pre_attn_scalar", "factor"):
        if (fields | rope).get(name) == 0:
            raise InputError(f"{path}: {name} must not be 0")
    return {**fields, "rope_scaling": rope}


def _special_ids(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The ids of BOS, EOS and pad, each of which may be missing."""
    bos, eos, pad = raw.get("bos_token_id"), stop_ids(raw), raw.get("pad_token_id")
    pad = None if pad == -1 or eos == (pad,) else pad  # if EOS were the pad, a mask made from ids would hide every EOS
    for name, value in (("bos_token_id", bos), ("pad_token_id", pad), *(("eos_token_id", id) for id in eos)):
        if value is not None:
            _number(path, name, value, True)
    return {"bos_token_id": bos, "eos_token_id": eos[0] if len(eos) == 1 else eos, "pad_token_id": pad}


def _options(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The activation, biases, and what differs between the layers of a model."""
    family, layers = FAMILIES[raw["model_type"]], raw["num_hidden_layers"]
    fields: dict[str, Any] = {name: bool(raw.get(name)) for name in BIASES if name in family.options}
    activation = raw.get(family.activation) or "silu"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise InputError(
            f"{path}: {family.activation} {activation!r:.80} is not supported; only {' and '.join(ACTIVATIONS)} are"
        )
    fields["hidden_act"] = activation
    if "no_rope_layers" in family.options:
        every = raw["no_rope_layer_interval"]
        _number(path, "no_rope_layer_interval", every, True)
        given = raw.get("no_rope_layers") or [int(not every or (i + 1) % every != 0) for i in range(layers)]
        fields["no_rope_layers"] = _of_layers(path, "no_rope_layers", given, layers, (0, 1))
    given = raw.get("layer_types") or _usual_layer_types(path, raw, fields.get("no_rope_layers", ()))
    kinds = _of_layers(
        path, "layer_types", given, layers, (_FULL, _SLIDING) if "layer_types" in family.options else (_FULL,)
    )
    if "layer_types" in family.options:
        fields["layer_types"] = kinds
    if _SLIDING in kinds and not (raw.get("sliding_window") and raw.get("use_sliding_window", True)):
        raise InputError(f"{path}: layer_types has {_SLIDING!r}, but there is no sliding_window, or it is not used")
    return fields


def _usual_layer_types(path: Path, raw: dict[str, Any], no_rope: tuple[int, ...]) -> list[str]:
    """Which layers of a family have a sliding window if config.json does not say so for each."""
    layers = range(raw["num_hidden_layers"])
    if "sliding_window_pattern" in raw:  # Gemma: all but every sixth, or whichever
        every = raw["sliding_window_pattern"]
        _number(path, "sliding_window_pattern", every, True)
        return [_FULL if every and (i + 1) % every == 0 else _SLIDING for i in layers]
    if not (raw.get("use_sliding_window") and raw.get("sliding_window")):
        return [_FULL for _ in layers]
    if no_rope:  # SmolLM3: the layers without positions
        return [_FULL if no_rope[i] else _SLIDING for i in layers]
    first = raw.get("max_window_layers", 0)  # Qwen: the layers from this one on
    _number(path, "max_window_layers", first, True)
    return [_FULL if i < first else _SLIDING for i in layers]


def _of_layers(path: Path, name: str, given: Any, layers: int, known: tuple[Any, ...]) -> tuple[Any, ...]:
    """A list with one entry for each layer. Raises InputError for another length and for an unknown entry."""
    if not isinstance(given, list) or len(given) < layers:
        raise InputError(f"{path}: {name} must be a list with an entry for each of the {layers} layers")
    if other := [x for x in given if x not in known]:
        raise InputError(
            f"{path}: {name} other than {' and '.join(map(repr, known))} are not supported, found {other[0]!r:.80}"
        )
    return tuple(given[:layers])


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
    kind = str(raw.get("model_type"))
    if kind not in FAMILIES:
        *others, last = FAMILIES
        why = f" ({REFUSED[kind]})" if kind in REFUSED else ""
        raise InputError(
            f"{path}: model_type {raw.get('model_type')!r:.80} is not supported{why}; {', '.join(others)} and {last} "
            "are"
        )
    missing = [name for name in BIASES if name not in FAMILIES[kind].options]
    for name in (*UNSUPPORTED, *missing):
        if raw.get(name):
            raise InputError(f"{path}: {name} is not supported for {kind}, found {raw[name]!r:.80}")


def _number(path: Path, name: str, value: Any, whole: bool) -> None:
    """Raise InputError for what is not a number, not finite or negative; ids and sizes must be whole."""
    kind = int if whole else (int, float)
    good = isinstance(value, kind) and not isinstance(value, bool) and 0 <= value < 2**40
    if not good:
        raise InputError(f"{path}: {name} must be a {'whole ' if whole else ''}number from 0 on, found {value!r:.80}")


def _rope(path: Path, raw: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """The rotary scaling ({} for none), theta, and the theta of sliding layers (None: the same), from either form."""
    given, local = _object(path, raw.get("rope_parameters") or raw.get("rope_scaling")), None
    for part in (raw.get("partial_rotary_factor"), given.get("partial_rotary_factor")):
        if part not in (None, 1):
            raise InputError(f"{path}: partial_rotary_factor {part!r:.80} is not supported; only 1 is")
    if "rope_local_base_freq" in FAMILIES[raw["model_type"]].options:
        nested = given if given.keys() & {_FULL, _SLIDING} else {_FULL: given}
        given, of_sliding = (_object(path, nested.get(kind)) for kind in (_FULL, _SLIDING))
        scaled, local = _scaling(path, of_sliding)
        local = local or raw["rope_local_base_freq"]
        if scaled:
            raise InputError(f"{path}: rope scaling of {_SLIDING} layers is not supported")
    scaling, theta = _scaling(path, given)
    return scaling, theta or raw.get("rope_theta") or 10000.0, local


def _object(path: Path, given: Any) -> dict[str, Any]:
    """A JSON object; an empty one for null. Raises InputError for anything else."""
    if not isinstance(given, dict | None):
        raise InputError(f"{path}: rope_parameters must be an object, found {given!r:.80}")
    return dict(given or {})


def _scaling(path: Path, rope: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The scaling, and theta if it is there, of rotary parameters. Raises InputError for a kind that is unknown."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if not isinstance(kind, str) or kind not in needed:
        raise InputError(f"{path}: rope scaling {kind!r:.80} is not supported; only 'linear' and 'llama3' are")
    if rope.keys() & {_FULL, _SLIDING}:
        raise InputError(f"{path}: rope_parameters by the kind of a layer are not supported for this model_type")
    if missing := [name for name in needed[kind] if name not in rope]:
        raise InputError(f"{path}: rope scaling lacks {', '.join(missing)}")
    return {name: rope[name] for name in needed[kind]}, rope.get("rope_theta")


def read_scale(path: Path) -> tuple[float, float] | None:
    """The scale of a reward model's scores, as its config.json records it; None if this project has not written it.

    The result is the mean score of the responses that train_rm.py normalised on, and what it divided raw scores by.
    Raises InputError for a file that is no JSON object, and for numbers that cannot be a scale.
    """
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a JSON object")
    if SCALE[1] not in raw:
        return None
    scale = []
    for name, least in zip(SCALE, (-1e30, 1e-30), strict=True):
        value = raw.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least < value < 1e30:
            wanted = "a number above 0" if least > 0 else "a finite number"
            raise InputError(f"{path}: {name} must be {wanted}, found {value!r:.80}")
        scale.append(float(value))
    return scale[0], scale[1]


def is_reward_model(path: Path) -> bool:
    """Whether a config.json is that of a model for sequence classification. Raises InputError if it cannot be read."""
    raw = read_json(path)
    given = raw.get("architectures") if isinstance(raw, dict) else None
    names = given if isinstance(given, list) else [given]
    return any(str(name).endswith("ForSequenceClassification") or name == OLD_SCALAR for name in names)


def written_here(path: Path) -> bool:
    """Whether this config.json is that of a reward model of this project. Raises InputError as `read_scale` does."""
    return read_scale(path) is not None or read_json(path).get("architectures") == [OLD_SCALAR]


def refuse_other_heads(path: Path) -> None:
    """Raise InputError, naming it, for the architecture of a reward model that is computed in another way."""
    raw = read_json(path)
    known = FAMILIES[raw["model_type"]].classifier
    given = raw.get("architectures") or [known]
    if other := [name for name in (given if isinstance(given, list) else [given]) if name not in (known, OLD_SCALAR)]:
        raise InputError(f"{path}: architectures {other[0]!r:.80} is not supported for a reward model; {known} is")


def config_to_json(config: LlamaConfig, scalar: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The config.json of a model: both the older and the newer names of the rotary settings.

    That of a reward model (`scalar`) says in transformers' words that its head gives one number.
    """
    family = config.family
    plain = {k: v for k, v in config.__dict__.items() if k not in OPTIONS and k not in ("hidden_act", "rope_scaling")}
    options = {name: getattr(config, name) for name in family.options}
    if "use_sliding_window" in family.defaults:
        options["use_sliding_window"] = _SLIDING in config.layer_types
    if "max_window_layers" in family.defaults:  # what older versions of transformers read in place of layer_types
        options["max_window_layers"] = [*config.layer_types, _SLIDING].index(_SLIDING)
    if "sliding_window_pattern" in family.defaults:  # the same
        options["sliding_window_pattern"] = [*config.layer_types, _FULL].index(_FULL) + 1
    return {
        "architectures": [family.classifier if scalar else family.architecture],
        **(ONE_NUMBER if scalar else {}),
        "torch_dtype": str(dtype).removeprefix("torch."),
        family.activation: config.hidden_act,
        **plain,
        **options,
        **_rope_to_json(config),
        "eos_token_id": None if config.eos_token_id == () else config.eos_token_id,
    }


def _rope_to_json(config: LlamaConfig) -> dict[str, Any]:
    """The rotary settings in both forms."""
    scaling = config.rope_scaling and {"rope_type": "llama3" if "low_freq_factor" in config.rope_scaling else "linear"}
    rope = {**scaling, **config.rope_scaling}
    parameters: dict[str, Any] = {"rope_theta": config.rope_theta, **(rope or {"rope_type": "default"})}
    if config.rope_local_base_freq is not None:
        parameters = {_FULL: parameters, _SLIDING: {"rope_theta": config.rope_local_base_freq, "rope_type": "default"}}
    return {"rope_scaling": rope or None, "rope_parameters": parameters}
