"""The logits of every probe of a bank on many texts, from one forward pass over each."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from sidelight.backbone import TransformersBackbone
from sidelight.bank import Bank
from sidelight.progress import progress
from sidelight.prompts import EncodedPrompt, Reads
from sidelight.ragged import by_length


def score(
    backbone: TransformersBackbone, bank: Bank, prompts: Sequence[EncodedPrompt]
) -> list[np.ndarray]:
    """For each probe the logits of all prompts, ``[prompt, output]``, in the given order.

    Hidden states are projected while the pass runs and then gone. A prompt without any token that
    a probe reads gets NaN.
    """
    lengths = [len(prompt) for prompt in prompts]
    scores = [np.full((len(prompts), probe.task.outputs), np.nan) for probe in bank.probes]
    tap = bank.tap()
    with progress("Judging", sum(lengths), unit="tokens") as shown:
        for batch in by_length(lengths):
            chosen = [prompts[i] for i in batch]
            with backbone.tapped(tap):
                backbone.run(chosen)
            projected = tap.projected()
            masks = read_masks(chosen, bank.reads, device=projected.device)
            for own, logits in zip(
                scores, bank.logits(bank.summarise(projected, masks)), strict=True
            ):
                own[batch] = logits
            shown.advance(sum(lengths[i] for i in batch))
    return scores


def read_masks(
    prompts: Sequence[EncodedPrompt], reads: frozenset[Reads], *, device: torch.device
) -> Mapping[Reads, Bool[Tensor, "batch token"]]:
    """For each way of reading, the tokens that count in a right-padded batch."""
    return {
        way: torch.nn.utils.rnn.pad_sequence(
            [prompt.mask(way) for prompt in prompts], batch_first=True, padding_value=0
        ).to(device)
        for way in reads
    }
