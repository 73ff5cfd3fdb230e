"""Options that several commands share, and their processing."""

import json
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, overload

import click
from pydantic import Field

from sidelight.cli.runtime import Runtime
from sidelight.engines.backend import BackendOptions, engine_names, find_backend, usable_backends
from sidelight.errors import SidelightError, SidelightWarning, checked, did_you_mean
from sidelight.storage import check_folder
from sidelight.types import StatesChoice

if TYPE_CHECKING:
    from sidelight.data.examples import LabelledExamples, SpanExamples
    from sidelight.data.loading import OnMissingLabel
    from sidelight.training.settings import FitOptions


Command = Callable[..., Any]
PATH = click.Path(path_type=Path)
AT_LEAST_ONE = click.IntRange(min=1)


class _OfEngines(click.Option):
    """An option whose help names the models and the options of the installed engines."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        backends = usable_backends()
        models = "".join(f", {backend.models}" for backend in backends if backend.models)
        options = [
            f"{', '.join(backend.schema.model_fields) or 'any engine argument'} ({backend.name})"
            for backend in backends
            if backend.schema is not BackendOptions
        ]
        told = {"{models}": models, "{options}": ": " + ", or ".join(options) if options else ""}
        for place, words in told.items():
            self.help = (self.help or "").replace(place, words)
        return super().get_help_record(ctx)


class _Engines(click.Choice[str]):
    """The installed engines; for other names, the error says where engines come from."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            find_backend(str(value))
        return super().convert(value, param, ctx)


def checked_folder(_context: click.Context, _option: Any, folder: Path | None) -> Path | None:
    """Refuse a folder that cannot be written, before the work begins."""
    if folder is not None:
        check_folder(folder)
    return folder


def checked_file(_context: click.Context, option: Any, path: Path | None) -> Path | None:
    """Refuse a file that cannot be written, before the work begins."""
    if path is None:
        return None
    if path.is_dir():
        raise SidelightError(
            f"{path} is a folder. Name a file in this folder with {option.opts[0]}."
        )
    check_folder(path.parent)
    return path


def _assigned(_context: click.Context, option: Any, value: tuple[str, ...]) -> dict[str, str]:
    """``epochs=3`` as ``{"epochs": "3"}``."""
    pairs = [assignment.partition("=") for assignment in value]
    for name, equals, text in pairs:
        if not (name and equals and text):
            raise SidelightError(
                f"Cannot read {option.opts[0]} {name}{equals}{text}. Write NAME=VALUE."
            )
    return {name: text for name, _, text in pairs}


def _assigned_json(*parsed: Any) -> dict[str, Any]:
    """As ``_assigned``, with values as JSON or as unquoted texts."""
    options: dict[str, Any] = {}
    for name, text in _assigned(*parsed).items():
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options


def typed(assigned: Mapping[str, str], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values of ``--set`` to their types in ``kinds``.

    Raises:
        SidelightError: A name is unknown, or a value has the wrong type.
    """
    values: dict[str, Any] = {}
    for name, text in assigned.items():
        if name not in kinds:
            raise SidelightError(
                f"There is no option '{name}'.{did_you_mean(name, {*kinds, *INPUT_SETTINGS})}"
            )
        values[name] = checked(kinds[name], text, f"Cannot read --set {name}={text}")
    return values


def announce(step: str) -> None:
    """Announce the next step on standard error, before slow imports and model loading."""
    click.echo(f"{step} ...", err=True)


# Key of the warnings in a command's context.
PRINTED_WARNINGS = "sidelight.printed_warnings"


@contextmanager
def printed_warnings() -> Generator[list[str]]:
    """Print each warning once on standard error; yield the printed warnings."""
    printed: list[str] = []
    show = warnings.showwarning

    def print_once(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if not issubclass(category, SidelightWarning):
            show(message, category, *place)
        elif (sentence := str(message)) not in printed:
            printed.append(sentence)
            click.echo(f"Warning: {sentence}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", SidelightWarning)
        warnings.showwarning = print_once
        yield printed


def with_warnings(result: Mapping[str, Any]) -> dict[str, Any]:
    """A command's result as JSON values, including the printed warnings."""
    return {**result, "warnings": [*click.get_current_context().meta[PRINTED_WARNINGS]]}


def examples(*commands: str) -> str:
    """Example commands for the end of a help page, each on its own line."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """The training texts, how to read them, and the storage of hidden states; see ``training``.

    Fields with a default are set by ``--set``.

    Attributes:
        groups: Comma-separated columns whose equal values keep rows in the same fold.
        limit: Number of rows to use, drawn at random with the share of each class preserved.
        max_tokens: Length to which longer texts are truncated for training, with a warning;
            prediction never truncates.
        cache: Folder for hidden states; None is the user's cache.
        keep_cache: Whether to keep the hidden states for other runs.
        states: How to store hidden states: auto, disk, stream or whole.
        memory: Maximum memory for hidden states in GiB, in addition to the model.
    """

    data: str
    text: str
    label: str
    response: str | None
    positive: str | None
    validation: str | None
    missing_label: "OnMissingLabel"
    split: str | None = None
    validation_split: str | None = None
    groups: str | None = None
    limit: Annotated[int, Field(ge=2)] | None = None
    max_tokens: Annotated[int, Field(ge=8)] = 1024
    cache: Path | None = None
    keep_cache: bool = False
    states: StatesChoice = "auto"
    memory: Annotated[float, Field(ge=0.01, allow_inf_nan=False)] = 1.0

    @overload
    def load(self, spans: str) -> "tuple[SpanExamples, SpanExamples | None]": ...
    @overload
    def load(
        self, spans: str | None = None
    ) -> "tuple[LabelledExamples, LabelledExamples | None]": ...
    def load(self, spans: str | None = None) -> "tuple[LabelledExamples, LabelledExamples | None]":
        """Load the training texts, and the validation texts if named.

        Args:
            spans: Column of spans; None reads labels.
        """
        from sidelight.data.loading import load_examples

        labels = {"label": self.label, "on_missing_label": self.missing_label}
        read: Callable[..., LabelledExamples] = partial(
            load_examples,
            text=self.text,
            response=self.response,
            **(labels if spans is None else {"spans": spans}),
        )
        if self.validation is None and self.validation_split is not None:
            raise SidelightError(
                "--set validation_split needs --validation. Name the validation data set, or "
                "leave validation_split out."
            )
        if self.validation is not None and self.groups is not None:
            raise SidelightError(
                "--set groups= keeps related rows in one fold, but there are no folds with "
                "--validation. Leave one of the two out."
            )
        if self.cache is not None:
            check_folder(self.cache)
        dataset = read(self.data, split=self.split, positive=self.positive, groups=self.groups)
        rows = dataset.draw(self.limit or len(dataset), seed=0)
        training = dataset.select(rows)
        if self.validation is None:
            return training, None
        return training, read(self.validation, split=self.validation_split, task=training.task)

    def fit_options(self) -> "FitOptions":
        """The fit options for reading the texts and storing their hidden states."""
        from sidelight.training.settings import READS, FitOptions

        return FitOptions(
            reads=replace(READS, side="response" if self.response else "prompt"),
            max_tokens=self.max_tokens,
            cache_root=self.cache,
            keep_cache=self.keep_cache,
            states=self.states,
            memory_bytes=int(self.memory * 2**30),
        )


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Combine options into one decorator, in their order on the help page."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _gathered(name: str, kind: type[Any], **defaults: Any) -> Callable[[Command], Command]:
    """Pass options that are fields of ``kind`` to the command as one object called ``name``."""
    names = {field.name for field in fields(kind)}

    def decorate(command: Command) -> Command:
        @wraps(command)
        def gathered(**values: Any) -> Any:
            options = {option: values.pop(option) for option in names & values.keys()}
            return command(**{name: kind(**defaults | options)}, **values)

        return gathered

    return decorate


_data = partial(
    click.option,
    "--data",
    help="JSONL, JSON, CSV or TSV file (also .gz), Parquet file, hub data set, or guard "
    "(docs/guards.md).",
)
data = _data(required=True)
optional_data = _data()
# A file or a folder to write.
new_file = partial(click.option, type=PATH, callback=checked_file)
new_folder = partial(click.option, type=PATH, callback=checked_folder)
out = new_folder("--out", required=True, help="Output folder.")
json_file = new_file("--out", help="JSON output file.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
text = click.option("--text", default="text", help="Column with the text or the chat messages.")
label = click.option(
    "--label",
    default="label",
    help="Column with the label; several comma-separated columns define a multi-label task.",
)
response = click.option("--response", help="Column with the assistant's answer.")
split = click.option("--split", help="Split of a hub data set.")
missing_label = click.option(
    "--missing-label",
    type=click.Choice(["error", "skip"]),
    default="error",
    help="How to handle a row without a label.",
)
limit = click.option(
    "--limit",
    type=click.IntRange(min=2),
    help="Use N random rows, stratified by class.",
)
threshold = partial(
    click.option,
    "--threshold",
    metavar="RULE",
    help="Objective for choosing thresholds: f1; fpr=0.01 (the highest recall that flags at most "
    "this share of negative texts); recall=0.95 (the fewest false positives at a recall of at "
    "least this share); or cost=10:1 (a miss costs 10 times as much as a false positive).",
)
positive = click.option("--positive", help="Positive class of a binary task.")
_model = partial(click.option, "--model")
model = _model(
    cls=_OfEngines,
    help="Backbone: smollm2 (embedded), a folder, a hub id{models}. [default: smollm2, or the "
    "probe's]",
)
tokenizer = click.option(
    "--tokenizer",
    metavar="FOLDER_OR_ID",
    help="Tokenizer to use if the model's own tokenizer cannot be read.",
)
dtype = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Dtype of the backbone; auto keeps the dtype of its weights, but uses float32 on a CPU "
    "without bfloat16 arithmetic, where it is faster.",
)
device = click.option("--device", default="auto", help="Device: cpu, cuda, cuda:1, or auto.")
engine_option = click.option(
    "--engine-option",
    multiple=True,
    callback=_assigned_json,
    cls=_OfEngines,
    metavar="NAME=VALUE",
    help="Engine option; may be repeated{options}.",
)
free_port = click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=False,
    help="Port. [default: a free one]",
)
# Columns of text, label and response in a data file.
columns = together(text, label, response, split)
# A probe and labelled texts to measure it on.
measured = together(click.argument("probe", type=PATH), data, columns, missing_label)
# The engine. With ``backbone``, which also collects it, the command gets a ``runtime``.
engine = click.option(
    "--engine",
    type=_Engines(["auto", *engine_names()]),
    default="auto",
    help="Engine; auto picks the engine that the model name requires, or else transformers.",
)
_gather = partial(_gathered, "runtime", Runtime)
backbone = together(engine_option, model, tokenizer, dtype, device, _gather(engine="auto"))
# For commands that need the weights in transformers.
transformers = together(
    _model(
        help="Backbone: smollm2 (embedded), a folder, or a hub id. [default: smollm2, or the "
        "probe's]",
    ),
    dtype,
    device,
    _gather(),
)
# Options of ``--set`` by name.
INPUT_SETTINGS = {
    field.name: field.type for field in fields(TrainingInputs) if field.default is not MISSING
}


def _inputs(command: Command) -> Command:
    """Move data options of ``--set`` to ``inputs``; the rest stays in ``assigned``.

    For a ready guard, the card determines whether responses are read.
    """

    gathered = _gathered("inputs", TrainingInputs)(command)

    @wraps(command)
    def divided(*, assigned: Mapping[str, str], **values: Any) -> Any:
        settings = {name: text for name, text in assigned.items() if name in INPUT_SETTINGS}
        rest = {name: text for name, text in assigned.items() if name not in settings}
        from sidelight.data.guards import guard_of

        if (guard := guard_of(values["data"])) is not None:
            values["response"] = values["response"] or guard.card.columns["response"]
        return gathered(assigned=rest, **values, **typed(settings, INPUT_SETTINGS))

    return divided


_ABOUT_INPUTS = f"Any other option; may be repeated. Data options: {', '.join(INPUT_SETTINGS)}."


def training(more: str = "") -> Callable[[Command], Command]:
    """The options of training: ``inputs``, ``out``, and ``assigned``, the rest of --set.

    Args:
        more: Help on the options that ``--set`` accepts in addition to ``INPUT_SETTINGS``.
    """
    return together(
        data,
        out,
        text,
        label,
        response,
        positive,
        missing_label,
        click.option("--validation", help="Validation data. [default: held out from --data]"),
        click.option(
            "--set",
            "assigned",
            multiple=True,
            callback=_assigned,
            metavar="NAME=VALUE",
            help=f"{_ABOUT_INPUTS} {more}".strip(),
        ),
        _inputs,
    )
