"""The workload that this project and its peers share: the shape of a model, and token ids. Needs numpy only.

The environment variable MPO_BENCH changes its sizes and where it is computed. It holds a JSON object with some of the
keys of SIZES.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

SIZES: dict[str, Any] = {
    "vocabulary": 8192,
    "tokens": 192,  # of a prompt and its response
    "pairs": 16,  # of a step
    "width": 256,
    "layers": 6,
    "heads": 0,  # of queries; 0: one for each 32 of the width
    "kv_heads": 0,  # of keys; 0: as many as of queries
    "ffn": 0,  # 0: 43/16 of the width
    "tied": 0,  # 1: the embedding is also the head
    "rollout": 32,  # prompts in one PPO iteration, and rows in one batch of generation
    "epochs": 4,  # of PPO
    "lora": 0,  # the rank of adapters, which alone are trained; 0: all weights are
    "device": "cpu",  # or cuda; both sides compute on it
    "compile": False,  # whether this project compiles its layers
} | json.loads(os.environ.get("MPO_BENCH", "{}"))
DEVICE, COMPILE = SIZES["device"], bool(SIZES["compile"])
_HEADS = SIZES["heads"] or SIZES["width"] // 32
SHAPE: dict[str, Any] = {  # in Hugging Face's names
    "vocab_size": SIZES["vocabulary"],
    "hidden_size": SIZES["width"],
    "intermediate_size": SIZES["ffn"] or SIZES["width"] * 43 // 16,
    "num_hidden_layers": SIZES["layers"],
    "num_attention_heads": _HEADS,
    "num_key_value_heads": SIZES["kv_heads"] or _HEADS,
    "head_dim": SIZES["width"] // _HEADS,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": bool(SIZES["tied"]),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
PROMPT, RESPONSE = SIZES["tokens"] * 2 // 3, SIZES["tokens"] // 3
PAIRS = SIZES["pairs"]  # in one step of DPO or of the reward model
ROLLOUT = SIZES["rollout"]
EPOCHS, MINIBATCHES = SIZES["epochs"], 1  # of PPO
LORA = SIZES["lora"]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # what gets adapters
BETA, LR = 0.1, 1e-5
HEADS = ((2048, 8192, 256), (4096, 32000, 256))  # N, V, D: as in one step of DPO; with the vocabulary of a real model


def tokens(*shape: int, seed: int = 0) -> Any:
    """Random token ids as nested lists of this shape, without special tokens."""
    return np.random.default_rng(seed).integers(10, SHAPE["vocab_size"], shape).tolist()


def pairs(count: int) -> list[dict[str, list[int]]]:
    """Preference pairs as token ids. Every response ends in EOS."""
    eos = [SHAPE["eos_token_id"]]
    prompts = tokens(count, PROMPT, seed=1)
    chosen, rejected = (tokens(count, RESPONSE - 1, seed=s) for s in (2, 3))
    rows = zip(prompts, chosen, rejected, strict=True)
    return [{"prompt": p, "chosen": c + eos, "rejected": r + eos} for p, c, r in rows]


def weights(seed: int) -> dict[str, Any]:
    """Random weights of the workload's model: Hugging Face's name -> fp32 numpy array. Every side can load them."""
    draw, d = np.random.default_rng(seed), SHAPE["hidden_size"]
    q, kv = (SHAPE[f"num_{kind}_heads"] * SHAPE["head_dim"] for kind in ("attention", "key_value"))
    ffn, vocabulary = SHAPE["intermediate_size"], SHAPE["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d), "model.norm.weight": (d,)}
    if not SHAPE["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, d)
    attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
    mlp = {"gate_proj": (ffn, d), "up_proj": (ffn, d), "down_proj": (d, ffn)}
    for i in range(SHAPE["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {f"{at}{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{at}self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{at}mlp.{name}.weight": shape for name, shape in mlp.items()}
    values = {name: draw.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    values = {name: 1 + 0.1 * x if x.ndim == 1 else 0.02 * x for name, x in values.items()}  # norms are about 1
    return values if "lm_head.weight" in values else values | {"lm_head.weight": values["model.embed_tokens.weight"]}


def flops(case: str) -> float:
    """The multiplications and additions in the matrix products and the attention of one step of a case in ours.py.

    A token costs 2 operations for each weight in the forward pass, and twice as many in the backward pass. In the last
    layer, only tokens whose output is read pass through the output projection and the MLP. What is computed again to
    save memory does not count. Adapters are not counted: they change what is needed.
    """
    d, layers = SHAPE["hidden_size"], SHAPE["num_hidden_layers"]
    keys = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    qkv, rest = d * d + 2 * d * keys, d * d + 3 * d * SHAPE["intermediate_size"]  # weights of a layer
    head = d * SHAPE["vocab_size"]

    def forward(prompts: int, responses: int, heads: int = 1, read: int = RESPONSE) -> float:
        """One forward pass over prompts and responses, where each response continues one of the prompts.

        `read`: how many tokens of each response are read.
        """
        tokens = prompts * PROMPT + responses * RESPONSE
        weights = tokens * (layers * qkv + (layers - 1) * rest) + responses * read * rest
        seen = prompts * PROMPT**2 / 2 + responses * RESPONSE * (PROMPT + RESPONSE / 2)
        return 2 * (weights + 2 * layers * d * seen + heads * responses * RESPONSE * head)

    pairs, rollout = forward(PAIRS, 2 * PAIRS), forward(ROLLOUT, ROLLOUT)
    scalar = forward(ROLLOUT, ROLLOUT, heads=0)
    return {
        "sft": 3 * forward(PAIRS, PAIRS),
        "dpo": 4 * pairs,  # the reference forward, the policy forward and backward
        "dpo-best": 3 * pairs,
        "reward": 3 * forward(PAIRS, 2 * PAIRS, heads=0, read=1),
        "generate": rollout,
        "ppo": rollout + 2 * rollout + 2 * scalar + EPOCHS * 3 * (rollout + scalar),
        "ppo-shared": rollout + 2 * rollout + scalar + EPOCHS * 3 * rollout,
    }[case.removesuffix("-bf16")]
