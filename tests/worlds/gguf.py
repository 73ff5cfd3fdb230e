"""Tiny GGUF files of random weights, and the same models in ``transformers``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, TokenType, get_tensor_name_map
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt
from sidelight_llama.backbone import LlamaBackbone
from sidelight_llama.library import require_version
from worlds.models import CHAT_TEMPLATE, SIZES, SPECIAL_TOKENS, tiny_backbone


def is_missing() -> str:
    """Why GGUF files cannot be run here; empty if they can."""
    try:
        require_version()
    except SidelightError as error:
        return str(error)
    return ""


needs_llama = pytest.mark.skipif(bool(is_missing()), reason=is_missing())

_SIZES = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES),
    "qwen2": Qwen2Config(**_SIZES),
    "gemma3": Gemma3TextConfig(
        **_SIZES,
        sliding_window=64,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention"] * 3,
    ),
}
"""By the names of llama.cpp; the first two give their layers' inputs, the others call back."""


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file, and the same model in ``transformers``.

    Attributes:
        backbone: The file, in llama.cpp.
        reference: Has the fingerprint and the tokenizer of the file, and as many layers: its tap
            does not see what follows the last block.
    """

    backbone: LlamaBackbone
    reference: TransformersBackbone


def gguf_model(folder: Path, architecture: str, **sizes: Any) -> GgufModel:
    """Random weights, among them all biases and norms.

    Args:
        folder: Where the file is written.
        architecture: A key of ``CONFIGS``.
        sizes: Entries of the configuration that differ from it.
    """
    config = type(CONFIGS[architecture])(**{**CONFIGS[architecture].to_dict(), **sizes})
    reference = tiny_backbone(config)
    random = torch.Generator().manual_seed(1)
    for name, weight in reference.model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            weight.add_(0.1 * torch.randn(weight.shape, generator=random))
    path = write_gguf(
        reference.model, folder / f"{architecture}.gguf", architecture, reference.tokenizer
    )
    backbone = LlamaBackbone(path, threads=1)
    reference.encoder, reference.fingerprint = backbone.encoder, backbone.fingerprint
    reference.tokenizer = backbone.encoder.tokenizer
    reference.model.model.layers[-1]._forward_hooks.clear()
    return GgufModel(backbone, reference)


def states(
    backbone: LlamaBackbone | TransformersBackbone, text: EncodedPrompt, *, after: int = 0
) -> np.ndarray:
    """Of each layer and token."""
    seen: dict[int, list[torch.Tensor]] = {}
    with backbone.tapped(
        lambda layer, hidden: seen.setdefault(layer, []).append(hidden[0].clone())
    ):
        backbone.run([text], after=after)
    return torch.stack([torch.cat(chunks) for chunks in seen.values()]).float().numpy()


def write_gguf(model: Any, path: Path, architecture: str, tokenizer: Any, **changes: Any) -> Path:
    """A model of ``transformers`` as a GGUF file, with byte-level tokens and a chat template.

    Args:
        model: Of the configuration of this architecture.
        path: The file.
        architecture: A key of ``CONFIGS``.
        tokenizer: One of bytes, whose control tokens come first.
        changes: Entries of the header to change, to add or, with None, to leave out.
    """
    config = model.config
    tokens: Sequence[str] = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer = GGUFWriter(path, architecture)
    entries = {
        "general.type": "model",
        "general.file_type": 0,
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.key_length": head_width(config),
        f"{architecture}.attention.value_length": head_width(config),
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.rope.dimension_count": head_width(config),
        f"{architecture}.rope.freq_base": 10_000.0,
        f"{architecture}.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
        **changes,
    }
    if architecture == "gemma3":
        entries[f"{architecture}.attention.sliding_window"] = config.sliding_window
    for key, value in entries.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_string(key, value)
    unused = config.vocab_size - len(tokens) - 1
    # llama.cpp wants a merge; this one is of bytes that no text has.
    first = len(SPECIAL_TOKENS)
    normal = len(tokens) - first
    writer.add_token_list([*tokens, "ĀĀ", *(f"[PAD{i}]" for i in range(unused))])
    kinds = [TokenType.CONTROL] * first + [TokenType.NORMAL] * (normal + 1)
    writer.add_token_types([*kinds, *[TokenType.UNUSED] * unused])
    writer.add_token_merges(["Ā Ā"])
    names = get_tensor_name_map(
        next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture),
        config.num_hidden_layers,
    )
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float()
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _interleaved(values, head_width(config))
        if architecture == "gemma3" and "norm" in name:
            values = values + 1
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def head_width(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _interleaved(weight: torch.Tensor, width: int) -> torch.Tensor:
    """Llama's queries and keys, whose rotated halves GGUF files interleave."""
    return weight.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
