"""``--engine vllm``: folders and hub ids, in vLLM's processes and its own server."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import ConfigDict

from sidelight.engines.backend import Backend, BackendOptions
from sidelight.engines.transformers.backend import require_safetensors
from sidelight.errors import SidelightError
from sidelight_vllm import QUANTISING

if TYPE_CHECKING:
    from sidelight.engines.base import Engine
    from sidelight.models.conversation import PromptFormat
    from sidelight.probes.probe import Probe
    from sidelight.states.reader import Model, Reader


class VllmOptions(BackendOptions):
    """Any field of vLLM's ``EngineArgs``, which checks it."""

    model_config = ConfigDict(extra="allow")


class VllmBackend(Backend):
    """Runs models in vLLM."""

    name = "vllm"
    schema = VllmOptions
    quantising = frozenset(QUANTISING)

    def require_options(self) -> None:
        if self.options.device != "auto":
            raise SidelightError("vLLM chooses its own device. Leave --device out.")

    def find(self, model: str) -> str:
        require_safetensors(model, self.name, self.options.tokenizer)
        return model

    def read(self, model: str, prompt_format: "PromptFormat | None" = None) -> "Model":
        from sidelight.engines.transformers.backbone import read_model

        return read_model(model, prompt_format=prompt_format)

    def load(self, model: str, prompt_format: "PromptFormat | None") -> NoReturn:
        raise SidelightError(
            "The vLLM engine can only serve, and read texts for training (sidelight train). "
            "Leave --engine out."
        )

    @contextmanager
    def reader(self, model: str, prompt_format: "PromptFormat | None") -> "Generator[Reader]":
        from sidelight_vllm.offline import VllmReader

        options = self.options
        reader = VllmReader(
            self.read(model, prompt_format),
            dtype=options.dtype,
            options=self.backend_options.model_dump(),
        )
        with closing(reader):
            yield reader

    def engine(self, model: str, probes: "Sequence[Probe]") -> "Engine":
        from sidelight_vllm.engine import load_vllm_engine

        options = self.options
        return load_vllm_engine(
            model, probes, dtype=options.dtype, options=self.backend_options.model_dump()
        )

    @property
    def serve(self) -> Callable[[Any, str, "Sequence[Probe]"], None]:
        from sidelight_vllm.server import serve

        return serve
