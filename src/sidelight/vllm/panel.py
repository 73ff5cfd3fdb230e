"""From the columns of a request's tokens to the verdicts of all loaded probes.

Probes that read the prompt alone are judged once. Those that read the response are judged after
every step, from a state that grows by the step's tokens. Knows columns, not where they are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from sidelight.bank import Bank, BankState
from sidelight.errors import VerdictError
from sidelight.probe import Probe
from sidelight.prompts import Reads
from sidelight.standardisation import Projection
from sidelight.types import Verdict

Outcome = dict[str, dict[str, Any]]
"""By probe: the fields of its verdict, or ``error``."""


@dataclass(frozen=True)
class ColumnPanel:
    """The loaded probes, in the order in which their columns stand.

    Attributes:
        early: Of the probes that read the prompt alone.
        late: Of those that read the response.
    """

    early: Bank | None
    late: Bank | None

    @staticmethod
    def of(probes: Sequence[Probe], *, device: torch.device | str = "cpu") -> "ColumnPanel":
        """A panel of these probes."""
        early = [probe for probe in probes if not probe.reads.includes_response]
        late = [probe for probe in probes if probe.reads.includes_response]
        return ColumnPanel(
            Bank(early, device=device) if early else None,
            Bank(late, device=device) if late else None,
        )

    @property
    def probes(self) -> list[Probe]:
        """All of them."""
        return [probe for bank in (self.early, self.late) if bank for probe in bank.probes]

    def projection(self, layers: range) -> Projection | None:
        """From hidden states of some layers to all columns; None without probes."""
        parts = [bank.projection for bank in (self.early, self.late) if bank]
        if not parts:
            return None
        return Projection(
            torch.cat([part.weight[layers.start : layers.stop] for part in parts], 2),
            torch.cat([part.shift[layers.start : layers.stop] for part in parts], 1),
        )

    def judge_prompts(
        self, columns: Float[Tensor, "token layer column"], texts: Sequence[bytes]
    ) -> list[Outcome]:
        """For each text, the verdicts of the probes that read the prompt alone.

        Args:
            columns: Of all tokens, one text after the other.
            texts: What each token belongs to.
        """
        if self.early is None:
            return [{} for _ in texts]
        width = self.early.projection.weight.shape[2]
        return _outcomes(self.early, _summarise(self.early, columns[..., :width], texts))

    def read(
        self,
        columns: Float[Tensor, "token layer column"],
        texts: Sequence[bytes],
        befores: Sequence[BankState | None],
    ) -> BankState | None:
        """What the probes of the response know after some more tokens; None without such probes.

        Args:
            columns: Of all tokens, one text after the other.
            texts: What each token belongs to.
            befores: What they knew of each text; None at its beginning.
        """
        if self.late is None:
            return None
        width = self.late.projection.weight.shape[2]
        state = _summarise(self.late, columns[..., columns.shape[2] - width :], texts)
        going_on = [before for before in befores if before is not None]
        if not going_on:
            return state
        if len(going_on) == len(befores):
            return self.late.merge(BankState.pack(going_on), state)
        pairs = zip(befores, state.split(), strict=True)
        return BankState.pack(
            [new if before is None else self.late.merge(before, new) for before, new in pairs]
        )

    def judge_response(self, state: BankState | None, texts: int) -> list[Outcome]:
        """For each text, the verdicts of the probes that read the response, as far as it goes."""
        if self.late is None or state is None:
            return [{} for _ in range(texts)]
        return _outcomes(self.late, state)


def verdict_of(probe: str, fields: Mapping[str, Any]) -> Verdict | None:
    """The verdict in an outcome; None where the probe gave none."""
    if "error" in fields:
        return None
    return Verdict(
        probe,
        fields["label"],
        tuple(fields["labels"]),
        dict(fields["probabilities"]),
        fields["flagged"],
    )


def _summarise(
    bank: Bank, columns: Float[Tensor, "token layer column"], texts: Sequence[bytes]
) -> BankState:
    parts = np.frombuffer(b"".join(texts), np.uint8)
    masks = {reads: _mask(reads, parts).to(columns.device) for reads in bank.reads}
    lengths = torch.tensor([len(text) for text in texts], device=columns.device)
    return bank.summarise_rows(columns, masks, lengths)


def _mask(reads: Reads, parts: UInt8[np.ndarray, " token"]) -> Bool[Tensor, " token"]:
    return torch.from_numpy(np.isin(parts, [int(part) for part in reads.parts]))


def _outcomes(bank: Bank, state: BankState) -> list[Outcome]:
    rows = zip(*bank.logits(state), strict=True)
    return [
        {probe.name: _fields(probe, own) for probe, own in zip(bank.probes, row, strict=True)}
        for row in rows
    ]


def _fields(probe: Probe, logits: Any) -> dict[str, Any]:
    try:
        verdict = probe.verdict(logits)
    except VerdictError:
        return {"error": "verdict_failed"}
    return {
        "label": verdict.label,
        "labels": list(verdict.labels),
        "probabilities": dict(verdict.probabilities),
        "flagged": verdict.flagged,
    }
