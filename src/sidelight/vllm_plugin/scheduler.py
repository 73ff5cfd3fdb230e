# pyright: reportMissingImports=false, reportUntypedBaseClass=false
"""vLLM's schedulers, with the verdicts on every output of a request.

vLLM hands a connector's results over after it has made the step's outputs, when a request that ends
in the same step is gone. Here the connector gets them before.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


class ProbeScheduler(Scheduler):
    """The scheduler for engines that wait for each step."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM's, with reports on the outputs."""
        _hand_over(self.connector, model_runner_output)
        return _reported(
            self.connector, super().update_from_output(scheduler_output, model_runner_output)
        )


class AsyncProbeScheduler(AsyncScheduler):
    """The scheduler for engines that plan the next step while one runs."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM's, with reports on the outputs."""
        _hand_over(self.connector, model_runner_output)
        return _reported(
            self.connector, super().update_from_output(scheduler_output, model_runner_output)
        )


def _hand_over(connector: Any, model_runner_output: Any) -> None:
    output = model_runner_output.kv_connector_output
    if output is not None:
        connector.update_connector_output(output)


def _reported(connector: Any, outputs: Any) -> Any:
    """On every output, since a slow reader of the first gets it merged with the next."""
    for of_client in outputs.values():
        for output in of_client.outputs:
            if output.kv_transfer_params is None:
                output.kv_transfer_params = connector.tracking.report(output.request_id)
    return outputs
