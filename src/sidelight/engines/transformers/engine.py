"""The transformers engine: plain forward calls of a causal LM.

``transformers`` has its own batching loop, ContinuousBatchingManager. It supports no seed per
request, exposes the mapping of rows to requests only in private attributes, and reached 586
tokens/s on two CPU cores, compared with 1,596 for plain forward calls. The loop is therefore
``LocalEngine``.

The keys and values of running requests form one left-padded batch that rows enter and leave. It
uses only public parts of ``transformers``' ``DynamicCache``: the ``keys`` and ``values`` of its
layers, and ``update``. A plain ``DynamicCache()`` keeps every position in every layer; sliding
windows are applied through the attention mask.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from sidelight.engines.batch import PromptPasses
from sidelight.engines.local import LocalEngine
from sidelight.engines.queue import Limits
from sidelight.engines.transformers.backbone import TransformersBackbone, cache_name
from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt
from sidelight.probes.probe import Probe
from sidelight.states.reader import Tap


class PaddedRows:
    """A cache, and a mask of the columns that contain a token in each row.

    Args:
        cache: Keys and values, ``[row, head, column, width]`` in each layer.
        mask: True where a column contains a token of the row; the padding comes first.
    """

    def __init__(self, cache: DynamicCache, mask: Bool[Tensor, "row column"]):
        self.cache = cache
        self.mask = mask

    def select(self, rows: Sequence[int]) -> "PaddedRows":
        """Only these rows, in this order, without columns that are padding in all of them."""
        if len(rows) == len(self.mask):
            return self
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        start = int(mask.any(dim=0).int().argmax())
        cache = DynamicCache()
        for i, (keys, values) in enumerate(_layers(self.cache)):
            cache.update(keys[index, :, start:], values[index, :, start:], i)
        return PaddedRows(cache, mask[:, start:])

    def joined(self, rows: "PaddedRows") -> "PaddedRows":
        """Concatenate the rows of both, padded on the left to the same length."""
        width = max(self.mask.shape[1], rows.mask.shape[1])
        cache = DynamicCache()
        for i, pair in enumerate(zip(_layers(self.cache), _layers(rows.cache), strict=True)):
            keys, values = (
                torch.cat([pad(s, (0, 0, width - s.shape[2], 0)) for s in states])
                for states in zip(*pair, strict=True)
            )
            cache.update(keys, values, i)
        masks = [pad(m, (width - m.shape[1], 0), value=False) for m in (self.mask, rows.mask)]
        return PaddedRows(cache, torch.cat(masks))


def _layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


_ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention"})


class TransformersDecoder:
    """Plain forward calls of a causal LM over left-padded rows.

    Args:
        backbone: The model; only this object may run it, in one thread.

    Attributes:
        end_tokens: Ids that end a turn; they are counted, but are not part of the text.

    Raises:
        SidelightError: Rows of the model cannot be batched: its layers keep a state other than keys
            and values, or attend to chunks.
    """

    def __init__(self, backbone: TransformersBackbone):
        kinds = set(backbone.model.config.get_text_config().to_dict().get("layer_types") or ())
        if unknown := kinds - _ATTENTION_KINDS:
            raise SidelightError(
                f"{backbone.name} has layers of kind {', '.join(sorted(unknown))}, but the "
                f"transformers engine can batch only {' and '.join(sorted(_ATTENTION_KINDS))}. "
                "Serve the model with another engine (--engine), or serve another model."
            )
        self._backbone = backbone
        self._cache_name = cache_name(backbone.model)
        configured = backbone.model.generation_config.eos_token_id
        several = configured if isinstance(configured, list) else [configured]
        ends = (*several, backbone.tokenizer.eos_token_id)
        self.end_tokens = frozenset(token for token in ends if token is not None)

    def read_prompts(
        self,
        prompts: Sequence[EncodedPrompt],
        tap: Tap | None,
        *,
        width: int | None = None,
        layers: int | None = None,
    ) -> PromptPasses[PaddedRows]:
        """As ``Decoder.read_prompts``; prompts are padded on the left to the longest."""
        token_ids, mask = self._backbone.pad(prompts, side="left")
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        rows = PaddedRows(DynamicCache(), mask[:, :0])
        start, longest = 0, mask.shape[1]
        while True:
            window = slice(start, start + (width or longest))
            rows.mask = mask[:, : window.stop]
            logits = self._run(token_ids[:, window], positions[:, window], rows, tap, layers)
            if window.stop >= longest:
                return logits, mask, rows
            yield
            start = window.stop

    def read_step(
        self, tokens: Sequence[int], rows: PaddedRows, tap: Tap | None
    ) -> Float[Tensor, "row vocabulary"]:
        """One pass over the newest token of each row, which is added to ``rows``."""
        positions = rows.mask.sum(dim=1)[:, None]
        rows.mask = pad(rows.mask, (0, 1), value=True)
        token_ids = torch.tensor(tokens, device=self._backbone.device)[:, None]
        return self._run(token_ids, positions, rows, tap)

    @torch.inference_mode()
    def _run(
        self,
        token_ids: Int[Tensor, "row token"],
        positions: Int[Tensor, "row token"],
        rows: PaddedRows,
        tap: Tap | None,
        layers: int | None = None,
    ) -> Float[Tensor, "row vocabulary"]:
        cache: dict[str, Any] = {self._cache_name: rows.cache}
        tapped = self._backbone.tapped(tap) if tap else nullcontext()
        with tapped, self._backbone.stopping_after(layers):
            output = self._backbone.model(
                input_ids=token_ids,
                attention_mask=rows.mask.long(),
                position_ids=positions,
                use_cache=True,
                logits_to_keep=self._backbone.last_position,
                **cache,
            )
            return output.logits[:, -1]
        return torch.empty(len(token_ids), 0, device=self._backbone.device)


class TransformersEngine(LocalEngine):
    """Serves one backbone of ``transformers`` with its probes.

    Args:
        backbone: The model. Nothing else may run it at the same time.
        probes: As for ``LocalEngine``.
        limits: As for ``LocalEngine``.
        model: As for ``LocalEngine``.
    """

    def __init__(
        self,
        backbone: TransformersBackbone,
        probes: Sequence[Probe],
        *,
        limits: Limits | None = None,
        model: str | None = None,
    ):
        decoder = TransformersDecoder(backbone)
        super().__init__(backbone, decoder, probes, limits=limits, model=model)
