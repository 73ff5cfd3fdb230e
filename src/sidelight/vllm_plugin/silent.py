# pyright: reportMissingImports=false, reportUntypedBaseClass=false
"""A KV connector that neither loads nor stores keys and values: a channel, and no more.

vLLM's documented way for a message to travel with a step and its result. The class has two roles:
beside the scheduler it says what is wanted of a step, in a worker it acts once the step is done.
"""

from collections.abc import Iterator
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from sidelight.errors import SidelightError
from sidelight.vllm_plugin.orphans import end_with_parent
from sidelight.vllm_plugin.tracking import Step


class SilentConnector(KVConnectorBase_V1, SupportsHMA):
    """What every connector of ours has in common: the methods that do nothing."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            _require_one_group(kv_cache_config)
            end_with_parent()

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed off."""
        return False

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Nothing is loaded."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is loaded."""

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As ``request_finished``; there is one group."""
        return self.request_finished(request, block_ids[0])

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing is saved."""


def steps(scheduler_output: Any) -> Iterator[Step]:
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
    """Checks that one block table says where all keys and values of a request are."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
        raise SidelightError(
            "Probes inside vLLM need a model whose layers all keep keys and values of every token. "
            "Serve this one with --disable-hybrid-kv-cache-manager, or with the transformers "
            "engine."
        )
