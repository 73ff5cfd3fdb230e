"""``--engine llama``: GGUF files, including Ollama's, on the CPU."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from sidelight.engines.backend import Backend, BackendOptions
from sidelight.errors import SidelightError
from sidelight.models.smollm2 import EMBEDDED_NAME
from sidelight_llama.files import EMBEDDED_GGUF, find_gguf, is_gguf, served_name
from sidelight_llama.library import MOST_SEQUENCES, MOST_THREADS, require_version

if TYPE_CHECKING:
    from sidelight.engines.base import Engine
    from sidelight.models.conversation import PromptFormat
    from sidelight.probes.probe import Probe
    from sidelight.states.reader import Model
    from sidelight_llama.backbone import LlamaBackbone


class LlamaOptions(BackendOptions):
    """How llama.cpp runs a file.

    Attributes:
        threads: Number of CPU threads.
        texts: Maximum number of texts generated at once; classification has one slot more.
        tokens: Maximum number of tokens in one text, prompt and response together.
    """

    threads: int | None = Field(None, ge=1, le=MOST_THREADS)
    texts: int | None = Field(None, ge=1, lt=MOST_SEQUENCES)
    tokens: int | None = Field(None, ge=1, lt=2**31)


class LlamaBackend(Backend):
    """Runs GGUF files in llama.cpp."""

    name = "llama"
    models = "FILE.gguf, ollama:NAME"
    schema = LlamaOptions
    runs_safetensors = False
    quantising = frozenset[str]()

    @classmethod
    def owns(cls, model: str) -> bool:
        return is_gguf(model)

    def require_options(self) -> None:
        for option, value in (("--dtype", self.options.dtype), ("--device", self.options.device)):
            if value != "auto":
                raise SidelightError(
                    f"{option} {value} does not apply to GGUF files: their weights are not "
                    f"converted, and llama.cpp runs them on the CPU. Leave {option} out."
                )
        for option in self.backend_options.model_fields_set:
            if option != "threads" and not self.options.serves:
                raise SidelightError(
                    f"--engine-option {option} applies only to serve and parity: this command "
                    "processes one text at a time, up to the model's context length. Leave it "
                    "out."
                )

    def find(self, model: str) -> str:
        model = EMBEDDED_GGUF if model == EMBEDDED_NAME else model
        if not is_gguf(model):
            raise SidelightError(
                f"--engine llama runs GGUF files, but '{model}' is not one. Name a .gguf file or "
                "ollama:NAME, or leave --engine out."
            )
        require_version()
        find_gguf(model)
        return model

    def read(self, model: str) -> "Model":
        from sidelight.states.reader import Model

        backbone = self.load(model, None)
        return Model(model, str(backbone.path), backbone.encoder, backbone.fingerprint)

    def load(self, model: str, prompt_format: "PromptFormat | None") -> "LlamaBackbone":
        from sidelight_llama.backbone import LlamaBackbone

        return LlamaBackbone(
            find_gguf(model),
            name=model,
            tokenizer=self.options.tokenizer,
            prompt_format=prompt_format,
            threads=self.backend_options.threads,
        )

    def engine(self, model: str, probes: "Sequence[Probe]") -> "Engine":
        from sidelight.probes.probe import common_format
        from sidelight_llama.engine import LlamaEngine, llama_limits

        backbone = self.load(model, common_format(probes))
        sizes = self.backend_options.model_dump(exclude={"threads"}, exclude_none=True)
        known = backbone.encoder.max_tokens
        if sizes.get("tokens", 0) > known:
            raise SidelightError(
                f"--engine-option tokens={sizes['tokens']}: the context length of '{model}' is "
                f"{known} tokens. Give at most {known}, or leave the option out."
            )
        # The path of the file is hidden from clients.
        served = self.options.served_model_name or served_name(model)
        return LlamaEngine(backbone, probes, limits=llama_limits(**sizes), model=served)
