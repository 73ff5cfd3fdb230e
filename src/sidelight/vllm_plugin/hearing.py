"""What the engine says of each request, step by step.

vLLM merges the outputs that a reader has not taken yet: several tokens, and several texts of one
request, with the last report only. Here every report is heard before that.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Said:
    """One step's report on one text.

    Attributes:
        text: Its index among the texts of the request.
        tokens: How many the step has written.
        params: The ``kv_transfer_params`` of its output.
    """

    text: int
    tokens: int
    params: Mapping[str, Any] | None


class Hearing:
    """Listens to an engine, in the process that takes its outputs.

    Args:
        processor: vLLM's ``OutputProcessor``. Its ``process_outputs`` is wrapped.
    """

    def __init__(self, processor: Any):
        self._states: Mapping[str, Any] = processor.request_states
        self._process = processor.process_outputs
        self._listeners: dict[str, Callable[[Said], None]] = {}
        processor.process_outputs = self._heard

    @contextmanager
    def of(self, request_id: str, listener: Callable[[Said], None]) -> Generator[None]:
        """Tells the listener all that is said of the request, before its outputs can be read."""
        self._listeners[request_id] = listener
        try:
            yield
        finally:
            del self._listeners[request_id]

    def _heard(self, outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            state = self._states.get(output.request_id)
            # vLLM may still write what nobody wants any more.
            if state is not None and state.external_req_id in self._listeners:
                tokens = len(output.new_token_ids)
                said = Said(state.request_index, tokens, output.kv_transfer_params)
                self._listeners[state.external_req_id](said)
        return self._process(outputs, *args, **kwargs)
