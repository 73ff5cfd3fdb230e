"""Computes who a backbone is: hashes of its configuration, weights, tokenizer and template."""

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from sidelight.backbones.base import Fingerprint
from sidelight.prompts import PromptFormat

# What a configuration says of where and how it was saved or run, not of what the model computes.
_VOLATILE = {
    "_name_or_path", "architectures", "attn_implementation", "dtype", "torch_dtype",
    "transformers_version", "use_cache", "name_or_path",
}  # fmt: skip
_SAMPLE = "The quick brown fox, 1234567890 times: jumps!\n\tüber Straßen 你好"
_VALUES_PER_WEIGHT = 16


def fingerprint(
    model: PreTrainedModel, tokenizer: Any, *, name: str, prompt_format: PromptFormat
) -> Fingerprint:
    """The fingerprint of a loaded model, in well under a second."""
    config = model.config.get_text_config()
    template = "raw" if prompt_format == "raw" else _hash(str(tokenizer.chat_template))
    return Fingerprint(
        name=name,
        config=_hash(_stable_config(config.to_dict())),
        weights=_weights_hash(model),
        tokenizer=_hash(sorted(tokenizer.get_vocab().items()), tokenizer(_SAMPLE)["input_ids"]),
        template=template,
        layers=config.num_hidden_layers + 1,
        width=config.hidden_size,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _stable_config(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in _VOLATILE and not k.startswith("_")}


def _weights_hash(model: PreTrainedModel) -> str:
    """Hash of every weight's name, shape, and a few of its values spread over its length."""
    digest = hashlib.sha256()
    for key, weight in sorted(model.state_dict().items()):
        step = max(1, weight.numel() // _VALUES_PER_WEIGHT)
        sample = weight.flatten()[::step].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{key}{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
