"""Engines as seen by commands: the models that each can run, and how it is started.

Packages provide engines through entry points of the group ``sidelight.engines``: a value of
``--engine``, and a ``Backend``. Its module is imported wherever a model is named, so it must not
import the engine.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from sidelight.errors import SidelightError, did_you_mean
from sidelight.extensions import extension_names, load_extension
from sidelight.progress import say

if TYPE_CHECKING:
    from sidelight.engines.base import Engine
    from sidelight.engines.transformers.backbone import DtypeName
    from sidelight.models.conversation import PromptFormat
    from sidelight.probes.probe import Probe
    from sidelight.states.reader import Backbone, Model, Reader

_GROUP = "sidelight.engines"
# The default for models that no other engine owns.
DEFAULT = "transformers"


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options for running a model.

    Attributes:
        dtype: Dtype of the weights.
        device: Device of the weights.
        engine_option: Engine-specific options by name, as JSON values.
        tokenizer: Folder or hub id of a tokenizer that replaces the model's own.
        served_model_name: Model name in requests; None means the engine's.
        serves: Whether an engine holds several texts, so that options set their number and length.
    """

    dtype: "DtypeName" = "auto"
    device: str = "auto"
    engine_option: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tokenizer: str | None = None
    served_model_name: str | None = None
    serves: bool = False


class BackendOptions(BaseModel):
    """The options of ``--engine-option``; an engine's subclass has a field for each."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Backend(ABC):
    """An engine that can run models.

    Attributes:
        name: The value of ``--engine``.
        models: Model names that it adds to ``--model``, for the help; "" for none.
        schema: Type of its specific options.
        runs_safetensors: Whether it runs folders saved by ``save_pretrained``, and hub ids.
        quantising: Engine options that quantise the weights; None if it cannot serve accepted
            probes on a quantised copy.

    Args:
        options: Options for running models.

    Raises:
        SidelightError: The engine does not have a given option.
    """

    name: ClassVar[str]
    models: ClassVar[str] = ""
    schema: ClassVar[type[BackendOptions]] = BackendOptions
    runs_safetensors: ClassVar[bool] = True
    quantising: ClassVar[frozenset[str] | None] = None

    def __init__(self, options: EngineOptions):
        self.options = options
        self.backend_options = self._read_backend_options()
        self.require_options()

    def _read_backend_options(self) -> Any:
        values = self.options.engine_option
        try:
            return self.schema.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            option = ".".join(map(str, first["loc"]))
            if first["type"] != "extra_forbidden":
                # Values of text options may be secrets.
                number = first["input"] if isinstance(first["input"], int | float) else "..."
                raise SidelightError(
                    f"--engine-option {option}={number}: {first['msg']}. Give another value, or "
                    "leave the option out. Repeat --engine-option for each option."
                ) from error
            known = [*self.schema.model_fields]
            remedy = did_you_mean(option, known) if known else " It has none; leave it out."
            raise SidelightError(
                f"The engine {self.name} has no option '{option}'.{remedy}"
            ) from error

    @classmethod
    def owns(cls, model: str) -> bool:
        """Whether only this engine runs models with such a name, such as ``FILE.gguf``."""
        return False

    def require_options(self) -> None:  # noqa: B027 - some engines have no more to check
        """Check the options that all engines share, such as the device, and their combinations.

        Raises:
            SidelightError: The engine does not support an option or a value.
        """

    @abstractmethod
    def find(self, model: str) -> str:
        """Resolve the name of a model without reading weights.

        Raises:
            SidelightError: The model does not exist, or the engine cannot run it.
        """

    @abstractmethod
    def read(self, model: str) -> "Model":
        """A model without its weights."""

    @abstractmethod
    def load(self, model: str, prompt_format: "PromptFormat | None") -> "Backbone":
        """Load a model for passes over single texts.

        Raises:
            SidelightError: The engine cannot do this; it only serves, or reads texts for training.
        """

    @contextmanager
    def reader(self, model: str, prompt_format: "PromptFormat | None") -> "Generator[Reader]":
        """Yield a model that computes hidden states for training."""
        yield self.load(model, prompt_format)

    @abstractmethod
    def engine(self, model: str, probes: "Sequence[Probe]") -> "Engine":
        """Create an engine that serves a model with these probes."""

    @property
    def serve(self) -> "Callable[[Any, str, Sequence[Probe]], None] | None":
        """The engine's own server, called with a config, a model and probes; None for ours."""
        return None


def engine_names() -> list[str]:
    """The installed engines, ``transformers`` first."""
    return [DEFAULT, *(name for name in extension_names(_GROUP) if name != DEFAULT)]


def find_backend(name: str) -> type[Backend]:
    """An installed engine.

    Raises:
        SidelightError: No engine or several engines have this name, or its package cannot be
            imported or does not support this version of Sidelight.
    """
    try:
        backend: type[Backend] | None = load_extension(_GROUP, name)
    except (ImportError, AttributeError) as error:
        raise SidelightError(
            f"Cannot load the engine '{name}' ({error}). Fix or uninstall its package."
        ) from error
    if backend is None:
        raise SidelightError(
            f"No engine '{name}' is installed.{did_you_mean(name, engine_names())} Each engine "
            "is a separate package; Sidelight's own are in packages/ of a clone."
        )
    return backend


def backend_of(model: str, options: EngineOptions, engine: str = "auto") -> Backend:
    """The engine that runs a model.

    Args:
        model: Name of the model.
        options: Options for running it.
        engine: Name of the engine; ``auto`` means the one that owns this model name, else
            ``transformers``.

    Raises:
        SidelightError: The engine does not exist, or does not have a given option.
    """
    name = owner_of(model) or DEFAULT if engine == "auto" else engine
    return find_backend(name)(options)


def usable_backends() -> list[type[Backend]]:
    """The installed engines that can be loaded, ``transformers`` first.

    A broken engine does not affect the others and is reported once.
    """
    found: list[type[Backend]] = []
    for name in engine_names():
        try:
            found.append(find_backend(name))
        except SidelightError as error:
            _report(f"Without the engine '{name}': {error}")
    return found


@cache
def _report(sentence: str) -> None:
    say(sentence)


def owner_of(model: str) -> str | None:
    """The installed engine that owns this model name; None for a folder or hub id."""
    return next((backend.name for backend in usable_backends() if backend.owns(model)), None)


def engines_of(model: str) -> list[str]:
    """The installed engines that run a model of this name, ``transformers`` first."""
    if (owner := owner_of(model)) is not None:
        return [owner]
    return [backend.name for backend in usable_backends() if backend.runs_safetensors]
