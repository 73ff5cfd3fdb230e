# pyright: reportMissingImports=false, reportUntypedBaseClass=false
"""Tells the workers which hidden states of a step to keep; nothing comes back this way."""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context

from sidelight.vllm_plugin import capturing
from sidelight.vllm_plugin.silent import SilentConnector, steps


@dataclass
class Pieces(KVConnectorMetadata):
    """To the workers, with a step."""

    items: list[capturing.Piece] = field(default_factory=list)


class CaptureConnector(SilentConnector):
    """One per scheduler and one per worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            self._captures = capturing.Captures(block_size=size)

    # Beside the scheduler.

    def on_new_request(self, request: Any) -> None:
        """Takes note of where its states go."""
        params, tokens = request.kv_transfer_params, len(request.prompt_token_ids)
        self._captures.enter(request.request_id, params, tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Pieces:
        """What to keep of this step."""
        return Pieces(self._captures.plan(steps(scheduler_output)))

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forgets it."""
        self._captures.leave(request.request_id)
        return False, None

    # In a worker.

    def wait_for_save(self) -> None:
        """Runs right after the forward pass, on every rank."""
        mappings = get_forward_context().slot_mapping
        # Every rank of a tensor-parallel group has the whole residual stream; the first writes.
        is_writer = get_tensor_model_parallel_rank() == 0
        if mappings:
            pieces = self._get_connector_metadata().items if is_writer else []
            capturing.INSTALLED.get().save(next(iter(mappings.values())), pieces)
