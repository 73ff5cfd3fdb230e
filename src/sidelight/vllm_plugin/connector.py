# pyright: reportMissingImports=false, reportUntypedBaseClass=false
"""Carries readings to the workers and outcomes back, as a KV connector that stores nothing.

vLLM's documented way for a message to travel with a step and its result. The class has two roles:
beside the scheduler it says what to read, in a worker it reads.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec

from sidelight.errors import SidelightError
from sidelight.vllm_plugin import worker
from sidelight.vllm_plugin.judging import Judging, Share
from sidelight.vllm_plugin.panel import Outcome
from sidelight.vllm_plugin.surface import served_by
from sidelight.vllm_plugin.tracking import Reading, Step, Tracking

_log = init_logger("vllm.sidelight")


@dataclass
class Readings(KVConnectorMetadata):
    """To the workers, with a step."""

    items: list[Reading] = field(default_factory=list)


@dataclass
class Results(KVConnectorWorkerMetadata):
    """From a worker, after a step.

    Attributes:
        outcomes: By request, where the worker has all layers.
        shares: Where it has some.
        reads_responses: Whether some probe reads what is written.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    shares: list[Share] = field(default_factory=list)
    reads_responses: bool = False

    def aggregate(self, other: "Results") -> "Results":
        """Both workers' results."""
        return Results(
            {**self.outcomes, **other.outcomes},
            [*self.shares, *other.shares],
            self.reads_responses or other.reads_responses,
        )


class ProbeConnector(KVConnectorBase_V1, SupportsHMA):
    """One per scheduler and one per worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._cache = kv_cache_config
        self._is_staged = vllm_config.parallel_config.pipeline_parallel_size > 1
        self._results: Results | None = None
        if role == KVConnectorRole.SCHEDULER:
            _require_one_group(kv_cache_config)
            served = served_by(vllm_config)
            assert served is not None
            self._judging = Judging(served.panel())
            late = self._judging.panel.late
            self.tracking = Tracking(reads_responses=late is not None)

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed off."""
        return False

    # Beside the scheduler.

    def on_new_request(self, request: Any) -> None:
        """Takes note of what its tokens belong to."""
        self.tracking.enter(
            request.request_id, request.kv_transfer_params, request.prompt_token_ids
        )

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Nothing is loaded."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is loaded."""

    def build_connector_meta(self, scheduler_output: Any) -> Readings:
        """What to read after this step."""
        return Readings(self.tracking.plan(_steps(scheduler_output)))

    def update_connector_output(self, connector_output: Any) -> None:
        """Takes the outcomes of a step.

        Called twice with each: they are needed before vLLM makes the outputs, and it calls after.
        """
        results = connector_output.kv_connector_worker_meta
        if results is None:
            return
        connector_output.kv_connector_worker_meta = None
        self.tracking.reads_responses = results.reads_responses
        for request_id, outcome in results.outcomes.items():
            self.tracking.record(request_id, outcome)
        shares: dict[str, list[Share]] = defaultdict(list)
        for share in results.shares:
            shares[share.reading.request_id].append(share)
        for request_id, own in shares.items():
            self.tracking.record(request_id, self._judging.join(own))

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The report for its last output."""
        report = self.tracking.report(request.request_id)
        self.tracking.leave(request.request_id)
        self._judging.forget([request.request_id])
        return False, report

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As ``request_finished``."""
        return self.request_finished(request, block_ids[0])

    # In a worker.

    def register_kv_caches(self, kv_caches: Any) -> None:
        """Makes room for the columns of every KV slot."""
        block_size = self._cache.kv_cache_groups[0].kv_cache_spec.block_size
        own = worker.installed()
        total = sum(cache.numel() * cache.element_size() for cache in kv_caches.values())
        own.allocate(blocks=self._cache.num_blocks, block_size=block_size, cache_bytes=total)
        _log.info(
            "Columns of the probes take %.1f MiB, %.2f %% of the KV cache (%.1f MiB).",
            own.size_bytes / 2**20, 100 * own.size_bytes / total, total / 2**20,
        )  # fmt: skip

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Runs right after the forward pass, on every rank."""
        own = worker.installed()
        mappings = get_forward_context().slot_mapping
        if mappings:
            own.keep(next(iter(mappings.values())))
        readings = self._get_connector_metadata().items
        # Every rank of a tensor-parallel group has the whole residual stream; the first speaks.
        if readings and get_tensor_model_parallel_rank() == 0:
            self._results = Results(
                {} if self._is_staged else own.judge(readings),
                own.share(readings) if self._is_staged else [],
                own.reads_responses,
            )

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        """Drops what is known of requests that have ended."""
        worker.installed().forget(finished_req_ids)
        return None, None

    def build_connector_worker_meta(self) -> Results | None:
        """The results of this step."""
        results, self._results = self._results, None
        return results


def _steps(scheduler_output: Any) -> Iterator[Step]:
    """Each scheduled request's share of the step."""
    state = scheduler_output.kv_connector_block_state
    scheduled = scheduler_output.num_scheduled_tokens

    def step(request_id: str, computed: int, *, is_resumed: bool) -> Step:
        return Step(
            request_id,
            computed + scheduled[request_id],
            is_resumed,
            lambda: state.get_block_ids(request_id)[0],
        )

    for new in scheduler_output.scheduled_new_reqs:
        yield step(new.req_id, new.num_computed_tokens, is_resumed=True)
    cached = scheduler_output.scheduled_cached_reqs
    for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        yield step(request_id, computed, is_resumed=request_id in cached.resumed_req_ids)


def _require_one_group(kv_cache_config: Any) -> None:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
        raise SidelightError(
            "Probes inside vLLM need a model whose layers all keep keys and values of every token. "
            "Serve this one with --disable-hybrid-kv-cache-manager, or with the transformers "
            "engine."
        )
