# pyright: reportMissingImports=false, reportUntypedBaseClass=false
"""Carries readings to the workers and outcomes back: what to read of a step, and what was read."""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from sidelight.vllm_plugin import worker
from sidelight.vllm_plugin.judging import Judging, Share
from sidelight.vllm_plugin.panel import Outcome
from sidelight.vllm_plugin.silent import SilentConnector, steps
from sidelight.vllm_plugin.surface import served_by
from sidelight.vllm_plugin.tracking import Reading, Tracking

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
        seconds: That the worker took for it, after the forward pass.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    shares: list[Share] = field(default_factory=list)
    reads_responses: bool = False
    seconds: float = 0.0

    def aggregate(self, other: "Results") -> "Results":
        """Both workers' results."""
        return Results(
            {**self.outcomes, **other.outcomes},
            [*self.shares, *other.shares],
            self.reads_responses or other.reads_responses,
            self.seconds + other.seconds,
        )


class ProbeConnector(SilentConnector):
    """One per scheduler and one per worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._cache = kv_cache_config
        self._is_staged = vllm_config.parallel_config.pipeline_parallel_size > 1
        self._results: Results | None = None
        if role == KVConnectorRole.SCHEDULER:
            served = served_by(vllm_config)
            assert served is not None
            self._judging = Judging(served.panel())
            late = self._judging.panel.late
            self.tracking = Tracking(reads_responses=late is not None)

    # Beside the scheduler.

    def on_new_request(self, request: Any) -> None:
        """Takes note of what its tokens belong to."""
        self.tracking.enter(
            request.request_id, request.kv_transfer_params, request.prompt_token_ids
        )

    def build_connector_meta(self, scheduler_output: Any) -> Readings:
        """What to read after this step."""
        return Readings(self.tracking.plan(steps(scheduler_output)))

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
            self.tracking.record(request_id, outcome, results.seconds)
        shares: dict[str, list[Share]] = defaultdict(list)
        for share in results.shares:
            shares[share.reading.request_id].append(share)
        for request_id, own in shares.items():
            # A step that ran on after its request's end would leave a state that nobody drops.
            if request_id in self.tracking:
                self.tracking.record(request_id, self._judging.join(own), results.seconds)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The report for its last output."""
        report = self.tracking.report(request.request_id)
        self.tracking.leave(request.request_id)
        self._judging.forget([request.request_id])
        return False, report

    # In a worker.

    def register_kv_caches(self, kv_caches: Any) -> None:
        """Makes room for the columns of every KV slot."""
        block_size = self._cache.kv_cache_groups[0].kv_cache_spec.block_size
        own = worker.INSTALLED.get()
        total = sum(cache.numel() * cache.element_size() for cache in kv_caches.values())
        own.allocate(blocks=self._cache.num_blocks, block_size=block_size, cache_bytes=total)
        _log.info(
            "Columns of the probes take %.1f MiB, %.2f %% of the KV cache (%.1f MiB).",
            own.size_bytes / 2**20, 100 * own.size_bytes / total, total / 2**20,
        )  # fmt: skip

    def wait_for_save(self) -> None:
        """Runs right after the forward pass, on every rank."""
        start = time.perf_counter()
        own = worker.INSTALLED.get()
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
            self._results.seconds = time.perf_counter() - start

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        """Drops what is known of requests that have ended."""
        worker.INSTALLED.get().forget(finished_req_ids)
        return None, None

    def build_connector_worker_meta(self) -> Results | None:
        """The results of this step."""
        results, self._results = self._results, None
        return results
