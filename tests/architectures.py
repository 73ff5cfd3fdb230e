"""Tiny random models of the architectures that vLLM serves with probes.

``ARCHITECTURES`` in ``sidelight.vllm.plugin`` allows those that pass
``tests/matrix/vllm/test_families.py``.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from tiny import identified, tiny_tokenizer
from vllm_served import SIZES, Model, with_probes

_SIZES = {**SIZES, "num_key_value_heads": 2}
_HEADS = {**_SIZES, "head_dim": 32}
_EXPERTS = {**_HEADS, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_WINDOW = {"sliding_window": 64}
_HYBRID = {**_WINDOW, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
_GEMMA3 = {**_HEADS, **_HYBRID, "query_pre_attn_scalar": 32}
_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip
_TEXT_ONLY = {"limit_mm_per_prompt": {"image": 0}}


@dataclass(frozen=True)
class Architecture:
    """How a tiny model of it is made.

    Attributes:
        kind: What ``transformers`` calls it.
        fields: Those of the configuration.
        attention: What ``transformers`` computes attention with; sdpa ignores Gemma 2's softcap.
        options: What vLLM is started with.
        is_apart: Whether vLLM needs a process of its own, since it changes the class of the model
            that ``transformers`` also runs.
    """

    kind: str
    fields: dict[str, Any]
    attention: str = "sdpa"
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    is_apart: bool = False


# By vLLM's names.
TESTED = {
    "LlamaForCausalLM": Architecture("llama", _SIZES),
    "Llama4ForCausalLM": Architecture("llama4_text", {
        **_HEADS, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 192,
        "attention_chunk_size": 64, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 1, 0],
    }),
    "Qwen2ForCausalLM": Architecture("qwen2", _SIZES),
    "Qwen3ForCausalLM": Architecture("qwen3", _HEADS),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe", {**_EXPERTS, "num_experts": 4, "norm_topk_prob": True}
    ),
    "MistralForCausalLM": Architecture("mistral", {**_HEADS, "sliding_window": None}),
    "Mistral3ForConditionalGeneration": Architecture("mistral3", {
        "text_config": {**_HEADS, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**_VISION, "head_dim": 16, "model_type": "pixtral"},
        "image_token_index": 299,
    }, options=_TEXT_ONLY),
    "Gemma2ForCausalLM": Architecture(
        "gemma2", {**_HEADS, **_WINDOW, "query_pre_attn_scalar": 32}, attention="eager"
    ),
    "Gemma3ForCausalLM": Architecture("gemma3_text", _GEMMA3),
    "Gemma3ForConditionalGeneration": Architecture("gemma3", {
        "text_config": _GEMMA3, "vision_config": _VISION, "mm_tokens_per_image": 4,
        "boi_token_index": 297, "eoi_token_index": 298, "image_token_index": 299,
    }, options=_TEXT_ONLY),
    "GptOssForCausalLM": Architecture("gpt_oss", {
        **_HEADS, **_WINDOW, "intermediate_size": 128, "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }, attention="eager"),
    "Phi3ForCausalLM": Architecture("phi3", _SIZES),
    "Glm4ForCausalLM": Architecture("glm4", _HEADS),
    "Glm4MoeForCausalLM": Architecture("glm4_moe", {
        **_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "n_shared_experts": 1,
    }),
    "GraniteForCausalLM": Architecture("granite", {
        **_SIZES, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
    }),
    "Olmo2ForCausalLM": Architecture("olmo2", _SIZES, is_apart=True),
    "Olmo3ForCausalLM": Architecture("olmo3", {**_SIZES, **_HYBRID}, is_apart=True),
}  # fmt: skip


def architecture_model(architecture: Architecture, folder, **fields: Any) -> Model:
    """A model of random weights on disk, with probes of every kind."""
    torch.manual_seed(0)
    path = str(folder / "model")
    config = CONFIG_MAPPING[architecture.kind](**{**architecture.fields, **fields})
    is_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    kind = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    attention = architecture.attention
    model = kind.from_config(config, dtype=torch.float32, attn_implementation=attention)
    model.save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(path)
    # Its class depends on the model's.
    tokenizer = AutoTokenizer.from_pretrained(path)
    return with_probes(identified(model, tokenizer, name=path), path, folder)
