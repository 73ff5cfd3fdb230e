"""The model as the batching engine drives it: tokens in, logits of the last position out."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from sidelight.backbones import Tap, TransformersBackbone
from sidelight.backbones.prefixes import cache_name
from sidelight.engines.cached_rows import CachedRows
from sidelight.engines.spelling import Speller
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt

_ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention"})


class Decoder:
    """Plain forward calls of a causal LM over left-padded rows.

    Args:
        backbone: The model; only this object runs it, in one thread.

    Raises:
        SidelightError: The model keeps a state other than keys and values, so rows cannot be
            batched.
    """

    def __init__(self, backbone: TransformersBackbone):
        self._backbone = backbone
        _require_attention(backbone)
        self._cache_name = cache_name(backbone.model)
        self.end_tokens = _end_tokens(backbone)
        self.spell = Speller(backbone.tokenizer)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, special ones left out."""
        return self._backbone.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def read_prompts(
        self, prompts: Sequence[EncodedPrompt], tap: Tap
    ) -> tuple[Float[Tensor, "row vocabulary"], CachedRows]:
        """One pass over whole prompts: the logits after each, and their keys and values."""
        longest = max(len(prompt) for prompt in prompts)
        token_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            token_ids[row, longest - len(prompt) :] = torch.tensor(prompt.token_ids)
            mask[row, longest - len(prompt) :] = True
        rows = CachedRows(DynamicCache(), mask.to(self._backbone.device))
        positions = (rows.mask.cumsum(dim=1) - 1).clamp(min=0)
        return self._run(token_ids.to(self._backbone.device), positions, rows, tap), rows

    def read_step(
        self, tokens: Sequence[int], rows: CachedRows, tap: Tap
    ) -> Float[Tensor, "row vocabulary"]:
        """One pass over the newest token of each row, which ``rows`` then holds."""
        positions = rows.lengths[:, None]
        rows.append_column()
        token_ids = torch.tensor(tokens, device=self._backbone.device)[:, None]
        return self._run(token_ids, positions, rows, tap)

    @torch.inference_mode()
    def _run(
        self,
        token_ids: Int[Tensor, "row token"],
        positions: Int[Tensor, "row token"],
        rows: CachedRows,
        tap: Tap,
    ) -> Float[Tensor, "row vocabulary"]:
        cache: dict[str, Any] = {self._cache_name: rows.cache}
        with self._backbone.tapped(tap):
            output = self._backbone.model(
                input_ids=token_ids,
                attention_mask=rows.mask.long(),
                position_ids=positions,
                use_cache=True,
                logits_to_keep=self._backbone.last_position,
                **cache,
            )
        return output.logits[:, -1]


def _require_attention(backbone: TransformersBackbone) -> None:
    config = backbone.model.config.get_text_config().to_dict()
    others = set(config.get("layer_types") or ()) - _ATTENTION_KINDS
    if others:
        raise SidelightError(
            f"{backbone.name} has layers of kind {', '.join(sorted(others))}, whose state is not "
            "keys and values; the transformers engine cannot batch it. Serve a model with "
            "attention layers only."
        )


def _end_tokens(backbone: TransformersBackbone) -> frozenset[int]:
    configured = backbone.model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*several, backbone.tokenizer.eos_token_id) if i is not None)
