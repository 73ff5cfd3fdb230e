"""Runs a causal model on texts that begin alike: what they share passes through it once."""

from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache


def run_once(model: Any, prefix: Int[Tensor, " prefix"]) -> DynamicCache:
    """The keys and values of a prefix.

    Args:
        model: A causal model of ``transformers`` for which ``can_share`` holds.
        prefix: Token ids; at least one.
    """
    cache = DynamicCache()
    model(input_ids=prefix[None], use_cache=True, **{cache_name(model): cache})
    return cache


def run_after(
    model: Any,
    cache: DynamicCache,
    token_ids: Int[Tensor, "text token"],
    present: Bool[Tensor, "text token"],
    **options: Any,
) -> Any:
    """The model's output on ``token_ids``, each row after the prefix in ``cache``.

    Gradients flow back through the prefix. The cache holds the rows as well afterwards.

    Args:
        model: As in ``run_once``.
        cache: Of ``run_once``.
        token_ids: What follows the prefix.
        present: Where there is a token; the padding may be on either side.
        options: Of the model's forward pass.
    """
    before = present.new_ones(len(token_ids), cache.get_seq_length())
    cache.batch_repeat_interleave(len(token_ids))
    mask = torch.cat([before, present], 1)
    positions = (mask.cumsum(1) - 1)[:, before.shape[1] :]
    begun = {cache_name(model): cache, "use_cache": True, **options}
    return model(input_ids=token_ids, attention_mask=mask.long(), position_ids=positions, **begun)


def can_share(model: Any) -> bool:
    """Whether a prefix's state is keys and values of every token, and no more."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    usual = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [usual]
    return set(kinds) == {"full_attention"} and not getattr(model, "_is_stateful", False)


def cache_name(model: Any) -> str:
    """The argument that takes a cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
