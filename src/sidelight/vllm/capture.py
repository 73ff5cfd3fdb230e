"""Hidden states for training: kept by KV slot like columns, and written to files.

The columns of a ``StateStage`` are the hidden states themselves. When vLLM has read a text, each
worker writes the states of its layers to a file, whose name the request says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidelight.bank import Panel
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt, Part, Reads
from sidelight.types import Judgement
from sidelight.vllm.columns import Reading, Stage
from sidelight.vllm.requests import request_params
from sidelight.vllm.settings import KEY, Served
from sidelight.vllm.worker import RequestJudge, Worker

_STATES = "states"


def capture_params(prompt: EncodedPrompt, reads: Reads, path: Path) -> dict[str, Any]:
    """The ``kv_transfer_params`` of a request whose read tokens go to files at this path."""
    parts = (Part.PROMPT if is_read else Part.UNREAD for is_read in prompt.mask(reads).tolist())
    params = request_params(replace(prompt, parts=tuple(parts)))
    return {KEY: {**params[KEY], "path": str(path)}}


def captured(path: Path, layers: int) -> Float[Tensor, "layer token width"]:
    """The states of a text that every worker has written; its files are removed.

    Args:
        path: As for ``capture_params``.
        layers: How many hidden states a token has.

    Raises:
        SidelightError: Some are missing.
    """
    files = sorted(path.parent.glob(f"{path.name}.*"), key=lambda file: int(file.suffix[1:]))
    parts = [load_file(file)[_STATES] for file in files]
    if sum(map(len, parts)) != layers:
        raise SidelightError(
            f"vLLM has run a text, but hidden states are missing in {path.parent}; its log says "
            "why. Name a folder with room that all of its workers see (--set cache=FOLDER), or use "
            "--engine transformers."
        )
    for file in files:
        # What is mapped stays readable.
        file.unlink()
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class StateStage(Stage):
    """Takes the residual stream as it is."""

    @staticmethod
    def of(stage: Stage, width: int) -> "StateStage":
        """One for the passes of another stage."""
        layers, tokens, _ = stage.rows.shape
        rows = stage.rows.new_full((layers, tokens, width), torch.nan, dtype=torch.bfloat16)
        return StateStage(stage.projection, rows)

    def receive(
        self,
        layer: int,
        hidden: Float[Tensor, "token width"],
        residual: Float[Tensor, "token width"] | None = None,
    ) -> None:
        rows = self.rows[layer, : len(hidden)]
        if residual is None:
            rows.copy_(hidden)
        else:
            torch.add(hidden, residual, out=rows)


class StateWriter(RequestJudge):
    """Writes the hidden states of readings where probes would judge them."""

    def __init__(self, first_layer: int):
        super().__init__(Panel([]))
        self._first_layer = first_layer

    def judge(
        self, readings: Sequence[Reading], columns: Float[Tensor, "token layer column"]
    ) -> Mapping[str, Judgement]:
        pieces = columns.split([len(reading.parts) for reading in readings])
        for reading, states in zip(readings, pieces, strict=True):
            is_read = torch.frombuffer(bytearray(reading.parts), dtype=torch.uint8) != Part.UNREAD
            hidden = states[is_read].transpose(0, 1).contiguous()
            save_file({_STATES: hidden}, f"{reading.path}.{self._first_layer}")
        return {reading.request_id: Judgement() for reading in readings}

    def fail(self, readings: Sequence[Reading]) -> dict[str, Judgement]:
        return {reading.request_id: Judgement(failed=(_STATES,)) for reading in readings}


class StateWorker(Worker):
    """Holds the hidden states of one worker process."""

    def __init__(self, served: Served, *, layers: range, tokens: int, device: torch.device):
        super().__init__(served, layers=layers, tokens=tokens, device=device)
        self._stage = StateStage.of(self._stage, served.fingerprint.width)
        self._columns = self._stage.columns
        self._judge = StateWriter(layers.start)
        # Each pipeline stage writes the states of its layers.
        self._is_whole = True

    def _read(self, readings: Sequence[Reading]) -> Float[Tensor, "token layer column"]:
        assert self._pages is not None
        # Layer by layer: those of a long text would take much of a GPU's memory.
        slots = self._pages.slots(readings)
        return torch.stack([rows[slots].cpu() for rows in self._pages.rows.unbind(1)], 1)
