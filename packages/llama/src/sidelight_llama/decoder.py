"""The decoder of the llama.cpp engine.

Each running text has its own llama.cpp sequence, from the reading of its prompt until its row is
released.
"""

import weakref
from collections.abc import Generator, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.engines.batch import PromptPasses
from sidelight.models.conversation import EncodedPrompt
from sidelight.states.reader import Tap
from sidelight_llama.context import BATCH_TOKENS, LlamaContext


class Slot:
    """The sequence of a text.

    Attributes:
        length: Number of its tokens that have been read.
    """

    def __init__(self, sequence: int, length: int = 0):
        self.sequence = sequence
        self.length = length


class LlamaRows:
    """The slots of texts that are generated together."""

    def __init__(self, slots: Sequence[Slot]):
        self.slots = slots

    def select(self, rows: Sequence[int]) -> "LlamaRows":
        """Only these rows, in this order; sequences without a row are released."""
        return LlamaRows([self.slots[row] for row in rows])

    def joined(self, rows: "LlamaRows") -> "LlamaRows":
        """Concatenate the rows of both."""
        return LlamaRows([*self.slots, *rows.slots])


class LlamaDecoder:
    """Reads prompts one at a time, and the newest tokens of several texts in one pass.

    Args:
        context: The context; only this object may run it, in one thread.

    Attributes:
        end_tokens: Ids that end a turn.
    """

    def __init__(self, context: LlamaContext):
        self.end_tokens = context.model.end_tokens
        self._context = context
        self._free = [*range(context.sequences)]

    def read_prompts(
        self,
        prompts: Sequence[EncodedPrompt],
        tap: Tap | None,
        *,
        width: int | None = None,
        layers: int | None = None,
    ) -> PromptPasses[LlamaRows]:
        """As ``Decoder.read_prompts``; the tap sees all prompts concatenated in one row.

        llama.cpp always computes all layers.
        """
        rows = LlamaRows([self._take() for _ in prompts])
        logits: list[Tensor] = []
        for slot, prompt in zip(rows.slots, prompts, strict=True):
            if logits:
                yield
            text = read_text(self._context, slot, prompt.token_ids, tap, width=width)
            logits.append((yield from text))
        is_token = torch.ones(1, sum(map(len, prompts)), dtype=torch.bool)
        return torch.stack(logits), is_token, rows

    def read_step(
        self, tokens: Sequence[int], rows: LlamaRows, tap: Tap | None
    ) -> Float[Tensor, "row vocabulary"]:
        """One pass over the newest token of each row, which is added to ``rows``."""
        slots, context = rows.slots, self._context
        # llama.cpp reads adjacent sequences together if they are ascending.
        order = sorted(range(len(slots)), key=lambda row: slots[row].sequence)
        context.decode(
            [tokens[row] for row in order],
            [slots[row].length for row in order],
            [slots[row].sequence for row in order],
            outputs=range(len(order)),
        )
        places = np.argsort(order)
        if tap is not None:
            states = torch.from_numpy(context.rows())[:, places, None]
            for layer, hidden in enumerate(states.unbind()):
                tap(layer, hidden)
        for slot in slots:
            slot.length += 1
        return torch.from_numpy(np.stack([context.logits(int(place)) for place in places]))

    def _take(self) -> Slot:
        """Take the lowest free sequence, because adjacent ones are read together."""
        sequence = min(self._free)
        self._free.remove(sequence)
        slot = Slot(sequence)
        weakref.finalize(slot, self._free.append, sequence)
        self._context.forget(sequence)
        return slot


def read_text(
    context: LlamaContext,
    slot: Slot,
    tokens: Sequence[int],
    tap: Tap | None,
    *,
    width: int | None = None,
) -> Generator[None, None, Float[Tensor, " vocabulary"]]:
    """Read the next tokens of a text, with a yield between passes; return the last logits.

    The passes have similar sizes, because llama.cpp rounds differently for a single token.
    """
    count, most = len(tokens), min(BATCH_TOKENS, width or BATCH_TOKENS)
    passes = -(-count // most)
    for start, stop in pairwise(i * count // passes for i in range(passes + 1)):
        if start:
            yield
        chunk = tokens[start:stop]
        positions = range(slot.length, slot.length + len(chunk))
        context.decode(chunk, positions, [slot.sequence] * len(chunk), outputs=[len(chunk) - 1])
        if tap is not None:
            for layer, hidden in enumerate(torch.from_numpy(context.rows())[:, None].unbind()):
                tap(layer, hidden)
        slot.length += len(chunk)
    return torch.from_numpy(context.logits(-1).copy())
