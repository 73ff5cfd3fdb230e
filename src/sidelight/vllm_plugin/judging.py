"""Judges requests from the columns of their tokens.

Runs where all layers are at hand: in the worker, or, where the layers are spread over pipeline
stages, in the scheduler on the columns that the stages send.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.bank import BankState
from sidelight.vllm_plugin.panel import Outcome, Panel
from sidelight.vllm_plugin.tracking import Reading


@dataclass(frozen=True)
class Share:
    """What one pipeline stage knows of a reading.

    Attributes:
        reading: What was read.
        first_layer: The first of the stage's layers.
        columns: Of the stage's layers.
    """

    reading: Reading
    first_layer: int
    columns: Float[Tensor, "token layer column"]


class Judging:
    """Verdicts on readings, and what the probes of the response know of running requests.

    Args:
        panel: The probes.
    """

    def __init__(self, panel: Panel):
        self.panel = panel
        self._states: dict[str, BankState | None] = {}

    def judge(self, reading: Reading, columns: Float[Tensor, "token layer column"]) -> Outcome:
        """The verdicts that the reading changes."""
        before = self._states.get(reading.request_id) if reading.start else None
        state = self.panel.read(columns, reading.parts, before)
        self._states[reading.request_id] = state
        early = self.panel.judge_prompt(columns, reading.parts) if reading.ends_prompt else {}
        return {**early, **self.panel.judge_response(state)}

    def join(self, shares: Sequence[Share]) -> Outcome:
        """The verdicts on a reading of which every pipeline stage has a share."""
        in_order = sorted(shares, key=lambda share: share.first_layer)
        return self.judge(in_order[0].reading, torch.cat([s.columns for s in in_order], 1))

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drops what is known of requests that have ended."""
        for request_id in request_ids:
            self._states.pop(request_id, None)
