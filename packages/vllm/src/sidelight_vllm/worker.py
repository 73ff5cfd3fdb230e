"""What a worker does: it keeps the columns of its layers, and judges if it has all of them.

Judging never holds up a step: the columns are gathered behind the forward pass, in the same stream
of the device, and a thread judges them while the next step runs. If the layers are spread over
pipeline stages, verdicts are made in the scheduler, from the columns that the stages send.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.probes.bank import NUMBERS_AT_ONCE, BankState, Panel
from sidelight.probes.standardisation import Projection
from sidelight.types import Judgement
from sidelight_vllm.columns import Pages, Reading, Stage, receiver, set_receiver
from sidelight_vllm.internals import pass_slots, raise_for_all
from sidelight_vllm.settings import Served, log


@dataclass(frozen=True)
class LayerColumns:
    """One pipeline stage's part of a reading: the columns of its layers."""

    reading: Reading
    first_layer: int
    columns: Float[Tensor, "token layer column"]


@dataclass(frozen=True)
class Loaded:
    """Which probes a worker has, for those who take its verdicts.

    Attributes:
        folders: Where they were loaded from.
        identity: See ``identity_of``; empty: unknown.
        reads_responses: Whether some probe reads the response.
    """

    folders: tuple[str, ...] = ()
    identity: str = ""
    reads_responses: bool = False


@dataclass(frozen=True)
class StepVerdicts:
    """A worker's verdicts for a step.

    Attributes:
        judgements: By request, if the worker has all layers.
        columns: Those of its layers, if it has some of them.
        seconds: What the worker spent on them.
        probes: Those that it has.
    """

    judgements: dict[str, Judgement] = field(default_factory=dict[str, Judgement])
    columns: list[LayerColumns] = field(default_factory=list[LayerColumns])
    seconds: float = 0.0
    probes: Loaded = field(default_factory=Loaded)

    def __or__(self, other: "StepVerdicts") -> "StepVerdicts":
        names = self.judgements | other.judgements
        return StepVerdicts(
            # One of the stages that write hidden states may fail.
            {
                name: self.judgements.get(name, Judgement())
                | other.judgements.get(name, Judgement())
                for name in names
            },
            [*self.columns, *other.columns],
            self.seconds + other.seconds,
            # The stages disagree, so the probes are unknown.
            self.probes if self.probes == other.probes else Loaded(),
        )


class RequestJudge:
    """Judges readings, and keeps what the probes of the response know of running requests.

    Attributes:
        panel: The probes.
        loaded: Which they are.
    """

    def __init__(self, panel: Panel, loaded: Loaded | None = None):
        self.panel, self.loaded = panel, loaded or Loaded()
        self._states: dict[str, BankState | None] = {}
        self._broken: set[str] = set()

    @classmethod
    def load(cls, served: Served, *, device: torch.device | str = "cpu") -> "RequestJudge":
        """One with the probes as they are on disk now.

        Raises:
            SidelightError: One is damaged, two share a name, or one belongs to another model.
        """
        loaded = served.load()
        panel = Panel(loaded.probes, device=device)
        return cls(panel, Loaded(served.folders, loaded.identity, panel.late is not None))

    def judge(
        self, readings: Sequence[Reading], columns: Float[Tensor, "token layer column"]
    ) -> Mapping[str, Judgement]:
        """The verdicts that the readings of a step change, by request."""
        parts = [reading.parts for reading in readings]
        before = [self._states.get(r.request_id) if r.start else None for r in readings]
        states = self.panel.read(columns, parts, before)
        ids = [reading.request_id for reading in readings]
        if self.panel.late:
            self._states.update(zip(ids, states, strict=True))
        late = self.panel.judge_responses(states, [reading.is_plain for reading in readings])
        judgements = dict(zip(ids, late, strict=True))
        ending = [reading for reading in readings if reading.ends_prompt]
        if ending:
            pieces = columns.split([len(reading.parts) for reading in readings])
            chosen = [p for r, p in zip(readings, pieces, strict=True) if r.ends_prompt]
            early = self.panel.judge_prompts(
                torch.cat(chosen),
                [reading.parts for reading in ending],
                [reading.is_plain for reading in ending],
            )
            for reading, judgement in zip(ending, early, strict=True):
                judgements[reading.request_id] = judgement | judgements[reading.request_id]
        return judgements | dict.fromkeys(self._broken.intersection(ids), self._no_verdict)

    def fail(self, readings: Sequence[Reading]) -> dict[str, Judgement]:
        """No probe has a verdict on these requests, now or after later readings."""
        self._broken.update(reading.request_id for reading in readings)
        return {reading.request_id: self._no_verdict for reading in readings}

    @property
    def _no_verdict(self) -> Judgement:
        return Judgement(failed=tuple(probe.name for probe in self.panel.probes))

    def join(self, pieces: Sequence[LayerColumns]) -> Judgement:
        """The verdicts on one reading, from the columns of every pipeline stage."""
        in_order = sorted(pieces, key=lambda piece: piece.first_layer)
        reading = in_order[0].reading
        columns = torch.cat([piece.columns for piece in in_order], 1)
        return self.judge([reading], columns)[reading.request_id]

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drops the state of requests that have ended."""
        for request_id in request_ids:
            self._states.pop(request_id, None)
            self._broken.discard(request_id)


class Worker:
    """Holds the probes of one worker process.

    Args:
        served: The first probes, and how many columns to keep room for.
        layers: The hidden states that this worker computes, from 0 (embedding) to L.
        tokens: Length of the longest forward pass.
        device: Where hidden states are.
    """

    def __init__(self, served: Served, *, layers: range, tokens: int, device: torch.device):
        self._served = served
        self._layers = layers
        self._device = device
        self._attention = ""
        self._pages: Pages | None = None
        # One thread, since the probes of the response follow each request from step to step.
        self._thread = ThreadPoolExecutor(1, "sidelight-judge")
        self._is_blind = False
        self._is_whole = len(layers) == served.fingerprint.layers
        self._stream = None if device.type == "cpu" else torch.Stream(device)
        self._judge = self._checked = RequestJudge.load(served, device=device)
        projection = self._projection(self._judge.panel)
        self._columns = projection.shift.shape[1]
        self._stage = Stage.empty(projection, tokens=tokens, columns=served.columns)
        set_receiver(self)

    def allocate(self, *, blocks: int, block_size: int, attention: str = "") -> None:
        """Makes room for the columns of every KV slot, of which this attention layer has all."""
        self._attention = attention
        self._pages = Pages(self._stage, blocks=blocks, block_size=block_size)

    def check(self, folders: Sequence[str]) -> None:
        """Makes the probes in folders ready for ``load``; those that serve do so as before.

        Raises:
            SidelightError: A probe cannot be served, or there is no room for it.
        """
        served = replace(self._served, folders=tuple(folders))
        checked = RequestJudge.load(served, device=self._device)
        self._stage.require_room(self._projection(checked.panel))
        self._checked = checked

    @torch.inference_mode()
    def load(self, identity: str) -> None:
        """Serves the probes that were checked last, and forgets all columns of the old ones.

        Raises:
            SidelightError: Those have another identity.
        """
        if self._checked.loaded.identity != identity:
            raise SidelightError("These probes were not checked before they were loaded.")
        projection = self._projection(self._checked.panel)
        # Wait for pending verdicts of the old probes.
        self._thread.submit(int).result()
        self._stage.load(projection)
        if self._pages is not None:
            self._pages.clear()
        self._columns = projection.shift.shape[1]
        self._judge = self._checked

    @property
    def bytes_per_token(self) -> int:
        """Memory of a token's columns."""
        return self._stage.rows[:, 0].nbytes

    def receive(self, layer: int, stream: Float[Tensor, "token width"]) -> None:
        if self._stage.columns:
            self._stage.receive(layer, stream)

    def end_pass(self, tokens: int) -> None:
        """Moves the columns of a forward pass to the KV slots of its tokens."""
        # There are no pages yet while vLLM profiles its memory.
        if self._pages is None or (slots := pass_slots(self._attention)) is None:
            return
        if len(slots) != tokens:
            raise SidelightError(
                f"The layers of this model give {tokens} states for {len(slots)} tokens, so "
                "Sidelight cannot tell them apart. Serve it without sequence parallelism, or with "
                "the transformers engine."
            )
        self._pages.keep(slots)

    def judge(self, readings: Sequence[Reading]) -> Future[StepVerdicts]:
        """The verdicts on readings, or their columns if this worker lacks some layers.

        To be called after each forward pass, also if there is nothing to read. Reads no value of
        the device and waits for nothing; the future does.
        """
        assert self._pages is not None
        has_kept = self._pages.has_kept()
        pieces = [(group, self._read(group)) for group in self._in_turn(readings)]
        columns = [has_kept, *(gathered for _, gathered in pieces)]
        ready: torch.Event | None = None
        if self._stream is not None:
            ready = torch.Event(self._device)
            ready.record(torch.accelerator.current_stream(self._device))
            for gathered in filter(lambda tensor: tensor.device.type != "cpu", columns):
                gathered.record_stream(self._stream)
        return self._thread.submit(self._step_verdicts, pieces, has_kept, ready)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drops what is known of requests that have ended, once it is judged."""
        self._thread.submit(self._judge.forget, tuple(request_ids))

    @torch.inference_mode()
    def _step_verdicts(
        self,
        pieces: Sequence[tuple[Sequence[Reading], Float[Tensor, "token layer column"]]],
        has_kept: Bool[Tensor, ""],
        ready: torch.Event | None,
    ) -> StepVerdicts:
        start = time.perf_counter()
        judgements: dict[str, Judgement] = {}
        of_layers: list[LayerColumns] = []
        with self._stream or nullcontext():
            if self._stream is not None and ready is not None:
                self._stream.wait_event(ready)
            if not self._is_blind and not has_kept.item():
                self._is_blind = True
                log.error(
                    "vLLM ran a forward pass whose columns were not kept, so no probe gives a "
                    "verdict from now on. Restart the engine."
                )
            for readings, columns in pieces:
                if self._is_blind:
                    # Some slots have the columns of tokens that were there before.
                    columns.fill_(torch.nan)
                if self._is_whole:
                    judgements.update(self._judged(readings, columns))
                else:
                    split = columns.cpu().split([len(reading.parts) for reading in readings])
                    first = self._layers.start
                    of_layers += [
                        LayerColumns(reading, first, part)
                        for reading, part in zip(readings, split, strict=True)
                    ]
        seconds = time.perf_counter() - start
        return StepVerdicts(judgements, of_layers, seconds, self._judge.loaded)

    def _judged(
        self, readings: Sequence[Reading], columns: Float[Tensor, "token layer column"]
    ) -> Mapping[str, Judgement]:
        try:
            return self._judge.judge(readings, columns)
        # An error in this thread would leave vLLM waiting for the step's output.
        except Exception:  # noqa: BLE001
            log.exception("Judging failed, so %d requests have no verdict.", len(readings))
            return self._judge.fail(readings)

    def _in_turn(self, readings: Sequence[Reading]) -> list[list[Reading]]:
        """Groups of readings with few columns together, each of at least one reading."""
        per_token, tokens = self._stage.rows[:, 0].numel(), 0
        groups: list[list[Reading]] = []
        for reading in readings:
            tokens += len(reading.parts)
            if not groups or tokens * per_token > NUMBERS_AT_ONCE:
                groups.append([])
                tokens = len(reading.parts)
            groups[-1].append(reading)
        return groups

    def _read(self, readings: Sequence[Reading]) -> Float[Tensor, "token layer column"]:
        assert self._pages is not None
        return self._pages.read(readings)[..., : self._columns]

    def _projection(self, panel: Panel) -> Projection:
        """The columns of these probes from the layers of this worker."""
        whole = panel.projection
        if whole is None:
            layers, width = len(self._layers), self._served.fingerprint.width
            nothing = torch.zeros(layers, width, 0, device=self._device)
            return Projection(nothing, nothing[:, 0])
        local = slice(self._layers.start, self._layers.stop)
        return Projection(whole.weight[local], whole.shift[local], whole.is_normalised)


def current_worker() -> Worker:
    """The worker of this process.

    Raises:
        SidelightError: The model was loaded in a way that the plugin does not see.
    """
    worker = receiver()
    if not isinstance(worker, Worker):
        raise SidelightError(
            "This model loader does not tap the model, so no probe would run. Use vLLM's default "
            "--load-format."
        )
    return worker


class WorkerExtension:
    """Methods that vLLM adds to its workers (``worker_extension_cls``), for ``collective_rpc``.

    An error of any worker in any data-parallel rank reaches the caller, as an ``Exception``.
    """

    def sidelight_check(self, folders: list[str]) -> None:
        """See ``Worker.check``."""
        refusal = ""
        try:
            current_worker().check(folders)
        except Exception as error:  # noqa: BLE001 - it is raised when all workers have ended
            refusal = str(error) or type(error).__name__
        raise_for_all(refusal)

    def sidelight_load(self, identity: str) -> None:
        """See ``Worker.load``; to be called while nothing runs."""
        current_worker().load(identity)

    def sidelight_bytes_per_token(self) -> int:
        """Memory of a token's columns in this worker."""
        return current_worker().bytes_per_token
