"""What every backbone engine gives: hidden states while the forward pass runs, and who it is."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from sidelight.errors import FingerprintMismatchError
from sidelight.prompts import EncodedPrompt, PromptEncoder


@runtime_checkable
class Tap(Protocol):
    """Called with each hidden state while it exists; must not keep it.

    ``layer`` 0 is the residual stream after the embedding, ``layer`` l the stream after block l,
    before the final norm.
    """

    def __call__(self, layer: int, hidden: Float[Tensor, "batch token width"]) -> None:
        """Receives the state of one layer."""
        ...


_NOT_COMPARED = ("name", "dtype")


@dataclass(frozen=True)
class Fingerprint:
    """Who a backbone is. Two backbones with the same fingerprint give a probe the same states.

    Attributes:
        name: What the user called it; not compared.
        config: Hash of the architecture's configuration.
        weights: Hash of values sampled from every weight, rounded to bf16, so that the same
            weights in another dtype are the same backbone.
        tokenizer: Hash of the vocabulary and of the ids of a sample text.
        template: Hash of the chat template, or ``raw``.
        layers: Hidden states that a probe reads: embedding output and one per block.
        width: Size of a hidden state.
        dtype: Dtype of the weights; not compared, since verdicts move only within its rounding.
    """

    name: str
    config: str
    weights: str
    tokenizer: str
    template: str
    layers: int
    width: int
    dtype: str

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for all compared fields."""
        return sha256(repr(self._compared()).encode()).hexdigest()[:12]

    def require(self, served: "Fingerprint", *, probe: str) -> None:
        """Checks that ``served`` is the backbone that the probe was trained on.

        Raises:
            FingerprintMismatchError: It is not; both are named, and what differs.
        """
        theirs = served._compared()
        different = [name for name, value in self._compared().items() if value != theirs[name]]
        if different:
            raise FingerprintMismatchError(
                f"Probe '{probe}' was trained on {self.name} (fingerprint {self.digest}), but this "
                f"backbone is {served.name} ({served.digest}); different: {', '.join(different)}. "
                "Train the probe on this model, or serve the other."
            )

    def _compared(self) -> dict[str, str | int]:
        return {name: value for name, value in asdict(self).items() if name not in _NOT_COMPARED}


@runtime_checkable
class Backbone(Protocol):
    """A frozen LLM whose residual stream can be tapped."""

    name: str
    encoder: PromptEncoder
    fingerprint: Fingerprint

    @property
    def can_share_prefixes(self) -> bool:
        """Whether ``run`` takes ``after``."""
        ...

    def tapped(self, tap: Tap) -> AbstractContextManager[None]:
        """Calls ``tap`` with every hidden state of the forward passes run inside the block."""
        ...

    def run(self, prompts: Sequence[EncodedPrompt], *, after: int = 0) -> None:
        """One forward pass over right-padded prompts; the result is what the tap saw.

        Args:
            prompts: The batch.
            after: Tokens that all prompts begin with; they are run once, and not tapped.
        """
        ...
