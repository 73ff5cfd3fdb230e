"""The interface through which training and scoring use a model, independent of the engine."""

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

# Called with each layer's hidden states, ``[batch, token, width]``, during the pass; it must not
# keep the tensor. Layer 0 is the residual stream after the embedding, layer l the stream after
# block l, before the final norm. Long texts may come in parts, each starting at layer 0.
Tap = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Model:
    """A model without its weights.

    Attributes:
        name: Its name in messages and cards.
        path: Folder or hub id of its files.
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
        """The engine, with everything that determines how states are computed and rounded."""
        ...

    @property
    def device(self) -> torch.device:
        """The device on which probes are computed."""
        ...

    @property
    def max_tokens(self) -> int:
        """Context length in tokens."""
        ...

    def states(
        self, cache: ActivationCache, rows: Sequence[int], advance: Progress
    ) -> Generator[Mapping[int, Float[Tensor, "layer _ width"]]]:
        """Yield the states of these rows of a cache in batches.

        Args:
            cache: The cache, with its texts and the tokens to read.
            rows: The texts to compute.
            advance: Called with the number of tokens that have been run.
        """
        ...


@runtime_checkable
class Backbone(Reader, Protocol):
    """A reader whose hidden states can be tapped while a forward pass runs."""

    @property
    def batch_tokens(self) -> int:
        """Maximum tokens per call of ``run``, including padding; a longer prompt is run alone."""
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
        """Run the model over prompts for the tap.

        Args:
            prompts: The batch, which the tap sees padded on the right to the longest prompt.
            after: Length of the common prefix, which is run once and not tapped.
            layers: Number of hidden states needed per token, from the embedding up; None means all.
                The tap may see more.
        """
        ...
