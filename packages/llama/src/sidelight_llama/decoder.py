"""The run of a GGUF file in the llama.cpp engine: tokens in, logits of the last position out.

Each text that is read or written has a sequence of llama.cpp to itself, from the time its prompt is
read until its row is free.
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
    """A sequence that holds a text.

    Attributes:
        length: How many of its tokens have been read.
    """

    def __init__(self, sequence: int, length: int = 0):
        self.sequence = sequence
        self.length = length


class LlamaRows:
    """Texts that are written together, by their slots."""

    def __init__(self, slots: Sequence[Slot]):
        self.slots = slots

    def select(self, rows: Sequence[int]) -> "LlamaRows":
        """These rows only, in their order; sequences that no row holds are free again."""
        return LlamaRows([self.slots[row] for row in rows])

    def joined(self, rows: "LlamaRows") -> "LlamaRows":
        """The rows of both."""
        return LlamaRows([*self.slots, *rows.slots])


class LlamaDecoder:
    """Reads prompts one after the other, and the newest tokens of several texts in one pass.

    Args:
        context: Only this object runs it, in one thread.

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
        """As ``Decoder.read_prompts``; the tap sees all prompts as one row, end to end.

        llama.cpp computes all layers, however many are needed.
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
        """One pass over the newest token of each row, which ``rows`` then holds."""
        slots, context = rows.slots, self._context
        # llama.cpp reads neighbours together if they ascend.
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
        """The lowest free sequence: neighbours are read together."""
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
    """Passes over what comes next in a text, and a yield between two; returns the last logits.

    The passes are of about equal size: llama.cpp rounds differently where one has a single token.
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
