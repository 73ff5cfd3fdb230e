"""A conversation as token ids, each with the part of it that it belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from jaxtyping import Bool
from torch import Tensor

from sidelight.errors import ContextLengthError
from sidelight.prompts.conversation import Part, Reads


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids and what each token belongs to.

    Attributes:
        token_ids: One id per token.
        parts: One ``Part`` per token.
        dropped: Tokens of text removed to fit a training limit; always 0 outside training.
    """

    token_ids: tuple[int, ...]
    parts: tuple[Part, ...]
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def mask(self, reads: Reads) -> Bool[Tensor, " token"]:
        """True where a probe with these ``reads`` looks."""
        wanted = reads.parts
        return torch.tensor([part in wanted for part in self.parts], dtype=torch.bool)

    def shortened(self, limit: int, reads: Reads | None = None) -> "EncodedPrompt":
        """At most ``limit`` tokens: tokens of the text go, the template's stay.

        For training only, where the caller counts and reports what was dropped. Where a probe reads
        the prompt, the text's last tokens go. Where it reads the response, the prompt's first
        tokens go, and the response's last ones if those do not suffice. Where it reads both, either
        keeps half of the room if it needs that.

        Args:
            limit: The most tokens.
            reads: What the probe reads; None is the prompt.

        Raises:
            ContextLengthError: What is not read, the template and the system prompt, is longer
                than ``limit``.
        """
        excess = len(self) - limit
        if excess <= 0:
            return self
        prompt = [i for i, part in enumerate(self.parts) if part == Part.PROMPT]
        response = [i for i, part in enumerate(self.parts) if part == Part.RESPONSE]
        room = len(prompt) + len(response) - excess
        if room <= 0:
            raise ContextLengthError(
                f"A limit of {limit} tokens leaves no room for the text beside the chat template "
                f"and the system prompt ({limit - room} tokens). Raise --max-tokens, or shorten "
                "the system prompt."
            )
        side = (reads or Reads()).side
        least = {"prompt": room, "both": room // 2, "response": 0}[side]
        held = min(len(prompt), max(least, room - len(response)))
        gone = {*(prompt[held:] if side == "prompt" else prompt[: len(prompt) - held])}
        gone |= {*response[room - held :]}
        kept = [i for i in range(len(self)) if i not in gone]
        return EncodedPrompt(
            token_ids=tuple(self.token_ids[i] for i in kept),
            parts=tuple(self.parts[i] for i in kept),
            dropped=excess,
        )


def shared_length(texts: Sequence[Sequence[int]]) -> int:
    """How many token ids all texts begin with."""
    columns = zip(*texts, strict=False)
    return len(list(takewhile(lambda column: len(set(column)) == 1, columns)))


def shared_unread(prompts: Sequence[EncodedPrompt], reads: Reads) -> int:
    """How many tokens all prompts begin with that no probe reads, such as a system prompt.

    Args:
        prompts: Each with a token that is read.
        reads: What probes read.
    """
    unread = min(int(prompt.mask(reads).int().argmax()) for prompt in prompts)
    return shared_length([prompt.token_ids[:unread] for prompt in prompts])
