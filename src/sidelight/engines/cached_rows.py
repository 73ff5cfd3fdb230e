"""Keys and values of the requests being written: one left-padded batch that rows come and go in.

Works through the public face of ``transformers``' ``DynamicCache``: its layers' ``keys`` and
``values``, and ``update``. A plain ``DynamicCache()`` keeps every position in every layer; models
with sliding windows get their windows from the attention mask.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache


class CachedRows:
    """A cache, and which of its columns are real in each row.

    Args:
        cache: Keys and values, ``[row, head, column, width]`` in each layer.
        mask: True where a column holds a token of the row; the false ones come first.
    """

    def __init__(self, cache: DynamicCache, mask: Bool[Tensor, "row column"]):
        self.cache = cache
        self.mask = mask

    @property
    def lengths(self) -> Int[Tensor, " row"]:
        """Tokens of each row, which is the position of its next token."""
        return self.mask.sum(dim=1)

    def append_column(self) -> None:
        """Makes room in the mask for the token that each row is about to read."""
        self.mask = pad(self.mask, (0, 1), value=True)

    def kept(self, rows: Sequence[int]) -> "CachedRows":
        """These rows only, in their order, without the columns that pad all of them."""
        if len(rows) == len(self.mask):
            return self
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        start = int(mask.any(dim=0).int().argmax())
        cache = _changed(self.cache, lambda states: states[index, :, start:])
        return CachedRows(cache, mask[:, start:])

    def joined(self, other: "CachedRows") -> "CachedRows":
        """The rows of both, padded on the left to one length."""
        columns = max(self.mask.shape[1], other.mask.shape[1])
        cache = DynamicCache()
        pairs = zip(_layers(self.cache), _layers(other.cache), strict=True)
        for index, (mine, theirs) in enumerate(pairs):
            keys = _stacked(mine.keys, theirs.keys, columns)
            cache.update(keys, _stacked(mine.values, theirs.values, columns), index)
        short = [rows.mask for rows in (self, other)]
        mask = torch.cat([pad(m, (columns - m.shape[1], 0), value=False) for m in short])
        return CachedRows(cache, mask)


def _layers(cache: DynamicCache) -> list[Any]:
    return cache.layers


def _changed(cache: DynamicCache, change: Callable[[Tensor], Tensor]) -> DynamicCache:
    changed = DynamicCache()
    for index, layer in enumerate(_layers(cache)):
        changed.update(change(layer.keys), change(layer.values), index)
    return changed


def _stacked(
    mine: Float[Tensor, "row head column width"],
    theirs: Float[Tensor, "newrow head newcolumn width"],
    columns: int,
) -> Float[Tensor, "allrows head columns width"]:
    return torch.cat([pad(s, (0, 0, columns - s.shape[2], 0)) for s in (mine, theirs)])
