"""The probes' columns of every token, kept by KV slot, and which requests to read after a step.

A forward pass fills a staging buffer, layer by layer; at its end, the rows move to the slots of
their tokens. A slot holds the keys and values of one token, and here its columns. Whoever shares
the slot, or computes it again, shares or replaces both. So chunked prefill, batching, preemption
and shared prefixes need no bookkeeping.

``Tracking`` is the scheduler's side. A request is read whole when its prompt ends, no matter which
part was computed earlier or by another request, and again from the start after a preemption.

Stage, pages and weights never move, and nothing depends on a tensor's values, so that
``Stage.receive`` and ``Pages.keep`` can be part of a captured CUDA graph (not yet tried on a GPU).
A graph holds their addresses: other probes are copied into them, as far as there is room.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt, Part
from sidelight.standardisation import Projection, project
from sidelight.types import Judgement
from sidelight.vllm.settings import COLUMNS, KEY, described_prompt, report_of


@dataclass(frozen=True)
class Stage:
    """Where one forward pass leaves its columns. The last ones may be those of no probe.

    Attributes:
        projection: From the hidden states of the local layers to columns, in float32: a bf16 result
            would lose what standardisation subtracts.
        rows: NaN where nothing was written, so that a layer that is not tapped gives a failed
            verdict, not a wrong one.
    """

    projection: Projection
    rows: Float[Tensor, "layer token column"]

    @staticmethod
    def empty(projection: Projection, *, tokens: int, columns: int = 0) -> "Stage":
        """A stage for passes over at most ``tokens`` tokens.

        Args:
            projection: To the columns of the first probes.
            tokens: The longest pass.
            columns: How many to keep room for, also of states that are normalised; 0: for these.
        """
        has_flags = columns > 0 or projection.is_normalised is not None
        columns = max(columns, projection.shift.shape[1])
        rows = projection.weight.new_full((len(projection.weight), tokens, columns), torch.nan)
        padded = projection.padded(columns, has_flags=has_flags)
        # With a column's numbers side by side, a matmul of few columns takes a quarter of the time.
        weight = padded.weight.mT.contiguous().mT.clone()
        flags = None if padded.is_normalised is None else padded.is_normalised.clone()
        return Stage(Projection(weight, padded.shift.clone(), flags), rows)

    def load(self, projection: Projection) -> None:
        """Projects to these columns from now on.

        Raises:
            SidelightError: There is no room for them. Nothing has changed.
        """
        columns, needed = self.columns, projection.shift.shape[1]
        has_flags = self.projection.is_normalised is not None
        lacks_flags = projection.is_normalised is not None and not has_flags
        if needed > columns or lacks_flags:
            why = (
                "read states of another norm than the first ones"
                if lacks_flags
                else f"need {needed} columns of a layer, and there is room for {columns}"
            )
            raise SidelightError(
                f"The probes {why}. Start vLLM with {COLUMNS}={max(needed, columns)}, which keeps "
                "room for both."
            )
        padded = projection.padded(columns, has_flags=has_flags)
        self.projection.weight.copy_(padded.weight)
        self.projection.shift.copy_(padded.shift)
        if self.projection.is_normalised is not None and padded.is_normalised is not None:
            self.projection.is_normalised.copy_(padded.is_normalised)

    def receive(
        self,
        layer: int,
        hidden: Float[Tensor, "token width"],
        residual: Float[Tensor, "token width"] | None = None,
    ) -> None:
        stream = hidden if residual is None else hidden + residual
        rows, weight, shift = (of[layer] for of in self._layers)
        flags = self.projection.is_normalised
        project(weight, shift, flags, stream.float(), out=rows[: len(hidden)])

    @cached_property
    def columns(self) -> int:
        """How many a layer has room for."""
        return self.rows.shape[2]

    # The views are made once: a pass asks for every layer, and it may have a single token.
    @cached_property
    def _layers(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        weight, shift = self.projection.weight, self.projection.shift
        return self.rows.unbind(), weight.unbind(), shift.unbind()


@dataclass(frozen=True)
class Step:
    """One request's share of a forward pass.

    Attributes:
        computed: Tokens of the request that have keys and values after the pass.
        is_resumed: Whether it begins with this pass, or comes back from preemption.
        blocks: Its block table.
    """

    request_id: str
    computed: int
    is_resumed: bool
    blocks: Sequence[int]


@dataclass(frozen=True)
class Reading:
    """What a worker reads of a request after a pass.

    Attributes:
        blocks: The request's block table.
        start: The first token to read; 0 starts over.
        parts: The ``Part`` of each token from ``start`` on.
        ends_prompt: Whether the prompt is complete for the first time.
        is_plain: Whether the prompt is plain text.
    """

    request_id: str
    blocks: tuple[int, ...]
    start: int
    parts: bytes
    ends_prompt: bool
    is_plain: bool


def slots_of(
    blocks: Sequence[int], tokens: Int[np.ndarray, " token"], block_size: int
) -> Int[np.ndarray, " token"]:
    """The KV slots of these tokens of a request with this block table."""
    table = np.asarray(blocks, dtype=np.int64)
    return table[tokens // block_size] * block_size + tokens % block_size


class Pages:
    """Columns by KV slot.

    Args:
        stage: What moves here after each pass.
        blocks: The engine's KV blocks.
        block_size: Slots in a block.
    """

    def __init__(self, stage: Stage, *, blocks: int, block_size: int):
        self.stage = stage
        self._block_size = block_size
        layers, _, columns = stage.rows.shape
        # The last row takes vLLM's padding (slot -1).
        self._rows = stage.rows.new_full((blocks * block_size + 1, layers, columns), torch.nan)
        self._has_kept = torch.zeros((), dtype=torch.bool, device=stage.rows.device)

    @property
    def size_bytes(self) -> int:
        """Memory of the columns of all slots and of the staging buffer."""
        return sum(t.numel() * t.element_size() for t in (self._rows, self.stage.rows))

    @property
    def numbers_per_token(self) -> int:
        """Columns of a token, over all layers."""
        return self._rows[0].numel()

    def keep(self, slots: Int[Tensor, " token"]) -> None:
        """Moves the staged rows of a pass to the slots of its tokens."""
        staged = self.stage.rows[:, : len(slots)]
        slots = torch.where(slots < 0, len(self._rows) - 1, slots)
        self._rows.index_copy_(0, slots.long(), staged.transpose(0, 1))
        staged.fill_(torch.nan)
        self._has_kept.fill_(True)

    def clear(self) -> None:
        """Forgets all rows: whoever reads one that was kept before has no verdict."""
        self._rows.fill_(torch.nan)

    def has_kept(self) -> Bool[Tensor, ""]:
        """Whether rows were moved since this was asked last; on the device, so nothing waits."""
        has_kept = self._has_kept.clone()
        self._has_kept.fill_(False)
        return has_kept

    def read(self, readings: Sequence[Reading]) -> Float[Tensor, "token layer column"]:
        """The columns of the readings' tokens, one reading after the other, with spare ones."""
        slots = np.concatenate(
            [
                slots_of(r.blocks, np.arange(r.start, r.start + len(r.parts)), self._block_size)
                for r in readings
            ]
        )
        index, device = torch.from_numpy(slots), self._rows.device
        if device.type == "cuda":
            # Only memory that stays where it is can be copied without waiting.
            index = index.pin_memory().to(device, non_blocking=True)
        return self._rows[index]


@dataclass
class _Tracked:
    parts: bytes = b""
    is_plain: bool = False
    error: str = ""
    adapter: str = ""
    read: int = 0
    is_planned: bool = False
    is_judged: bool = False
    seconds: float = 0.0
    judgement: Judgement = field(default_factory=Judgement)
    identity: str = ""


class Tracking:
    """Follows every request from its arrival to its end.

    Args:
        prompt_of: Gives the prompt, from a request's ``kv_transfer_params`` and token ids.

    Attributes:
        reads_responses: Whether some probe reads the response.
    """

    def __init__(
        self,
        *,
        reads_responses: bool,
        prompt_of: Callable[
            [Mapping[str, Any] | None, Sequence[int] | None], EncodedPrompt
        ] = described_prompt,
    ):
        self.reads_responses = reads_responses
        self._prompt_of = prompt_of
        self._requests: dict[str, _Tracked] = {}

    def enter(
        self,
        request_id: str,
        params: Mapping[str, Any] | None,
        token_ids: Sequence[int] | None,
        *,
        adapter: str = "",
    ) -> None:
        """Notes a new request. One whose tokens are not known gets an error.

        Args:
            request_id: vLLM's name for it.
            params: Its ``kv_transfer_params``.
            token_ids: Its prompt; None if that is not text alone.
            adapter: The LoRA adapter that it runs with, if any.
        """
        tracked = self._requests[request_id] = _Tracked(adapter=adapter)
        try:
            prompt = self._prompt_of(params, token_ids)
            tracked.parts, tracked.is_plain = bytes(prompt.parts), prompt.is_plain
        # Ids that the tokenizer does not take must not end the scheduler.
        except (SidelightError, OverflowError, TypeError, ValueError) as error:
            tracked.error = str(error)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def leave(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def plan(self, steps: Iterable[Step]) -> list[Reading]:
        """What to read after a pass with these steps."""
        readings = (self._read(step) for step in steps)
        return [reading for reading in readings if reading is not None]

    def record(
        self, request_id: str, judgement: Judgement, seconds: float = 0.0, identity: str = ""
    ) -> None:
        """Adds verdicts and the seconds of the step, unless the request has ended.

        Args:
            request_id: vLLM's name for it.
            judgement: The verdicts.
            seconds: Those of the step.
            identity: That of the probes which judged.
        """
        tracked = self._requests.get(request_id)
        if tracked is not None:
            tracked.is_judged = True
            tracked.seconds += seconds
            tracked.judgement |= judgement
            tracked.identity = identity

    def report(self, request_id: str) -> dict[str, Any] | None:
        """What goes on an output of the request; None if it is not tracked."""
        tracked = self._requests.get(request_id)
        if tracked is None:
            return None
        if not tracked.is_judged:
            return {KEY: {"error": tracked.error or "The request was not judged."}}
        report = report_of(tracked.judgement, tracked.seconds, tracked.identity)
        # Its probes were trained on the model without it.
        return {KEY: {**report, "adapter": tracked.adapter} if tracked.adapter else report}

    def _read(self, step: Step) -> Reading | None:
        tracked = self._requests.get(step.request_id)
        if tracked is None or tracked.error:
            return None
        if step.is_resumed:
            tracked.read = 0
        if step.computed < len(tracked.parts):
            return None
        # Not "is judged": the next step may be planned before this one has run.
        ends_prompt = not tracked.is_planned
        if not ends_prompt and not self.reads_responses:
            return None
        start = 0 if ends_prompt else tracked.read
        written = max(0, step.computed - max(start, len(tracked.parts)))
        tracked.read, tracked.is_planned = step.computed, True
        return Reading(
            request_id=step.request_id,
            blocks=tuple(step.blocks),
            start=start,
            parts=tracked.parts[start:] + bytes([Part.RESPONSE]) * written,
            ends_prompt=ends_prompt,
            is_plain=tracked.is_plain,
        )
