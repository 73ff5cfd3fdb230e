"""The model that a command runs, and the engine that runs it."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sidelight.engines.backend import DEFAULT, Backend, EngineOptions, backend_of
from sidelight.errors import SidelightError
from sidelight.guards import UntrainedGuardError, probe_folder, probe_folders
from sidelight.models.smollm2 import EMBEDDED_NAME

if TYPE_CHECKING:
    from sidelight.classifier import Classifier
    from sidelight.engines.base import Engine
    from sidelight.engines.transformers.backbone import TransformersBackbone
    from sidelight.models.conversation import PromptFormat
    from sidelight.probes.probe import Probe
    from sidelight.states.reader import Backbone, Reader


@dataclass(frozen=True, kw_only=True)
class Runtime(EngineOptions):
    """A command's options for the model and the engine.

    Attributes:
        model: Name of the model; None means the probes' model, or the embedded one.
        engine: Name of the engine; ``auto`` means the first that can run the model.

    Raises:
        SidelightError: The engine does not have a given option, or the device or the model does not
            exist.
    """

    model: str | None
    engine: str = DEFAULT

    def __post_init__(self) -> None:
        if self.model is not None:
            self.model_of([])
        elif self.engine != "auto":
            self.backend_of(EMBEDDED_NAME)
        if self.device not in ("auto", "cpu"):
            # Importing torch takes seconds, so the device is checked only if it could be wrong.
            from sidelight.models.machine import find_device

            find_device(self.device)

    def backend_of(self, model: str) -> Backend:
        """The engine for a model: the named one, or the one that its name implies."""
        options = {field.name: getattr(self, field.name) for field in fields(EngineOptions)}
        return backend_of(model, EngineOptions(**options), self.engine)

    def probe_folder(self, source: Path) -> Path:
        """The folder of a probe, or of a guard trained for the model."""
        with self._estimating():
            return probe_folder(source, *self._guarded_model())

    def probe_folders(self, sources: "Sequence[Path]") -> list[Path]:
        """The folders of probes, and of guards trained for the model."""
        with self._estimating():
            return probe_folders(sources, *self._guarded_model())

    @contextmanager
    def _estimating(self) -> "Generator[None]":
        """Add the estimated training cost to errors about untrained guards."""
        try:
            yield
        except UntrainedGuardError as error:
            from sidelight.training.ready import estimate_guards

            name = self.model_of([])
            model = self.backend_of(name).read(name)
            estimate = estimate_guards(error.guards, model.encoder, model.fingerprint)
            raise SidelightError(f"{error} ({estimate})") from error

    def _guarded_model(self) -> "tuple[str, Callable[[], str]] | tuple[None, None]":
        """The model that a guard must be trained for, and a function that returns its digest."""
        if self.model is None and self.engine == "auto":
            return None, None
        name = self.model_of([])
        if self.model is None and name == EMBEDDED_NAME:
            return None, None
        return name, lambda: self.backend_of(name).read(name).fingerprint.digest

    def model_of(self, probes: "Sequence[Probe]") -> str:
        """The named model, or the model of the first probe.

        Raises:
            SidelightError: The model does not exist, or this engine cannot run it.
        """
        name = self.model or (probes[0].card.backbone.name if probes else EMBEDDED_NAME)
        return self.backend_of(name).find(name)

    def load_backbone(self, prompt_format: "PromptFormat | None" = None) -> "Backbone":
        """Load the backbone for reading texts; warn if chats are read as plain texts by default."""
        name = self.model_of([])
        backbone = self.backend_of(name).load(name, prompt_format)
        _warn_of_format(backbone, prompt_format)
        return backbone

    def load_transformers(
        self, prompt_format: "PromptFormat | None" = None
    ) -> "TransformersBackbone":
        """Load the backbone in transformers, for commands that need its weights."""
        from sidelight.engines.transformers.backbone import TransformersBackbone

        backbone = self.load_backbone(prompt_format)
        assert isinstance(backbone, TransformersBackbone)
        return backbone

    @contextmanager
    def reader(self, prompt_format: "PromptFormat | None" = None) -> "Generator[Reader]":
        """Yield the model as a reader for training."""
        name = self.model_of([])
        with self.backend_of(name).reader(name, prompt_format) as reader:
            _warn_of_format(reader, prompt_format)
            yield reader

    def load_classifier(self, probe: Path) -> "Classifier":
        """Load a saved probe on its backbone."""
        from sidelight.classifier import load
        from sidelight.probes.artifact import load_probe

        loaded = load_probe(probe)
        name = self.model_of([loaded])
        return load(probe, model=self.backend_of(name).load(name, loaded.card.prompt_format))

    def load_engine(self, probes: "Sequence[Probe]") -> "Engine":
        """Load an engine with these probes."""
        name = self.model_of(probes)
        return self.backend_of(name).engine(name, probes)


def _warn_of_format(reader: "Reader", prompt_format: "PromptFormat | None") -> None:
    if prompt_format is None and (warning := reader.encoder.warning):
        click.echo(f"Warning: {warning}", err=True)
