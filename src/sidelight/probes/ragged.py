"""Sequences of different lengths laid end to end, reductions over each, and batches by length.

The tokens of a packed batch and the states of streaming mechanisms are both ragged: nothing is
padded, so no padding can leak into a result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

# "No item yet" in a running maximum; finite, so that the difference of two is not NaN.
LOWEST = -1e30


@dataclass(frozen=True)
class Ragged:
    """Rows of several segments, end to end.

    Attributes:
        values: One entry per row; the rows of a segment are neighbours, in order.
        lengths: Rows of each segment; a segment may be empty.
    """

    values: Shaped[Tensor, "row ..."]
    lengths: Int[Tensor, " segment"]

    @property
    def segments(self) -> Int[Tensor, " row"]:
        """The segment that each row belongs to."""
        index = torch.arange(len(self.lengths), device=self.lengths.device)
        return torch.repeat_interleave(index, self.lengths)

    @staticmethod
    def one_row_each(values: Shaped[Tensor, "segment ..."]) -> "Ragged":
        """Segments of one row each: a state of fixed size."""
        return Ragged(values, torch.ones(len(values), dtype=torch.long, device=values.device))

    def to(self, device: torch.device) -> "Ragged":
        """The same rows on a device."""
        return Ragged(self.values.to(device), self.lengths.to(device))

    def sums(self) -> Float[Tensor, "segment ..."]:
        """The sum over each segment's rows; zero for an empty one."""
        total = self.values.new_zeros(len(self.lengths), *self.values.shape[1:])
        return total.index_add(0, self.segments, self.values)

    def maxima(self) -> Float[Tensor, "segment ..."]:
        """The elementwise maximum over each segment's rows; ``LOWEST`` for an empty one."""
        return torch.segment_reduce(
            self.values.contiguous(), "max", lengths=self.lengths, axis=0, initial=LOWEST
        )

    def without_ties(self) -> "Ragged":
        """The same maxima, each in one row: in other rows that share it stands ``LOWEST``.

        The gradient of ``maxima`` counts what several rows share more than once.
        """
        is_top = (self.values == self.maxima()[self.segments]).long()
        before = is_top.cumsum(0) - is_top
        starts = (self.lengths.cumsum(0) - self.lengths)[self.segments]
        is_later = (is_top > 0) & (before > before[starts])
        return Ragged(torch.where(is_later, LOWEST, self.values), self.lengths)

    def prefixes(self, lengths: Int[Tensor, " segment"]) -> "Ragged":
        """The first rows of each segment; ``lengths`` says how many, and none exceeds its own."""
        starts = self.lengths.cumsum(0) - self.lengths
        rows = torch.arange(len(self.values), device=self.lengths.device)
        return Ragged(self.values[rows < (starts + lengths)[self.segments]], lengths)

    def select(self, segments: Int[Tensor, " chosen"]) -> "Ragged":
        """These segments, in this order and as often as they are named."""
        lengths = self.lengths[segments]
        # From a row's place in the result to its place here: the same for all rows of a segment.
        moved = (self.lengths.cumsum(0) - self.lengths)[segments] - (lengths.cumsum(0) - lengths)
        rows = torch.arange(int(lengths.sum()), device=lengths.device)
        return Ragged(self.values[rows + moved.repeat_interleave(lengths)], lengths)

    def split(self) -> list["Ragged"]:
        """Each segment by itself."""
        segments = self.values.split(self.lengths.tolist())
        return [Ragged(values, self.lengths[i : i + 1]) for i, values in enumerate(segments)]

    @staticmethod
    def pack(items: Sequence["Ragged"]) -> "Ragged":
        """All segments of all parts, in order."""
        return Ragged(
            torch.cat([ragged.values for ragged in items]),
            torch.cat([ragged.lengths for ragged in items]),
        )

    def joined(self, suffix: "Ragged") -> "Ragged":
        """Each segment followed by the same segment of ``suffix``."""
        pairs = zip(self.split(), suffix.split(), strict=True)
        values = [torch.cat([left.values, right.values]) for left, right in pairs]
        return Ragged(torch.cat(values), self.lengths + suffix.lengths)


# Padded tokens of a forward pass: enough to fill the matmuls, few enough for a laptop.
BATCH_TOKENS = 4096


def padded_length(length: int) -> int:
    """The length rounded up to four significant bits, so that few batch shapes occur.

    It is at most an eighth larger.
    """
    step = 1 << max(0, length.bit_length() - 4)
    return -(-length // step) * step


def by_length(lengths: Sequence[int], *, batch_tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Group prompts of similar length into batches, so that little is padding.

    Args:
        lengths: Tokens of each prompt.
        batch_tokens: The largest size of a batch if its prompts are padded to the
            ``padded_length`` of the longest; a longer prompt is alone.

    Returns:
        Indices of the prompts of each batch, the longest prompts first.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # The first prompt of a batch is its longest, so it sets the padded length.
        longest = padded_length(lengths[batches[-1][0]]) if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
