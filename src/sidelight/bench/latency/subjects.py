"""What is measured: anything that answers a batch of prompts with one new token each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import nn

from sidelight.prompts import EncodedPrompt
from sidelight.types import Verdict

Kind = Literal["one pass", "naive", "cascade"]


@dataclass(frozen=True)
class Answer:
    """What a run gave. All of it is on the host, so the work was done when the run returned.

    Attributes:
        tokens: The LLM's next token for each prompt.
        verdicts: For each prompt, what the probes say.
    """

    tokens: tuple[int, ...]
    verdicts: tuple[tuple[Verdict, ...], ...]


@runtime_checkable
class Subject(Protocol):
    """One row of the table."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        ...

    @property
    def kind(self) -> Kind:
        """How it classifies: in the LLM's pass, from states kept by it, or by a second model."""
        ...

    @property
    def weights_bytes(self) -> int:
        """All weights that must be resident to run it."""
        ...

    def accepts(self, batch: Sequence[EncodedPrompt]) -> bool:
        """Whether it can run this batch on a usual machine; if not, the row is left out."""
        ...

    def run(self, batch: Sequence[EncodedPrompt]) -> Answer:
        """Reads the prompts and writes one token for each."""
        ...


def module_bytes(module: nn.Module) -> int:
    """Size of its parameters and buffers; what is tied counts once."""
    parts = [*module.parameters(), *module.buffers()]
    return sum(part.nbytes for part in parts)
