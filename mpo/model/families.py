"""The model families: in what each one's layer differs from Llama's, and what its config.json leaves unsaid.

A family is one line of FAMILIES. llama.py computes them all: a Llama layer, in which each difference named here takes
the place of one small part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# Options of config.json that only some families have; a family's `options` says which.
BIASES = ("attention_bias", "mlp_bias")
WINDOWS = ("sliding_window", "layer_types")
OPTIONS = (*BIASES, *WINDOWS, "no_rope_layers", "rope_local_base_freq", "query_pre_attn_scalar")


class Family(NamedTuple):
    """What a model_type stands for in transformers."""

    architecture: str  # of its language model
    defaults: dict[str, Any]  # of the options that its config.json leaves out
    options: tuple[str, ...] = ()  # which of OPTIONS it has
    biases: tuple[str, ...] = ()  # projections with a bias, whatever config.json says
    qk_norm: bool = False  # RMSNorm of each head's query and key
    four_norms: bool = False  # norms after the attention and the MLP as well as before
    one_plus: bool = False  # norms multiply by 1 + weight
    scaled_embeddings: bool = False  # embeddings are multiplied by sqrt(D)
    activation: str = "hidden_act"  # what config.json calls the MLP's activation

    @property
    def classifier(self) -> str:
        """The architecture of a reward model: the class in transformers that puts a head of one number on the trunk."""
        return self.architecture.replace("Gemma3For", "Gemma3TextFor").replace(
            "ForCausalLM", "ForSequenceClassification"
        )


_QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "use_sliding_window": False,
}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048, "bos_token_id": 1}, BIASES),
    "mistral": Family(
        "MistralForCausalLM",
        {
            "max_position_embeddings": 4096 * 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "bos_token_id": 1,
        },
        ("sliding_window",),
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, WINDOWS, biases=("q_proj", "k_proj", "v_proj")),
    "qwen3": Family("Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, ("attention_bias", *WINDOWS), qk_norm=True),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
        },
        (*BIASES, *WINDOWS, "no_rope_layers"),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        ("attention_bias", *WINDOWS, "rope_local_base_freq", "query_pre_attn_scalar"),
        qk_norm=True,
        four_norms=True,
        one_plus=True,
        scaled_embeddings=True,
        activation="hidden_activation",
    ),
}

# Families that are asked for and not computed, and why.
REFUSED = {
    "gemma2": "it caps attention scores and logits",
    "gemma3": "it reads images, too; gemma3_text, the language model alone, is supported",
    "mixtral": "it is a mixture of experts",
    "qwen2_moe": "it is a mixture of experts",
    "qwen3_moe": "it is a mixture of experts",
    "phi3": "its matrices are fused",
}
