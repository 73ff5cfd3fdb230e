"""The labels that training compares logits with: of whole texts, or of their tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.models.conversation import Reads
from sidelight.probes.mechanisms.base import Mechanism
from sidelight.probes.ragged import Ragged


@dataclass(frozen=True)
class Targets:
    """The labels of whole texts.

    Attributes:
        labels: A row for each text, as in ``LabelledExamples.labels``.
        weights: Weight of each text.
    """

    labels: Ragged
    weights: Float[Tensor, " text"]

    def select(self, texts: Int[Tensor, " chosen"]) -> "Targets":
        """The targets of these texts."""
        return replace(self, labels=self.labels.select(texts), weights=self.weights[texts])

    def to(self, device: torch.device) -> "Targets":
        """The same on a device."""
        return replace(self, labels=self.labels.to(device), weights=self.weights.to(device))

    def initialise(self, mechanism: Mechanism) -> None:
        """Prepare a new mechanism for these labels."""

    def takes_prefixes(self, reads: Reads) -> bool:
        """Whether training also shows beginnings of the texts, as responses are classified while
        they are generated.
        """
        return reads.side == "response"

    def votes(
        self, mechanism: Mechanism, inputs: Iterable[Ragged]
    ) -> list[Float[Tensor, "row output"]]:
        """Logits to compare with the labels, by each voter of the mechanism and each input."""
        states = map(mechanism.summarise, inputs)
        return [vote for state in states for vote in mechanism.votes(state).unbind(1)]

    def token_logits(
        self, mechanism: Mechanism, tokens: Ragged
    ) -> Sequence[Float[np.ndarray, "_ output"]]:
        """The logits of each text's tokens; empty for labels of whole texts."""
        del mechanism, tokens
        return ()

    def compared(
        self,
        logits: Float[np.ndarray, "text output"],
        token_logits: Sequence[Float[np.ndarray, "_ output"]],
    ) -> Float[np.ndarray, "row output"]:
        """The logits that belong to the rows of ``labels``."""
        del token_logits
        return logits


@dataclass(frozen=True)
class TokenTargets(Targets):
    """The labels of each token, ``[token, label]``."""

    def initialise(self, mechanism: Mechanism) -> None:
        rows = self.labels.values
        frequency = rows.reshape(len(rows), -1).float().mean(0)
        mechanism.set_prior(frequency.clamp(min=1 / len(rows)).logit(1e-6))

    def takes_prefixes(self, reads: Reads) -> bool:
        return False

    def votes(
        self, mechanism: Mechanism, inputs: Iterable[Ragged]
    ) -> list[Float[Tensor, "row output"]]:
        return [_scored(mechanism, tokens).values for tokens in inputs]

    def token_logits(
        self, mechanism: Mechanism, tokens: Ragged
    ) -> Sequence[Float[np.ndarray, "_ output"]]:
        logits = _scored(mechanism, tokens).values.double().cpu()
        return [text.numpy() for text in logits.split(tokens.lengths.tolist())]

    def compared(
        self,
        logits: Float[np.ndarray, "text output"],
        token_logits: Sequence[Float[np.ndarray, "_ output"]],
    ) -> Float[np.ndarray, "row output"]:
        return np.concatenate(token_logits)


def _scored(mechanism: Mechanism, tokens: Ragged) -> Ragged:
    logits = mechanism.token_logits(mechanism.summarise(tokens))
    assert logits is not None
    return logits
