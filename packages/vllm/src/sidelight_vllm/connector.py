"""The data that travels with each of vLLM's steps: gather plans to the workers, verdicts back.

A KV connector is vLLM's documented way to send a message with a step and with its result. The class
has two roles: next to the scheduler, it plans what a step must return, and in a worker, it acts
after the step. Ours neither loads nor stores keys and values. vLLM passes a connector's results on
only after it has created the step's outputs, when a request that ends in that step is gone. Our
schedulers therefore pass the results earlier, and attach the verdicts to the outputs.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from collections import defaultdict
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from sidelight.errors import SidelightError
from sidelight_vllm.internals import end_with_parent, full_group, steps_of
from sidelight_vllm.requests import Tracking
from sidelight_vllm.settings import Served, log, prompt_encoder
from sidelight_vllm.slots import GatherPlan
from sidelight_vllm.worker import (
    LayerProjections,
    Loaded,
    RequestClassifier,
    StepVerdicts,
    current_worker,
)


@dataclass
class StepPlan(KVConnectorMetadata):
    """The gather plans of the workers after a step.

    Attributes:
        has_pass: Whether the step runs any token.
    """

    plans: list[GatherPlan] = field(default_factory=list[GatherPlan])
    has_pass: bool = True


class WorkerResults(KVConnectorWorkerMetadata):
    """A worker's verdicts for a step, as a future.

    vLLM sends it to the scheduler with the step's output, in a thread that may wait.
    """

    def __init__(self, work: "Future[StepVerdicts] | StepVerdicts"):
        self._work = work

    @property
    def verdicts(self) -> StepVerdicts:
        return self._work.result() if isinstance(self._work, Future) else self._work

    def aggregate(self, results: "WorkerResults") -> "WorkerResults":
        return WorkerResults(self.verdicts | results.verdicts)

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkerResults, (self.verdicts,)


class ProbeConnector(KVConnectorBase_V1, SupportsHMA):
    """One per scheduler and one per worker.

    Raises:
        SidelightError: No single block table locates all keys and values of a request.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._index = full_group(kv_cache_config)
        self._group = kv_cache_config.kv_cache_groups[self._index]
        self._blocks = kv_cache_config.num_blocks
        if role == KVConnectorRole.SCHEDULER:
            end_with_parent()
            served = Served.of(vllm_config)
            assert served is not None
            self._served, self._classifier = served, RequestClassifier.load(served)
            recognise = None
            if not served.is_annotated:
                recognise = prompt_encoder(vllm_config, self._classifier.banks.probes).recognise
            self.tracking = Tracking(
                reads_responses=self._classifier.loaded.reads_responses, recognise=recognise
            )

    # The scheduler's side.

    def on_new_request(self, request: Any) -> None:
        # Tokens of images or embeddings have no meaning.
        is_text = not request.mm_features and request.prompt_embeds is None
        token_ids = request.prompt_token_ids if is_text else None
        adapter = request.lora_request.lora_name if request.lora_request else ""
        self.tracking.enter(
            request.request_id, request.kv_transfer_params, token_ids, adapter=adapter
        )

    def build_connector_meta(self, scheduler_output: Any) -> StepPlan:
        plans = self.tracking.plan(steps_of(scheduler_output, self._index))
        return StepPlan(plans, scheduler_output.total_num_scheduled_tokens > 0)

    def take(self, results: WorkerResults | None) -> None:
        """Take the verdicts of a step before vLLM creates its outputs; leave nothing to vLLM."""
        if results is None:
            return
        verdicts = results.verdicts
        self.tracking.reads_responses = verdicts.probes.reads_responses
        by_request = {**verdicts.by_request}
        shares: dict[str, list[LayerProjections]] = defaultdict(list)
        for share in verdicts.projections:
            shares[share.plan.request_id].append(share)
        follows = not shares or self._follows(verdicts.probes)
        for request_id, layers in shares.items():
            # A step that ran past its request's end would leave a state behind.
            if request_id not in self.tracking:
                continue
            # Stages may have probes that cannot be loaded here, or each may have others.
            if follows:
                by_request[request_id] = self._classifier.join(layers)
            else:
                by_request |= self._classifier.fail([layers[0].plan])
        for request_id, request_verdicts in by_request.items():
            self.tracking.record(
                request_id, request_verdicts, verdicts.seconds, verdicts.probes.revision
            )

    def _follows(self, loaded: Loaded) -> bool:
        """Whether the probes here match those of the workers; loads the workers' probes if not."""
        if loaded.revision not in ("", self._classifier.loaded.revision):
            try:
                self._classifier = RequestClassifier.load(
                    replace(self._served, folders=loaded.folders)
                )
            # An error here would end the engine.
            except (SidelightError, OSError):
                log.exception("The scheduler cannot load the probes of its workers.")
                return False
        return loaded.revision == self._classifier.loaded.revision

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Return the report for the request's last output."""
        report = self.tracking.report(request.request_id)
        self.tracking.leave(request.request_id)
        self._classifier.forget([request.request_id])
        return False, report

    # The worker's side.

    def register_kv_caches(self, kv_caches: Any) -> None:
        worker = current_worker()
        caches = (c if isinstance(c, list | tuple) else [c] for c in kv_caches.values())
        memory = [cache.untyped_storage() for cache in chain.from_iterable(caches)]
        # Layers of several groups share it.
        total = sum({cache.data_ptr(): cache.nbytes() for cache in memory}.values())
        block_size = self._group.kv_cache_spec.block_size
        worker.allocate(
            blocks=self._blocks, block_size=block_size, attention=self._group.layer_names[0]
        )
        probe_bytes = self._blocks * block_size * worker.bytes_per_token
        log.info(
            "Columns of the probes take %.1f MiB, %.2f %% of the KV cache (%.1f MiB).",
            probe_bytes / 2**20, 100 * probe_bytes / total, total / 2**20,
        )  # fmt: skip

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        current_worker().forget(finished_req_ids)
        return None, None

    def build_connector_worker_meta(self) -> WorkerResults | None:
        """Run after the forward pass of a step, on every rank."""
        step = self._get_connector_metadata()
        # Every rank of a tensor-parallel group has the full residual stream; the first one
        # classifies.
        if not step.has_pass or get_tensor_model_parallel_rank() != 0:
            return None
        work = current_worker().classify(step.plans)
        return WorkerResults(work) if step.plans else None

    # Nothing is loaded, stored or handed off.

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        return 0, False

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    def _do_nothing(self, *_: Any, **__: Any) -> None:
        pass

    update_state_after_alloc = start_load_kv = wait_for_layer_load = _do_nothing
    save_kv_layer = wait_for_save = _do_nothing


class SharedConnector(MultiConnector):
    """Our connector followed by the user's, which may store but not load.

    Keys and values that it loaded would have no projections: their slots would still hold the
    projections of earlier tokens.
    All requests are classified, so all are computed here.
    """

    @property
    def tracking(self) -> Tracking:
        return self._connectors[0].tracking

    def take(self, results: Any) -> Any:
        """As ``ProbeConnector.take``; the rest is left for the other connector."""
        if results is None:
            return None
        ours, *rest = results.metadata
        return replace(results, metadata=(self._connectors[0].take(ours), *rest))

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        # Called regardless, because it may record the request.
        super().get_num_new_matched_tokens(request, num_computed_tokens)
        self._requests_to_connector.pop(request.request_id, None)
        return 0, False


class ProbeScheduler(Scheduler):
    """The scheduler for engines that wait for each step."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Attach the verdicts of the step to its outputs."""
        if (results := model_runner_output.kv_connector_output) is not None:
            results.kv_connector_worker_meta = self.connector.take(results.kv_connector_worker_meta)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        # On every output, because a slow reader gets the first one merged with the next.
        for of_client in outputs.values():
            for output in of_client.outputs:
                if output.kv_transfer_params is None:
                    output.kv_transfer_params = self.connector.tracking.report(output.request_id)
        return outputs


class AsyncProbeScheduler(ProbeScheduler, AsyncScheduler):
    """The scheduler for engines that plan the next step while one runs."""
