"""Frozen LLMs: how to get one by name, and what it gives."""

from pathlib import Path

from sidelight.backbones.base import Backbone, Fingerprint, Tap
from sidelight.backbones.embedded import EMBEDDED_NAME, embedded_model_path
from sidelight.backbones.transformers import DtypeName, TransformersBackbone
from sidelight.prompts import PromptFormat

__all__ = [
    "Backbone",
    "DtypeName",
    "EMBEDDED_NAME",
    "Fingerprint",
    "Tap",
    "TransformersBackbone",
    "load_backbone",
]


def load_backbone(
    name: str | Path = EMBEDDED_NAME,
    *,
    dtype: DtypeName = "auto",
    device: str = "auto",
    prompt_format: PromptFormat | None = None,
) -> TransformersBackbone:
    """A backbone by name.

    Args:
        name: ``smollm2`` (the embedded default), a local folder, or a hub id.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: as the weights are stored.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: the first GPU where there is one.
        prompt_format: ``chat`` or ``raw``; None takes the chat template where the model has one.

    Raises:
        SidelightError: The model cannot be found or is not a causal LM with decoder blocks.
    """
    path = embedded_model_path() if str(name) == EMBEDDED_NAME else str(name)
    return TransformersBackbone.load(
        path, name=str(name), dtype=dtype, device=device, prompt_format=prompt_format
    )
