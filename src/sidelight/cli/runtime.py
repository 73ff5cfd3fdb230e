"""The model that a command runs, and what runs it."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.engines.llama.library import MOST_SEQUENCES, MOST_THREADS, require_version
from sidelight.errors import SidelightError, did_you_mean
from sidelight.guards import UntrainedGuardError, probe_folder, probe_folders
from sidelight.models.gguf_files import EMBEDDED_GGUF, find_gguf, is_gguf
from sidelight.models.smollm2 import EMBEDDED_NAME, require_model

if TYPE_CHECKING:
    from sidelight.classifier import Classifier
    from sidelight.engines.base import Engine
    from sidelight.models.conversation import PromptFormat
    from sidelight.probes.probe import Probe
    from sidelight.states.backbone import (
        Backbone,
        DtypeName,
        TransformersBackbone,
        UnloadedBackbone,
    )
    from sidelight.states.extraction import StateSource

# A text that is only judged has a sequence too; the model says how many tokens it knows.
_LLAMA_OPTIONS = {
    "threads": range(1, MOST_THREADS + 1),
    "texts": range(1, MOST_SEQUENCES),
    "tokens": range(1, 2**31),
}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The model that runs, and what runs it: the options ``engine`` and ``backbone``.

    Attributes:
        served_model_name: Name that requests give; None: as ``LocalEngine`` has it.
        serves: Whether an engine holds texts, so that options say how many and how long.

    Raises:
        SidelightError: Options are given that the engine has not; or there is no such device
            here, or no model in the folder or file that is named.
    """

    model: str | None
    dtype: "DtypeName"
    device: str
    engine: str = "transformers"
    engine_option: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tokenizer: str | None = None
    served_model_name: str | None = None
    serves: bool = False

    def __post_init__(self) -> None:
        if self.engine == "vllm" and self.device != "auto":
            raise SidelightError("vLLM chooses its device itself; leave --device out.")
        self._require_options(self.engine)
        if self.model is not None:
            self.model_of([])
        if self.device not in ("auto", "cpu"):
            # torch takes seconds, which are lost only if the device is wrong.
            from sidelight.models.machine import find_device

            find_device(self.device)

    def probe_folder(self, source: Path) -> Path:
        """The folder of a probe, or of a guard that was trained for the model."""
        with self._estimating():
            return probe_folder(source, *self._guarded_model())

    def probe_folders(self, sources: "Sequence[Path]") -> list[Path]:
        """The folders of probes, and of guards that were trained for the model."""
        with self._estimating():
            return probe_folders(sources, *self._guarded_model())

    @contextmanager
    def _estimating(self) -> "Generator[None]":
        """Says what training a guard would take, where it has not been trained."""
        try:
            yield
        except UntrainedGuardError as error:
            from sidelight.training.ready import estimate_guards

            model = self._read(self.model_of([]))
            estimate = estimate_guards(error.guards, model.encoder, model.fingerprint)
            raise SidelightError(f"{error} ({estimate})") from error

    def _guarded_model(self) -> "tuple[str, Callable[[], str]] | tuple[None, None]":
        """The model that a guard has to be trained for, and what gives its digest."""
        if self.model is None and self.engine != "llama":
            return None, None
        name = self.model_of([])
        return name, lambda: self._read(name).fingerprint.digest

    def _read(self, name: str) -> "UnloadedBackbone | Backbone":
        """The model's encoder and fingerprint; its weights are not loaded."""
        if is_gguf(name):
            return self._load(name, None, for_reading=True)
        from sidelight.states.backbone import read_backbone

        return read_backbone(name)

    def load_backbone(self, prompt_format: "PromptFormat | None" = None) -> "Backbone":
        """The backbone, for texts that are read; warns if nobody chose to read chats as texts."""
        name, for_reading = self.model_of([]), self.engine != "vllm"
        backbone = self._load(name, prompt_format, for_reading=for_reading)
        if prompt_format is None and (warning := backbone.encoder.warning):
            click.echo(f"Warning: {warning}", err=True)
        return backbone

    def load_transformers(
        self, prompt_format: "PromptFormat | None" = None
    ) -> "TransformersBackbone":
        """The backbone in transformers, for what needs its weights."""
        from sidelight.states.backbone import TransformersBackbone

        backbone = self.load_backbone(prompt_format)
        assert isinstance(backbone, TransformersBackbone)
        return backbone

    def load_classifier(self, probe: Path) -> "Classifier":
        """A saved probe on its backbone."""
        from sidelight.classifier import load
        from sidelight.probes.artifact import load_probe

        loaded = load_probe(probe)
        name, prompt_format = self.model_of([loaded]), loaded.prompt_format
        return load(probe, model=self._load(name, prompt_format, for_reading=True))

    def model_of(self, probes: "Sequence[Probe]") -> str:
        """The named model, or that of the first probe.

        Raises:
            SidelightError: It is a folder without a model, no file, or not for this engine.
        """
        name = self.model or (probes[0].fingerprint.name if probes else EMBEDDED_NAME)
        if self.engine == "llama" and name == EMBEDDED_NAME:
            name = EMBEDDED_GGUF
        if not is_gguf(name):
            if self.engine == "llama":
                raise SidelightError(
                    f"--engine llama runs GGUF files, and '{name}' is none. Name a .gguf file or "
                    "ollama:NAME, or leave --engine out."
                )
            if self.tokenizer is not None:
                raise SidelightError(
                    f"--tokenizer is for GGUF files; '{name}' has its own. Leave it out."
                )
            self._require_options("transformers" if self.engine == "auto" else self.engine)
            require_model(name)
            return name
        if self.engine not in ("auto", "llama"):
            raise SidelightError(
                f"'{name}' is a GGUF file, which only llama.cpp runs (--engine llama), not "
                f"{self.engine}. Name a folder saved by save_pretrained or a hub id here."
            )
        self._require_options("llama")
        require_version()
        find_gguf(name)
        return name

    def _require_options(self, engine: str) -> None:
        """Checks that an engine has the options that are given."""
        if engine == "transformers" and self.engine_option:
            raise SidelightError(
                "--engine-option is for vLLM (--engine vllm) and llama.cpp (a GGUF file), not for "
                "transformers. Leave it out, or name one of these."
            )
        if engine != "llama":
            return
        for option, value in (("--dtype", self.dtype), ("--device", self.device)):
            if value != "auto":
                raise SidelightError(
                    f"{option} {value} is not for GGUF files: their weights stay as they are, and "
                    "llama.cpp runs them on the CPU. Leave it out."
                )
        for option, value in self.engine_option.items():
            allowed = _LLAMA_OPTIONS.get(option)
            if allowed is None:
                known = did_you_mean(option, _LLAMA_OPTIONS)
                raise SidelightError(f"llama.cpp has no option '{option}'.{known}")
            if type(value) is not int or value not in allowed:
                raise SidelightError(
                    f"--engine-option {option}={value} is no whole number from {allowed[0]} to "
                    f"{allowed[-1]}. Give one, or leave it out; several options take an "
                    "--engine-option each."
                )
            if option != "threads" and not self.serves:
                raise SidelightError(
                    f"--engine-option {option} is for serve and parity: this command reads a text "
                    "at a time, of any length that the model knows. Leave it out."
                )

    def _load(
        self, name: str, prompt_format: "PromptFormat | None", *, for_reading: bool
    ) -> "Backbone":
        if is_gguf(name):
            from sidelight.engines.llama.backbone import LlamaBackbone

            return LlamaBackbone(
                find_gguf(name),
                name=name,
                tokenizer=self.tokenizer,
                prompt_format=prompt_format,
                threads=self.engine_option.get("threads"),
            )
        from sidelight.states.backbone import load_backbone

        return load_backbone(
            name,
            dtype=self.dtype,
            # Beside vLLM it only encodes texts, and gives its dtype.
            device="cpu" if self.engine == "vllm" else self.device,
            prompt_format=prompt_format,
            for_reading=for_reading,
        )

    def load_engine(self, probes: "Sequence[Probe]") -> "Engine":
        """An engine with these probes."""
        name = self.model_of(probes)
        if self.engine == "vllm":
            from sidelight.vllm.engine import load_vllm_engine

            return load_vllm_engine(name, probes, dtype=self.dtype, options=self.engine_option)
        from sidelight.probes.probe import common_format
        from sidelight.states.backbone import TransformersBackbone

        backbone = self._load(name, common_format(probes), for_reading=True)
        if isinstance(backbone, TransformersBackbone):
            from sidelight.engines.transformers import TransformersEngine

            return TransformersEngine(backbone, probes, model=self.served_model_name)
        from sidelight.engines.llama.backbone import LlamaBackbone
        from sidelight.engines.llama.engine import LlamaEngine, llama_limits

        assert isinstance(backbone, LlamaBackbone)
        sizes = {name: n for name, n in self.engine_option.items() if name != "threads"}
        known = backbone.encoder.max_tokens
        if sizes.get("tokens", 0) > known:
            raise SidelightError(
                f"--engine-option tokens={sizes['tokens']}: '{name}' knows texts of at most "
                f"{known} tokens. Give at most so many, or leave it out."
            )
        limits, served = llama_limits(**sizes), self.served_model_name
        return LlamaEngine(backbone, probes, limits=limits, model=served)

    @contextmanager
    def state_source(self, backbone: "Backbone") -> "Generator[StateSource]":
        """The source of hidden states for training; an engine of vLLM ends with the block."""
        if self.engine == "vllm":
            from sidelight.states.backbone import TransformersBackbone
            from sidelight.vllm.offline import VllmSource

            assert isinstance(backbone, TransformersBackbone)
            with closing(VllmSource(backbone, options=self.engine_option)) as source:
                yield source
        else:
            from sidelight.states.extraction import BackboneSource

            yield BackboneSource(backbone)
