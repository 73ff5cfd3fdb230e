"""How training and scoring see a model, whatever runs it."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.models.conversation import EncodedPrompt
from sidelight.models.encode import PromptEncoder
from sidelight.models.fingerprint import Fingerprint
from sidelight.progress import Progress
from sidelight.states.cache import ActivationCache

# Called with each layer's hidden states, ``[batch, token, width]``, while they exist; it must not
# keep the tensor. Layer 0 is the residual stream after the embedding, layer l the stream after
# block l, before the final norm. Long texts may come in parts, each from layer 0 on.
Tap = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Model:
    """A model without its weights.

    Attributes:
        name: Its name in messages and cards.
        path: The folder or hub id of its files.
        encoder: Makes its prompts.
        fingerprint: Its weights, tokenizer and template, with the dtype of the stored weights.
    """

    name: str
    path: str
    encoder: PromptEncoder
    fingerprint: Fingerprint


@runtime_checkable
class Reader(Protocol):
    """Computes the hidden states of texts with a frozen LLM.

    Attributes:
        name: Its name in messages and cards.
        encoder: Makes its prompts.
        fingerprint: Its weights, tokenizer and template, and the sizes of its states.
    """

    name: str
    encoder: PromptEncoder
    fingerprint: Fingerprint

    @property
    def engine(self) -> str:
        """The engine, with all that decides how states are computed and rounded."""
        ...

    @property
    def device(self) -> torch.device:
        """The device that probes on its states are computed on."""
        ...

    @property
    def max_tokens(self) -> int:
        """Length of the longest text that it reads, in tokens."""
        ...

    def states(
        self, cache: ActivationCache, rows: Sequence[int], advance: Progress
    ) -> Generator[Mapping[int, Float[Tensor, "layer _ width"]]]:
        """Yield the states of these rows of a cache, some at a time.

        Args:
            cache: The cache, with its texts and what is read of them.
            rows: The texts to compute.
            advance: Called with the number of tokens that have been run.
        """
        ...


@runtime_checkable
class Backbone(Reader, Protocol):
    """A reader whose hidden states can be tapped while a forward pass runs."""

    @property
    def batch_tokens(self) -> int:
        """The most tokens that ``run`` takes, padding included; a longer prompt is alone."""
        ...

    @property
    def can_share_prefixes(self) -> bool:
        """Whether ``run`` accepts ``after``."""
        ...

    def tapped(self, tap: Tap) -> AbstractContextManager[None]:
        """Call ``tap`` with every hidden state of this thread's passes in the block."""
        ...

    def run(
        self, prompts: Sequence[EncodedPrompt], *, after: int = 0, layers: int | None = None
    ) -> None:
        """Read prompts, for what the tap sees of them.

        Args:
            prompts: The batch. The tap sees them padded on the right to the longest.
            after: Number of tokens that all prompts begin with; they are run once, and not tapped.
            layers: How many hidden states of a token are needed, from the embedding up; None: all.
                The tap may see more.
        """
        ...
