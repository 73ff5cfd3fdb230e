"""Sliding windows over the tokens of ragged texts; a text shorter than a window is one window."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sidelight.ragged import Ragged


@dataclass(frozen=True)
class Windows:
    """Every run of ``size`` neighbouring tokens within a text.

    Attributes:
        size: Tokens of a window.
        starts: The first token of each window, text after text.
        sizes: Tokens of each window: ``size``, or all of a shorter text.
        counts: Windows of each text.
    """

    size: int
    starts: Int[Tensor, " window"]
    sizes: Int[Tensor, " window"]
    counts: Int[Tensor, " text"]

    @staticmethod
    def of(lengths: Int[Tensor, " text"], *, size: int) -> "Windows":
        """The windows of texts of these lengths, laid end to end."""
        counts = (lengths - size + 1).clamp(min=1)
        text = torch.arange(len(lengths)).repeat_interleave(counts)
        skipped = (lengths - counts).cumsum(0) - (lengths - counts)
        return Windows(
            size=size,
            starts=torch.arange(len(text)) + skipped[text],
            sizes=lengths.clamp(max=size)[text],
            counts=counts,
        )

    def means(self, values: Float[Tensor, "token output"]) -> Ragged:
        """The mean over each window, ``[window, output]``, the windows of a text a segment."""
        # float64: differences of running sums would lose digits.
        zero = values.new_zeros(1, values.shape[1], dtype=torch.float64)
        running = torch.cat([zero, values.double().cumsum(0)])
        sums = running[self.starts + self.sizes] - running[self.starts]
        return Ragged((sums / self.sizes[:, None]).to(values.dtype), self.counts)

    def gather(self, values: Float[Tensor, "token ..."]) -> Float[Tensor, "window size ..."]:
        """The tokens of each window; where ``mask`` is false, some other token."""
        places = self.starts[:, None] + torch.arange(self.size)
        places = places.clamp(max=len(values) - 1)
        return values.index_select(0, places.flatten()).unflatten(0, places.shape)

    def split(self, count: int) -> list["Windows"]:
        """So many windows at a time; the counts stay those of the whole."""
        pairs = zip(self.starts.split(count), self.sizes.split(count), strict=True)
        return [replace(self, starts=starts, sizes=sizes) for starts, sizes in pairs]

    @property
    def mask(self) -> Bool[Tensor, "window size"]:
        """Which of the gathered tokens are the window's own."""
        return torch.arange(self.size) < self.sizes[:, None]
