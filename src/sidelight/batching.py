"""Groups prompts of similar length into batches, so that little of a forward pass is padding."""

from collections.abc import Sequence

# Padded tokens of one forward pass: large enough to fill the matmuls, small enough for a laptop.
BATCH_TOKENS = 4096


def by_length(lengths: Sequence[int], *, batch_tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices of the prompts of each batch, the longest prompts first.

    Args:
        lengths: Tokens of each prompt.
        batch_tokens: The most tokens of a batch, padding included; a longer prompt is alone.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # The first prompt of a batch is its longest, so it sets the padded length.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
