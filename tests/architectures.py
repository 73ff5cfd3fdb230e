"""Tiny random models of the architectures that vLLM serves with probes.

``ARCHITECTURES`` in ``sidelight.vllm.patches`` allows those that pass
``tests/matrix/vllm/test_families.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    Mistral3Config,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from sidelight.backbone import TransformersBackbone
from tiny import SIZES, tiny_tokenizer
from vllm_served import Model, with_probes

_SIZES = {
    **SIZES,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}
_HEADS = {"head_dim": 32}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_WINDOW = {"sliding_window": 64}
_SLIDING_AND_FULL = [
    "sliding_attention",
    "sliding_attention",
    "sliding_attention",
    "full_attention",
]
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Architecture:
    """How a tiny model of it is made.

    Attributes:
        name: vLLM's name for it.
        config: Its configuration for ``transformers``.
        attention: What ``transformers`` computes attention with; sdpa ignores Gemma 2's softcap.
        options: What vLLM is started with.
        is_apart: Whether vLLM needs a process of its own, since it changes the class of the model
            that ``transformers`` also runs.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    attention: str = "sdpa"
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    is_apart: bool = False


_TEXT_ONLY = {"limit_mm_per_prompt": {"image": 0}}
TESTED = {
    own.name: own
    for own in (
        Architecture("LlamaForCausalLM", lambda: LlamaConfig(**_SIZES)),
        Architecture(
            "Llama4ForCausalLM",
            lambda: Llama4TextConfig(
                **_SIZES,
                **_HEADS,
                num_local_experts=4,
                num_experts_per_tok=1,
                intermediate_size_mlp=192,
                attention_chunk_size=64,
                interleave_moe_layer_step=2,
                no_rope_layers=[1, 1, 1, 0],
            ),
        ),
        Architecture("Qwen2ForCausalLM", lambda: Qwen2Config(**_SIZES)),
        Architecture("Qwen3ForCausalLM", lambda: Qwen3Config(**_SIZES, **_HEADS)),
        Architecture(
            "Qwen3MoeForCausalLM",
            lambda: Qwen3MoeConfig(
                **_SIZES, **_HEADS, **_EXPERTS, num_experts=4, norm_topk_prob=True
            ),
        ),
        Architecture(
            "MistralForCausalLM", lambda: MistralConfig(**_SIZES, **_HEADS, sliding_window=None)
        ),
        Architecture(
            "Mistral3ForConditionalGeneration",
            lambda: Mistral3Config(
                text_config={
                    **_SIZES, **_HEADS, "model_type": "mistral", "sliding_window": None
                },
                vision_config={**_VISION, "head_dim": 16, "model_type": "pixtral"},
                image_token_index=299,
            ),
            options=_TEXT_ONLY,
        ),
        Architecture(
            "Gemma2ForCausalLM",
            lambda: Gemma2Config(**_SIZES, **_HEADS, **_WINDOW, query_pre_attn_scalar=32),
            attention="eager",
        ),
        Architecture(
            "Gemma3ForCausalLM",
            lambda: Gemma3TextConfig(
                **_SIZES, **_HEADS, **_WINDOW,
                layer_types=_SLIDING_AND_FULL, query_pre_attn_scalar=32,
            ),
        ),
        Architecture(
            "Gemma3ForConditionalGeneration",
            lambda: Gemma3Config(
                text_config={
                    **_SIZES, **_HEADS, **_WINDOW,
                    "layer_types": _SLIDING_AND_FULL, "query_pre_attn_scalar": 32,
                },
                vision_config=_VISION,
                mm_tokens_per_image=4,
                boi_token_index=297, eoi_token_index=298, image_token_index=299,
            ),
            options=_TEXT_ONLY,
        ),
        Architecture(
            "GptOssForCausalLM",
            lambda: GptOssConfig(
                **{**_SIZES, "intermediate_size": 128}, **_HEADS, **_WINDOW,
                num_local_experts=4, num_experts_per_tok=2,
            ),
            attention="eager",
        ),
        Architecture("Phi3ForCausalLM", lambda: Phi3Config(**_SIZES)),
        Architecture("Glm4ForCausalLM", lambda: Glm4Config(**_SIZES, **_HEADS)),
        Architecture(
            "Glm4MoeForCausalLM",
            lambda: Glm4MoeConfig(
                **_SIZES, **_HEADS, **_EXPERTS,
                n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1,
                n_shared_experts=1,
            ),
        ),
        Architecture(
            "GraniteForCausalLM",
            lambda: GraniteConfig(
                **_SIZES,
                embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0,
                attention_multiplier=0.2,
            ),
        ),
        Architecture("Olmo2ForCausalLM", lambda: Olmo2Config(**_SIZES), is_apart=True),
        Architecture(
            "Olmo3ForCausalLM",
            lambda: Olmo3Config(**_SIZES, **_WINDOW, layer_types=_SLIDING_AND_FULL),
            is_apart=True,
        ),
    )
}  # fmt: skip


def architecture_model(architecture: Architecture, folder) -> Model:
    """A model of random weights on disk, with probes of every kind."""
    torch.manual_seed(0)
    path, config = str(folder / "model"), architecture.config()
    kind = AutoModelForCausalLM
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = AutoModelForImageTextToText
    model = kind.from_config(
        config, dtype=torch.float32, attn_implementation=architecture.attention
    )
    model.save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(path)
    # Its class depends on the model's.
    tokenizer = AutoTokenizer.from_pretrained(path)
    return with_probes(TransformersBackbone(model, tokenizer, name=path), path, folder)
