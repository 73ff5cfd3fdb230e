"""Engines as commands see them: the models that each runs, and how it starts.

Packages offer engines by entry points of the group ``sidelight.engines``: a value of ``--engine``,
and a ``Backend``. Its module is imported wherever a model is named, so it imports no engine.
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
# It runs what no other engine is named for.
DEFAULT = "transformers"


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a model is run.

    Attributes:
        dtype: Of its weights.
        device: Where they are.
        engine_option: Options of the engine by name, as JSON values.
        tokenizer: A folder or hub id of the tokenizer, where it is not the model's own.
        served_model_name: The name that requests give; None: the engine's.
        serves: Whether an engine holds several texts, so that options say how many and how long.
    """

    dtype: "DtypeName" = "auto"
    device: str = "auto"
    engine_option: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tokenizer: str | None = None
    served_model_name: str | None = None
    serves: bool = False


class BackendOptions(BaseModel):
    """What ``--engine-option`` can set: an engine's subclass has a field for each option."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Backend(ABC):
    """An engine that models can be run in.

    Attributes:
        name: The value of ``--engine``.
        models: The names that it adds to ``--model``, for the command's help; "" for none.
        schema: The type of its own options.
        runs_safetensors: Whether it runs folders saved by ``save_pretrained``, and hub ids.
        quantising: Engine options that quantise the weights; None: it takes no quantised copy of a
            model whose probes are accepted by digest.

    Args:
        options: How to run models.

    Raises:
        SidelightError: The engine lacks an option that is given.
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
                # Texts may be secrets.
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
        """Whether a name has a form that is this engine's alone, such as ``FILE.gguf``."""
        return False

    def require_options(self) -> None:  # noqa: B027 - some engines have no more to check
        """Check the options that all engines share, such as a device, and those that go together.

        Raises:
            SidelightError: The engine lacks one, or has no such value.
        """

    @abstractmethod
    def find(self, model: str) -> str:
        """The name of the model that runs where this one is named; no weights are read.

        Raises:
            SidelightError: There is no such model here, or the engine does not run it.
        """

    @abstractmethod
    def read(self, model: str) -> "Model":
        """A model without its weights."""

    @abstractmethod
    def load(self, model: str, prompt_format: "PromptFormat | None") -> "Backbone":
        """A model for passes over single texts.

        Raises:
            SidelightError: The engine has none: it only serves, or reads for training.
        """

    @contextmanager
    def reader(self, model: str, prompt_format: "PromptFormat | None") -> "Generator[Reader]":
        """A model that computes hidden states for training, until the block ends."""
        yield self.load(model, prompt_format)

    @abstractmethod
    def engine(self, model: str, probes: "Sequence[Probe]") -> "Engine":
        """An engine that serves a model with these probes."""

    @property
    def serve(self) -> "Callable[[Any, str, Sequence[Probe]], None] | None":
        """The engine's own server, given a ``ServerConfig``, a model and probes; None: ours."""
        return None


def engine_names() -> list[str]:
    """The installed engines, ``transformers`` first."""
    return [DEFAULT, *(name for name in extension_names(_GROUP) if name != DEFAULT)]


def find_backend(name: str) -> type[Backend]:
    """An installed engine.

    Raises:
        SidelightError: There is none of this name, there are several, or its package does not fit
            this version of Sidelight or cannot be imported.
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
        model: Its name.
        options: How to run it.
        engine: The name of the engine; ``auto``: the one that alone runs models of this name, else
            ``transformers``.

    Raises:
        SidelightError: There is no such engine, or it lacks an option that is given.
    """
    name = owner_of(model) or DEFAULT if engine == "auto" else engine
    return find_backend(name)(options)


def usable_backends() -> list[type[Backend]]:
    """The installed engines that can be loaded, ``transformers`` first.

    A broken engine does not stop the others. It is reported once.
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
    """The installed engine that alone runs models of this name; None: it is a folder or hub id."""
    return next((backend.name for backend in usable_backends() if backend.owns(model)), None)


def engines_of(model: str) -> list[str]:
    """The installed engines that run a model of this name, ``transformers`` first."""
    if (owner := owner_of(model)) is not None:
        return [owner]
    return [backend.name for backend in usable_backends() if backend.runs_safetensors]
