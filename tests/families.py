"""Tiny, randomly initialised models of the families that must work, with and without a template."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from sidelight.backbone import TransformersBackbone
from tiny import SIZES, tiny_tokenizer

_GROUPED = {**SIZES, "num_key_value_heads": 2}
_CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=8),
    "mistral": MistralConfig(**_GROUPED, sliding_window=8),
    "gemma2": Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8),
    "gpt2": GPT2Config(**SIZES),
    "gpt_neox": GPTNeoXConfig(**SIZES),
}
FAMILIES = tuple(_CONFIGS)


def family_backbone(
    family: str, *, with_template: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> TransformersBackbone:
    """A backbone of random weights; the same ones for the same family and seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_CONFIGS[family], dtype=torch.float32).to(dtype)
    tokenizer = tiny_tokenizer()
    if not with_template:
        tokenizer.chat_template = None
    return TransformersBackbone(model, tokenizer, name=f"tiny/{family}")
