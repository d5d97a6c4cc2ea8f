"""Tiny random models in the layouts that published models have: the same files, options and special tokens."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo.world.build import build

ROWS = build("hh", seed=1, train=150, test=10)["train"]
CORPUS = [line for row in ROWS for line in f"{row.prompt}{row.chosen} {row.rejected}".splitlines() if line]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
INST = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{{ eos_token }}{% endfor %}"
HEADERS = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}\n{{ m.content }}<|eot_id|>{% endfor %}"


@functools.cache
def sentencepiece_model(user: tuple[str, ...] = (), **options: Any) -> bytes:
    """A BPE model with byte fallback and a space before every text, as Llama's own."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(user),
        minloglevel=2,
        **options,
    )
    return out.getvalue()


@functools.cache
def tokenizer_json(*specials: str, bos: str = "", words: str = "", normal: str = "") -> str:
    """Byte-level BPE, with these tokens after all others, as in Llama 3.

    bos: the token that begins every text. words: a regular expression for what is a word. normal: added tokens that
    are not special.
    """
    tokenizers = pytest.importorskip("tokenizers")
    rules = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = rules.ByteLevel(add_prefix_space=False)
    if words:
        split = rules.Split(tokenizers.Regex(words), "isolated")
        tokenizer.pre_tokenizer = rules.Sequence([split, rules.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = rules.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(list(specials))
    tokenizer.add_tokens(normal.split())
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    if bos:
        tokenizer.post_processor = beginning_with(bos, tokenizer.token_to_id(bos))
    return tokenizer.to_str()


def beginning_with(bos: str, id: int) -> Any:
    """The post-processor that puts BOS before every text."""
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, id)])


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def decoder_of(first: int, *texts: str) -> dict[str, Any]:
    """The added_tokens_decoder of a tokenizer_config.json."""
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {str(first + i): {"content": text, **flags} for i, text in enumerate(texts)}


def write(folder: Path, files: dict[str, Any], rows: int, eos: int, **config: Any) -> Path:
    """Write files and a model that always takes EOS as its next token, whose weights are random otherwise.

    Its names and shapes are those of the family in transformers.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for name, content in files.items():
        text = content if isinstance(content, bytes | str) else json.dumps(content)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": rows, "hidden_act": "silu", "rms_norm_eps": 1e-5}
    raw = {"model_type": "llama", "max_position_embeddings": 512, "rope_theta": 10000.0} | shape | config
    raw["architectures"] = [ARCHITECTURES[raw["model_type"]]]
    (folder / "config.json").write_text(json.dumps(raw))
    draw = torch.Generator().manual_seed(1)
    sizes = {"model.embed_tokens": (rows, 16), "model.norm": (16,)}
    for i in range(2):
        sizes |= {f"model.layers.{i}.{name}_layernorm": (16,) for name in ("input", "post_attention")}
        sizes |= {
            f"model.layers.{i}.self_attn.{name}_proj": (n, 16) for name, n in zip("qkvo", (16, 8, 8, 16), strict=True)
        }
        sizes |= {f"model.layers.{i}.mlp.{name}_proj": (24, 16) for name in ("gate", "up")}
        sizes[f"model.layers.{i}.mlp.down_proj"] = 16, 24
        if raw["model_type"] == "gemma3_text":
            sizes |= {f"model.layers.{i}.{name}_feedforward_layernorm": (16,) for name in ("pre", "post")}
        if raw["model_type"] in ("gemma3_text", "qwen3"):
            sizes |= {f"model.layers.{i}.self_attn.{name}_norm": (4,) for name in "qk"}
    tied = raw.get("tie_word_embeddings", False)
    sizes |= {} if tied else {"lm_head": (rows, 16)}
    weights = {f"{name}.weight": torch.randn(size, generator=draw) / 2 for name, size in sizes.items()}
    if raw["model_type"] == "qwen2":
        biases = {
            f"model.layers.{i}.self_attn.{name}_proj.bias": n
            for i in (0, 1)
            for name, n in zip("qkv", (16, 8, 8), strict=True)
        }
        weights |= {name: torch.randn(n, generator=draw) for name, n in biases.items()}
    weights["model.embed_tokens.weight"][:, 0] = 10  # every hidden state has a large first entry
    weights["model.norm.weight"].abs_().add_(0.5)
    weights["model.embed_tokens.weight" if tied else "lm_head.weight"][eos, 0] = 60
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def llama_2(folder: Path) -> Path:
    """tokenizer.model; a pad token that is no EOS only in generation_config.json."""
    files = {
        "tokenizer.model": sentencepiece_model(),
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": {"__type": "AddedToken", **decoder_of(1, "<s>")["1"]},
            "eos_token": {"__type": "AddedToken", **decoder_of(2, "</s>")["2"]},
            "unk_token": {"__type": "AddedToken", **decoder_of(0, "<unk>")["0"]},
            "pad_token": None,
            "chat_template": INST,
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False},
    }
    return write(folder, files, 400, 2, bos_token_id=1, eos_token_id=2)


def llama_3(folder: Path) -> Path:
    """tokenizer.json with the special tokens at its end; several stop ids, of which <|eot_id|> ends a turn."""
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|start_header_id|>")
    stops = [401, 402, 403]
    files = {
        "tokenizer.json": tokenizer_json(*specials, bos=specials[0]),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": decoder_of(400, *specials),
            "bos_token": specials[0],
            "eos_token": specials[3],
            "chat_template": HEADERS,
        },
        "special_tokens_map.json": {"bos_token": specials[0], "eos_token": specials[3]},
        "generation_config.json": {"bos_token_id": 400, "eos_token_id": stops, "do_sample": False},
    }
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    scaling["original_max_position_embeddings"] = 64
    return write(folder, files, 405, 403, bos_token_id=400, eos_token_id=401, rope_scaling=scaling)


def mistral(folder: Path) -> Path:
    """Both tokenizer.model and tokenizer.json, a sliding window, and no generation_config.json."""
    files = {
        "tokenizer.model": sentencepiece_model(),
        "tokenizer.json": json_of(sentencepiece_model()),
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": True,
            "added_tokens_decoder": decoder_of(0, "<unk>", "<s>", "</s>"),
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": None,
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "chat_template.jinja": INST,
    }
    more = {"model_type": "mistral", "sliding_window": 64, "max_position_embeddings": 4096}
    return write(folder, files, 400, 2, bos_token_id=1, eos_token_id=2, **more)


def chatml(folder: Path) -> Path:
    """tokenizer.model with tokens added beside it, one of which is EOS (OpenHermes)."""
    added = ("<|im_end|>", "<|im_start|>")
    files = {
        "tokenizer.model": sentencepiece_model(),
        "added_tokens.json": {text: 400 + i for i, text in enumerate(added)},
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "added_tokens_decoder": decoder_of(0, "<unk>", "<s>", "</s>") | decoder_of(400, *added),
            "bos_token": "<s>",
            "eos_token": added[0],
            "unk_token": "<unk>",
            "pad_token": "</s>",
            "chat_template": CHATML,
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": added[0], "pad_token": "</s>"},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},  # not what it was trained with
    }
    return write(folder, files, 402, 400, bos_token_id=1, eos_token_id=400, pad_token_id=0)


def yi(folder: Path) -> Path:
    """tokenizer.model whose start and end have other names, with turns among its own pieces."""
    turns = ("<|im_start|>", "<|im_end|>")
    model = sentencepiece_model(turns, bos_piece="<|startoftext|>", eos_piece="<|endoftext|>")
    files = {
        "tokenizer.model": model,
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "added_tokens_decoder": decoder_of(0, "<unk>", "<|startoftext|>", "<|endoftext|>", *turns),
            "bos_token": "<|startoftext|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "add_bos_token": False,
            "chat_template": CHATML,
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0, "do_sample": False},
    }
    return write(folder, files, 416, 4, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # 16 rows without a token


def smollm2(folder: Path) -> Path:
    """tokenizer.json with its parts beside it; tied embeddings; a pad token that is EOS."""
    specials = ("<|im_start|>", "<|im_end|>")
    text = tokenizer_json(*specials)
    bpe = json.loads(text)["model"]
    files = {
        "tokenizer.json": text,
        "vocab.json": bpe["vocab"],
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in bpe["merges"])]),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": decoder_of(400, *specials),
            "bos_token": specials[0],
            "eos_token": specials[1],
            "pad_token": specials[1],
            "chat_template": CHATML,
        },
        "special_tokens_map.json": {"bos_token": specials[0], "eos_token": specials[1], "pad_token": specials[1]},
        "generation_config.json": {"bos_token_id": 400, "eos_token_id": 401, "pad_token_id": 401},
    }
    ids = {"bos_token_id": 400, "eos_token_id": 401, "pad_token_id": 401}
    return write(folder, files, 402, 401, tie_word_embeddings=True, **ids)


def tinyllama(folder: Path) -> Path:
    """Both tokenizer.model and tokenizer.json, as the older fast tokenizers were made; a pad token that is EOS."""
    files = {
        "tokenizer.model": sentencepiece_model(),
        "tokenizer.json": json_of(sentencepiece_model()),
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "</s>",
            "chat_template": INST,
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": 2048},
    }
    return write(folder, files, 400, 2, bos_token_id=1, eos_token_id=2)


QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen2(folder: Path) -> Path:
    """tokenizer.json without BOS, though config.json names one; two stop ids; more rows than ids (Qwen2.5 Instruct)."""
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tool = "<tool_call>"
    text = tokenizer_json(*specials, words=QWEN_WORDS, normal=tool)
    bpe = json.loads(text)["model"]
    decoder = decoder_of(400, *specials, tool)
    decoder["403"]["special"] = False
    files = {
        "tokenizer.json": text,
        "vocab.json": bpe["vocab"],
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in bpe["merges"])]),
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": decoder,
            "additional_special_tokens": list(specials[1:]),
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "errors": "replace",
            "split_special_tokens": False,
            "chat_template": CHATML,
        },
        "generation_config.json": {"bos_token_id": 400, "eos_token_id": [402, 400], "pad_token_id": 400, "top_k": 20},
    }
    windows = {"use_sliding_window": False, "sliding_window": 512, "max_window_layers": 2}
    ids = {"bos_token_id": 400, "eos_token_id": 402}
    return write(folder, files, 420, 402, model_type="qwen2", tie_word_embeddings=True, **ids, **windows)


def qwen3(folder: Path) -> Path:
    """tokenizer.json alone beside its settings, and no BOS anywhere (Qwen3 Base)."""
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    files = {
        "tokenizer.json": tokenizer_json(*specials, words=QWEN_WORDS),
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": decoder_of(400, *specials),
            "bos_token": None,
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "chat_template": CHATML,
        },
        "generation_config.json": {"eos_token_id": 400, "max_new_tokens": 2048},
    }
    return write(
        folder,
        files,
        403,
        400,
        model_type="qwen3",
        bos_token_id=None,
        eos_token_id=400,
        head_dim=4,
        sliding_window=None,
    )


def gemma_model(turns: tuple[str, ...]) -> bytes:
    """Gemma's kind of sentencepiece model: no space before a text, and lines and spaces as pieces of their own."""
    pieces = ("\n", "\n\n", "▁▁", "▁▁▁")
    names = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    return sentencepiece_model((*turns, *pieces), add_dummy_prefix=False, split_digits=True, **names, **ids)


def gemma3(folder: Path) -> Path:
    """Both tokenizer.model and tokenizer.json, with a token that only the latter has; two stop ids (Gemma 3 it)."""
    turns = ("<mask>", "<start_of_turn>", "<end_of_turn>")
    model = gemma_model(turns)
    text = gemma_json(model, turns, "<image_soft_token>")
    image = decoder_of(400, "<image_soft_token>")
    files = {
        "tokenizer.model": model,
        "tokenizer.json": text,
        "tokenizer_config.json": {
            "tokenizer_class": "GemmaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": decoder_of(0, "<pad>", "<eos>", "<bos>", "<unk>", *turns) | image,
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "chat_template": CHATML,
        },
        "added_tokens.json": {"<image_soft_token>": 400},
        "special_tokens_map.json": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        "generation_config.json": {"bos_token_id": 2, "eos_token_id": [1, 6], "pad_token_id": 0, "do_sample": True},
    }
    return write(folder, files, 404, 1, eos_token_id=[1, 6], **GEMMA)


def gemma3_json(folder: Path) -> Path:
    """The same tokenizer as tokenizer.json alone."""
    turns = ("<mask>", "<start_of_turn>", "<end_of_turn>")
    files = {
        "tokenizer.json": gemma_json(gemma_model(turns), turns),
        "tokenizer_config.json": {
            "tokenizer_class": "GemmaTokenizer",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "chat_template": CHATML,
        },
    }
    return write(folder, files, 404, 1, eos_token_id=1, **GEMMA)


GEMMA = {"model_type": "gemma3_text", "tie_word_embeddings": True, "bos_token_id": 2, "pad_token_id": 0, "head_dim": 4}
GEMMA |= {"sliding_window": 32, "sliding_window_pattern": 2, "query_pre_attn_scalar": 4, "hidden_act": None}
GEMMA |= {"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 100.0, "rope_scaling": None}


def gemma_json(model: bytes, turns: tuple[str, ...], *added: str) -> str:
    """The tokenizer.json of a model as Gemma's."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(json_of(model))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    parts = tokenizers.decoders
    tokenizer.decoder = parts.Sequence([parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse()])
    tokenizer.post_processor = beginning_with("<bos>", 2)
    pieces = [tokenizers.AddedToken(text, normalized=False) for text in ("\n", "\n\n", "▁▁", "▁▁▁")]
    tokenizer.add_tokens(pieces)
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>", *turns, *added])
    return tokenizer.to_str()


def json_of(model: bytes) -> str:
    """A tokenizer.json of a sentencepiece BPE model: its merges are the pairs of pieces that make a piece."""
    import sentencepiece

    tokenizers = pytest.importorskip("tokenizers")
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {sp.IdToPiece(i): i for i in range(sp.GetPieceSize())}
    normal = [piece for piece, i in ids.items() if not (sp.IsControl(i) or sp.IsUnknown(i) or sp.IsByte(i))]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in normal  # pieces are in the order in which they were merged
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    rules = tokenizers.normalizers
    tokenizer.normalizer = rules.Sequence([rules.Prepend("▁"), rules.Replace(" ", "▁")])
    tokenizer.add_special_tokens([text for text in ("<unk>", "<s>", "</s>") if text in ids])
    return tokenizer.to_str()


LAYOUTS = {f.__name__: f for f in (llama_2, llama_3, mistral, chatml, yi, smollm2, tinyllama)}
LAYOUTS |= {f.__name__: f for f in (qwen2, qwen3, gemma3, gemma3_json)}
