"""Judges requests from the columns of their tokens, all requests of a step together.

Runs where all layers are at hand: in the worker, or, where the layers are spread over pipeline
stages, in the scheduler on the columns that the stages send.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.bank import BankState
from sidelight.vllm_plugin.panel import ColumnPanel, Outcome
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

    def __init__(self, panel: ColumnPanel):
        self.panel = panel
        self._states: dict[str, BankState] = {}

    def judge(
        self, readings: Sequence[Reading], columns: Float[Tensor, "token layer column"]
    ) -> dict[str, Outcome]:
        """The verdicts that the readings change, by request.

        Args:
            readings: Of one step.
            columns: Of their tokens, one reading after the other.
        """
        texts = [reading.parts for reading in readings]
        befores = [self._states.get(r.request_id) if r.start else None for r in readings]
        state = self.panel.read(columns, texts, befores)
        late = self.panel.judge_response(state, len(readings))
        if state is not None:
            self._states.update(zip((r.request_id for r in readings), state.split(), strict=True))
        early = self._judge_prompts(readings, columns)
        return {
            reading.request_id: {**early.get(reading.request_id, {}), **own}
            for reading, own in zip(readings, late, strict=True)
        }

    def join(self, shares: Sequence[Share]) -> Outcome:
        """The verdicts on a reading of which every pipeline stage has a share."""
        in_order = sorted(shares, key=lambda share: share.first_layer)
        reading = in_order[0].reading
        columns = torch.cat([share.columns for share in in_order], 1)
        return self.judge([reading], columns)[reading.request_id]

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drops what is known of requests that have ended."""
        for request_id in request_ids:
            self._states.pop(request_id, None)

    def _judge_prompts(
        self, readings: Sequence[Reading], columns: Float[Tensor, "token layer column"]
    ) -> dict[str, Outcome]:
        """Of the requests whose prompt ends with this step."""
        ending = [reading for reading in readings if reading.ends_prompt]
        if not ending:
            return {}
        if len(ending) < len(readings):
            pieces = columns.split([len(reading.parts) for reading in readings])
            chosen = zip(readings, pieces, strict=True)
            columns = torch.cat([piece for reading, piece in chosen if reading.ends_prompt])
        outcomes = self.panel.judge_prompts(columns, [reading.parts for reading in ending])
        return dict(zip((reading.request_id for reading in ending), outcomes, strict=True))
