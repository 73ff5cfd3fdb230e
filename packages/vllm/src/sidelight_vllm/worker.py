"""The worker's part: it stores the projections of its layers, and classifies if it has all layers.

Classification never delays a step: the projections are gathered after the forward pass, in the same
device stream, and a thread classifies them while the next step runs. If the layers are spread over
pipeline stages, the scheduler computes the verdicts from the projections of all stages.
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
from sidelight.probes.bank import NUMBERS_AT_ONCE, BankState, ProbeBanks
from sidelight.probes.standardisation import Projection
from sidelight.types import Verdicts
from sidelight_vllm.internals import pass_slots, raise_for_all
from sidelight_vllm.settings import Served, log
from sidelight_vllm.slots import GatherPlan, SlotStore, StagingBuffer, receiver, set_receiver


@dataclass(frozen=True)
class LayerProjections:
    """One pipeline stage's part of a reading: the projections of its layers."""

    plan: GatherPlan
    first_layer: int
    projections: Float[Tensor, "token layer projection"]


@dataclass(frozen=True)
class Loaded:
    """The probes of a worker, for the receivers of its verdicts.

    Attributes:
        folders: Folders that they were loaded from.
        revision: See ``revision_of``; "" if unknown.
        reads_responses: Whether a probe reads the response.
    """

    folders: tuple[str, ...] = ()
    revision: str = ""
    reads_responses: bool = False


@dataclass(frozen=True)
class StepVerdicts:
    """A worker's verdicts for a step.

    Attributes:
        by_request: Verdicts by request, if the worker has all layers.
        projections: Projections of the worker's layers, if it has only some of them.
        seconds: Time spent on this step, in seconds.
        probes: The worker's probes.
    """

    by_request: dict[str, Verdicts] = field(default_factory=dict[str, Verdicts])
    projections: list[LayerProjections] = field(default_factory=list[LayerProjections])
    seconds: float = 0.0
    probes: Loaded = field(default_factory=Loaded)

    def __or__(self, newer: "StepVerdicts") -> "StepVerdicts":
        names = self.by_request | newer.by_request
        return StepVerdicts(
            # A stage that writes hidden states may fail.
            {
                name: self.by_request.get(name, Verdicts()) | newer.by_request.get(name, Verdicts())
                for name in names
            },
            [*self.projections, *newer.projections],
            self.seconds + newer.seconds,
            # The stages disagree, so the probes are unknown.
            self.probes if self.probes == newer.probes else Loaded(),
        )


class RequestClassifier:
    """Classifies readings, and stores the state of response probes for running requests.

    Attributes:
        banks: The probes.
        loaded: Their description.
    """

    def __init__(self, banks: ProbeBanks, loaded: Loaded | None = None):
        self.banks, self.loaded = banks, loaded or Loaded()
        self._states: dict[str, BankState | None] = {}
        self._broken: set[str] = set()

    @classmethod
    def load(cls, served: Served, *, device: torch.device | str = "cpu") -> "RequestClassifier":
        """Load the probes from disk.

        Raises:
            SidelightError: A probe is damaged, two share a name, or one belongs to another model.
        """
        loaded = served.load()
        banks = ProbeBanks(loaded.probes, device=device)
        return cls(
            banks, Loaded(served.folders, loaded.revision, banks.response_probes is not None)
        )

    def classify(
        self, plans: Sequence[GatherPlan], projections: Float[Tensor, "token layer projection"]
    ) -> Mapping[str, Verdicts]:
        """The new verdicts from the readings of a step, by request."""
        token_roles = [plan.token_roles for plan in plans]
        before = [self._states.get(r.request_id) if r.start else None for r in plans]
        states = self.banks.read(projections, token_roles, before)
        ids = [plan.request_id for plan in plans]
        if self.banks.response_probes:
            self._states.update(zip(ids, states, strict=True))
        response_verdicts = self.banks.classify_responses(states, plans)
        by_request = dict(zip(ids, response_verdicts, strict=True))
        ending = [plan for plan in plans if plan.ends_prompt]
        if ending:
            shares = projections.split([len(plan.token_roles) for plan in plans])
            chosen = [p for r, p in zip(plans, shares, strict=True) if r.ends_prompt]
            prompt_verdicts = self.banks.classify_prompts(torch.cat(chosen), ending)
            for plan, request_verdicts in zip(ending, prompt_verdicts, strict=True):
                by_request[plan.request_id] = request_verdicts | by_request[plan.request_id]
        return by_request | dict.fromkeys(self._broken.intersection(ids), self._no_verdict)

    def fail(self, plans: Sequence[GatherPlan]) -> dict[str, Verdicts]:
        """Mark these requests as failed for all probes, including after later readings."""
        self._broken.update(plan.request_id for plan in plans)
        return {plan.request_id: self._no_verdict for plan in plans}

    @property
    def _no_verdict(self) -> Verdicts:
        return Verdicts(failed=tuple(probe.name for probe in self.banks.probes))

    def join(self, shares: Sequence[LayerProjections]) -> Verdicts:
        """The verdicts on one reading, from the projections of every pipeline stage."""
        in_order = sorted(shares, key=lambda share: share.first_layer)
        plan = in_order[0].plan
        projections = torch.cat([share.projections for share in in_order], 1)
        return self.classify([plan], projections)[plan.request_id]

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop the state of requests that have ended."""
        for request_id in request_ids:
            self._states.pop(request_id, None)
            self._broken.discard(request_id)


class Worker:
    """Holds the probes of one worker process.

    Args:
        served: The first probes, and the number of projections to keep room for.
        layers: Indices of the hidden states that this worker computes, from 0 (embedding) to L.
        tokens: Length of the longest forward pass.
        device: Device of the hidden states.
    """

    def __init__(self, served: Served, *, layers: range, tokens: int, device: torch.device):
        self._served = served
        self._layers = layers
        self._device = device
        self._attention = ""
        self._store: SlotStore | None = None
        # A single thread, because response probes follow each request from step to step.
        self._thread = ThreadPoolExecutor(1, "sidelight-judge")
        self._is_blind = False
        self._has_all_layers = len(layers) == served.fingerprint.layers
        self._stream = None if device.type == "cpu" else torch.Stream(device)
        self._classifier = self._checked = RequestClassifier.load(served, device=device)
        projection = self._projection(self._classifier.banks)
        self._width = projection.shift.shape[1]
        self._staging = StagingBuffer.empty(projection, tokens=tokens, width=served.projections)
        set_receiver(self)

    def allocate(self, *, blocks: int, block_size: int, attention: str = "") -> None:
        """Allocate the projections of every KV slot, all of which this attention layer uses."""
        self._attention = attention
        self._store = SlotStore(self._staging, blocks=blocks, block_size=block_size)

    def check(self, folders: Sequence[str]) -> None:
        """Prepare the probes in folders for ``load`` without affecting the served ones.

        Raises:
            SidelightError: A probe cannot be served, or there is no room for it.
        """
        served = replace(self._served, folders=tuple(folders))
        checked = RequestClassifier.load(served, device=self._device)
        self._staging.require_room(self._projection(checked.banks))
        self._checked = checked

    @torch.inference_mode()
    def load(self, revision: str) -> None:
        """Serve the latest checked probes, and drop all projections of the old ones.

        Raises:
            SidelightError: The checked probes have another revision.
        """
        if self._checked.loaded.revision != revision:
            raise SidelightError(
                "These probes were not checked before loading. Replace them again."
            )
        projection = self._projection(self._checked.banks)
        # Wait for pending verdicts of the old probes.
        self._thread.submit(int).result()
        self._staging.load(projection)
        if self._store is not None:
            self._store.clear()
        self._width = projection.shift.shape[1]
        self._classifier = self._checked

    @property
    def bytes_per_token(self) -> int:
        """Memory of a token's projections in bytes."""
        return self._staging.rows[:, 0].nbytes

    def receive(self, layer: int, stream: Float[Tensor, "token width"]) -> None:
        if self._staging.projections:
            self._staging.receive(layer, stream)

    def end_pass(self, tokens: int) -> None:
        """Move the projections of a forward pass to the KV slots of its tokens."""
        # There is no store yet while vLLM profiles its memory.
        if self._store is None or (slots := pass_slots(self._attention)) is None:
            return
        if len(slots) != tokens:
            raise SidelightError(
                f"The layers of this model return {tokens} hidden states for {len(slots)} "
                "tokens, so Sidelight cannot assign them. Serve it without sequence parallelism, "
                "or with the transformers engine."
            )
        self._store.keep(slots)

    def classify(self, plans: Sequence[GatherPlan]) -> Future[StepVerdicts]:
        """Compute the verdicts on gather plans, or their projections if this worker lacks some
        layers.

        Must be called after each forward pass, even if there is nothing to read. It does not
        synchronise with the device; the future does.
        """
        assert self._store is not None
        is_stored = self._store.is_stored()
        groups = [(group, self._read(group)) for group in self._in_turn(plans)]
        tensors = [is_stored, *(gathered for _, gathered in groups)]
        ready: torch.Event | None = None
        if self._stream is not None:
            ready = torch.Event(self._device)
            ready.record(torch.accelerator.current_stream(self._device))
            for gathered in filter(lambda tensor: tensor.device.type != "cpu", tensors):
                gathered.record_stream(self._stream)
        return self._thread.submit(self._step_verdicts, groups, is_stored, ready)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop the state of ended requests, once it has been used."""
        self._thread.submit(self._classifier.forget, tuple(request_ids))

    @torch.inference_mode()
    def _step_verdicts(
        self,
        groups: Sequence[tuple[Sequence[GatherPlan], Float[Tensor, "token layer projection"]]],
        is_stored: Bool[Tensor, ""],
        ready: torch.Event | None,
    ) -> StepVerdicts:
        start = time.perf_counter()
        by_request: dict[str, Verdicts] = {}
        of_layers: list[LayerProjections] = []
        with self._stream or nullcontext():
            if self._stream is not None and ready is not None:
                self._stream.wait_event(ready)
            if not self._is_blind and not is_stored.item():
                self._is_blind = True
                log.error(
                    "vLLM ran a forward pass whose columns were not kept, so no probe gives a "
                    "verdict from now on. Restart the engine."
                )
            for plans, projections in groups:
                if self._is_blind:
                    # Some slots still have the projections of earlier tokens.
                    projections.fill_(torch.nan)
                if self._has_all_layers:
                    by_request.update(self._verdicts(plans, projections))
                else:
                    split = projections.cpu().split([len(plan.token_roles) for plan in plans])
                    first = self._layers.start
                    of_layers += [
                        LayerProjections(plan, first, share)
                        for plan, share in zip(plans, split, strict=True)
                    ]
        seconds = time.perf_counter() - start
        return StepVerdicts(by_request, of_layers, seconds, self._classifier.loaded)

    def _verdicts(
        self, plans: Sequence[GatherPlan], projections: Float[Tensor, "token layer projection"]
    ) -> Mapping[str, Verdicts]:
        try:
            return self._classifier.classify(plans, projections)
        # After an error in this thread, vLLM would wait for the step's output.
        except Exception:  # noqa: BLE001
            log.exception("Classification failed, so %d requests have no verdict.", len(plans))
            return self._classifier.fail(plans)

    def _in_turn(self, plans: Sequence[GatherPlan]) -> list[list[GatherPlan]]:
        """Groups of one or more readings with a limited number of projections."""
        per_token, tokens = self._staging.rows[:, 0].numel(), 0
        groups: list[list[GatherPlan]] = []
        for plan in plans:
            tokens += len(plan.token_roles)
            if not groups or tokens * per_token > NUMBERS_AT_ONCE:
                groups.append([])
                tokens = len(plan.token_roles)
            groups[-1].append(plan)
        return groups

    def _read(self, plans: Sequence[GatherPlan]) -> Float[Tensor, "token layer projection"]:
        assert self._store is not None
        return self._store.read(plans)[..., : self._width]

    def _projection(self, banks: ProbeBanks) -> Projection:
        """The projection of these probes from the layers of this worker."""
        projection = banks.projection
        if projection is None:
            layers, width = len(self._layers), self._served.fingerprint.width
            nothing = torch.zeros(layers, width, 0, device=self._device)
            return Projection(nothing, nothing[:, 0])
        local = slice(self._layers.start, self._layers.stop)
        return Projection(
            projection.weight[local], projection.shift[local], projection.is_normalised
        )


def current_worker() -> Worker:
    """The worker of this process.

    Raises:
        SidelightError: The model was loaded in a way that bypasses the plugin.
    """
    worker = receiver()
    if not isinstance(worker, Worker):
        raise SidelightError(
            "This model loader bypasses the tap of the hidden states, so no probe would run. Use "
            "vLLM's default --load-format."
        )
    return worker


class WorkerExtension:
    """Methods that vLLM adds to its workers (``worker_extension_cls``), for ``collective_rpc``.

    An error of any worker in any data-parallel rank reaches the caller as an ``Exception``.
    """

    def sidelight_check(self, folders: list[str]) -> None:
        """See ``Worker.check``."""
        refusal = ""
        try:
            current_worker().check(folders)
        except Exception as error:  # noqa: BLE001 - it is raised when all workers have ended
            refusal = str(error) or type(error).__name__
        raise_for_all(refusal)

    def sidelight_load(self, revision: str) -> None:
        """See ``Worker.load``; must be called while nothing runs."""
        current_worker().load(revision)

    def sidelight_bytes_per_token(self) -> int:
        """Memory of a token's projections in this worker, in bytes."""
        return current_worker().bytes_per_token
