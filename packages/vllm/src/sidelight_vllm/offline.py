"""vLLM without a server: hidden states for training.

A probe to be served in vLLM can thus be trained on vLLM's own hidden states. They are stored by KV
slot, in place of projections, in a ``StateWorker``. When vLLM has read a text, each worker writes
the states of its layers to a file named by the request.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import json
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt, Reads, TokenRole
from sidelight.progress import Progress
from sidelight.states.cache import ActivationCache
from sidelight.states.reader import Model
from sidelight.types import Verdicts
from sidelight_vllm import KEY
from sidelight_vllm.requests import request_params
from sidelight_vllm.settings import (
    ANNOTATED,
    STATES,
    Served,
    log,
    require_options,
    require_vllm,
)
from sidelight_vllm.slots import GatherPlan, StagingBuffer
from sidelight_vllm.worker import Worker

# Queued work in full steps: one runs while the next waits, so that no step is half empty.
_STEPS_AHEAD = 2
_STATES = "states"


OfflineRequest = tuple[int, EncodedPrompt, Mapping[str, Any]]
"""A number, a prompt to run under this number, and its ``kv_transfer_params``."""
# Names of options whose values are secret, such as `hf_token`.
_SECRET = re.compile("token$|key|password|secret")


class VllmReader:
    """A ``Reader`` that starts vLLM for the first missing text and runs it until closed.

    Batches are limited only by vLLM's own options. Common prefixes run once unless vLLM's prefix
    cache is off.

    Args:
        model: The model, which vLLM loads.
        dtype: Dtype of vLLM's computation; ``auto`` uses the dtype of the stored weights.
        options: Fields of vLLM's ``EngineArgs``.

    Raises:
        SidelightError: vLLM is not installed.
    """

    device = torch.device("cpu")

    def __init__(
        self, model: Model, *, dtype: str = "auto", options: Mapping[str, Any] | None = None
    ):
        require_vllm()
        self.name, self.encoder, self.fingerprint = model.name, model.encoder, model.fingerprint
        if dtype != "auto":
            self.fingerprint = replace(model.fingerprint, dtype=dtype)
        self._path = model.path
        self._options = dict(options or {})
        self._llm: Any = None

    @property
    def engine(self) -> str:
        """``vllm``, its version, and the options, some of which change the states."""
        from vllm import __version__

        # It becomes part of a probe's training record, which may be shared.
        told = {name: value for name, value in self._options.items() if not _SECRET.search(name)}
        options = json.dumps(told, sort_keys=True) if told else ""
        return f"vllm {__version__} {options}".strip()

    @property
    def max_tokens(self) -> int:
        context = self.encoder.max_tokens
        # vLLM always generates a token, so one position is kept free.
        return min(context, int(self._options.get("max_model_len", context))) - 1

    def states(
        self, cache: ActivationCache, rows: Sequence[int], advance: Progress
    ) -> Generator[Mapping[int, Tensor]]:
        """As ``Reader.states``."""
        cache.directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache.directory) as folder:
            places = {row: Path(folder) / str(row) for row in rows}
            requests = (
                (row, cache.prompts[row], capture_params(cache.prompts[row], cache.reads, place))
                for row, place in places.items()
            )
            for row, prompt, _ in self.run(requests):
                advance(len(prompt))
                yield {row: captured(places[row], self.fingerprint.layers)}

    def run(self, requests: Iterable[OfflineRequest]) -> Generator[tuple[int, EncodedPrompt, Any]]:
        """Yield each number and prompt with vLLM's output, in the order in which they end.

        Requests are submitted when vLLM has room; closing the generator cancels running ones.

        Raises:
            SidelightError: An option is unknown, the plugin does not support a feature that is in
                use, or vLLM has stopped or aborted a request.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._llm is None:
            self._llm = self._started()
        llm, coming = self._llm, iter(requests)
        most_tokens = _STEPS_AHEAD * llm.vllm_config.scheduler_config.max_num_batched_tokens
        running: dict[str, EncodedPrompt] = {}
        try:
            while True:
                while sum(map(len, running.values())) < most_tokens:
                    if (request := next(coming, None)) is None:
                        break
                    self._add(*request)
                    running[str(request[0])] = request[1]
                if not running:
                    return
                try:
                    ended = [output for output in llm.step() if output.finished]
                except EngineDeadError as error:
                    raise SidelightError(
                        "vLLM has stopped. Check its log for the reason."
                    ) from error
                for output in ended:
                    prompt = running.pop(output.request_id)
                    reason = output.outputs[0].finish_reason
                    if reason not in ("stop", "length"):
                        raise SidelightError(
                            f"vLLM ended a text without reading it ({reason}). Check its log for "
                            "the reason."
                        )
                    yield int(output.request_id), prompt, output
        finally:
            llm.abort_request([*running])

    def close(self) -> None:
        """End vLLM's processes, if it is running."""
        if self._llm is not None:
            self._llm.engine_core.shutdown()
            self._llm = None

    def _started(self) -> Any:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        require_options(self._options, EngineArgs)
        arguments = EngineArgs(
            model=self._path,
            dtype=self.fingerprint.dtype,
            disable_log_stats=True,
            additional_config={KEY: {"probes": [], STATES: True, ANNOTATED: True}},
            **{"max_model_len": self.encoder.max_tokens, **self._options},
        )
        return LLMEngine.from_engine_args(arguments)

    def _add(self, index: int, prompt: EncodedPrompt, params: Mapping[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # vLLM generates at least one token, which is not read.
        sampling = SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": dict(params)},
        )
        self._llm.add_request(str(index), {"prompt_token_ids": [*prompt.token_ids]}, sampling)


def capture_params(prompt: EncodedPrompt, reads: Reads, path: Path) -> dict[str, Any]:
    """The ``kv_transfer_params`` of a request whose read tokens go to files at this path."""
    token_roles = (
        TokenRole.PROMPT if is_read else TokenRole.UNREAD for is_read in prompt.mask(reads).tolist()
    )
    return request_params(replace(prompt, token_roles=tuple(token_roles)), path=str(path))


def captured(path: Path, layers: int) -> Float[Tensor, "layer token width"]:
    """Read the states of a text that the workers have written to this path, and remove the files.

    Raises:
        SidelightError: States are missing.
    """
    files = sorted(path.parent.glob(f"{path.name}.*"), key=lambda file: int(file.suffix[1:]))
    layers_read = [load_file(file)[_STATES] for file in files]
    if sum(map(len, layers_read)) != layers:
        raise SidelightError(
            f"vLLM has read a text, but hidden states are missing in {path.parent}; its log has "
            "the reason. Name a folder with free space that all vLLM workers can access (--set "
            "cache=FOLDER), or use --engine transformers."
        )
    for file in files:
        # Memory-mapped data stays readable.
        file.unlink()
    return layers_read[0] if len(layers_read) == 1 else torch.cat(layers_read)


class StateWorker(Worker):
    """Stores the hidden states of one worker process, and writes those of gather plans to files."""

    def __init__(self, served: Served, *, layers: range, tokens: int, device: torch.device):
        super().__init__(served, layers=layers, tokens=tokens, device=device)
        self._width = served.fingerprint.width
        shape = self._staging.rows.shape[:2]
        rows = self._staging.rows.new_full((*shape, self._width), torch.nan, dtype=torch.bfloat16)
        self._staging = StagingBuffer(self._staging.projection, rows)
        # Each pipeline stage writes the states of its layers.
        self._has_all_layers = True

    def receive(self, layer: int, stream: Float[Tensor, "token width"]) -> None:
        """Store the residual stream unchanged."""
        self._staging.rows[layer, : len(stream)].copy_(stream)

    def _read(self, plans: Sequence[GatherPlan]) -> Float[Tensor, "token layer projection"]:
        assert self._store is not None
        # Layer by layer, because the states of a long text would take much of a GPU's memory.
        slots = self._store.slots(plans)
        return torch.stack([rows[slots].cpu() for rows in self._store.rows.unbind(1)], 1)

    def _verdicts(
        self, plans: Sequence[GatherPlan], projections: Float[Tensor, "token layer projection"]
    ) -> Mapping[str, Verdicts]:
        by_request: dict[str, Verdicts] = {}
        shares = projections.split([len(plan.token_roles) for plan in plans])
        for plan, states in zip(plans, shares, strict=True):
            by_request[plan.request_id] = Verdicts()
            try:
                token_roles = torch.frombuffer(bytearray(plan.token_roles), dtype=torch.uint8)
                hidden = states[token_roles != TokenRole.UNREAD].transpose(0, 1).contiguous()
                save_file({_STATES: hidden}, f"{plan.path}.{self._layers.start}")
            # As for verdicts, vLLM would wait for the step's output.
            except Exception:  # noqa: BLE001
                log.exception("Hidden states cannot be written to %s.", plan.path)
                by_request[plan.request_id] = Verdicts(failed=(_STATES,))
        return by_request
