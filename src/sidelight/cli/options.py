"""Options that several commands share, and what the commands make of them."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.errors import SidelightError
from sidelight.storage import check_folder

if TYPE_CHECKING:
    from sidelight.data.examples import LabelledExamples
    from sidelight.data.loading import OnMissingLabel
    from sidelight.training.settings import FitOptions


Command = Callable[..., Any]
PATH = click.Path(path_type=Path)
AT_LEAST_ONE = click.IntRange(min=1)

option = partial(click.option, show_default=True)


def checked_folder(_context: click.Context, _option: Any, folder: Path | None) -> Path | None:
    """Refuses a folder that cannot be written, before the work begins."""
    if folder is not None:
        check_folder(folder)
    return folder


def checked_file(_context: click.Context, _option: Any, path: Path | None) -> Path | None:
    """Refuses a file that cannot be written, before the work begins."""
    if path is None:
        return None
    if path.is_dir():
        raise SidelightError(f"{path} is a folder. Name a file in it with --out.")
    check_folder(path.parent)
    return path


def examples_epilog(*commands: str) -> str:
    """Example commands for the end of a help page, each on its own line."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


_data_file = partial(option, "--data", help="JSONL, JSON, CSV, TSV (or .gz), Parquet, or hub name.")
data_option = _data_file(required=True)
optional_data_option = _data_file()
out_option = option(
    "--out", required=True, type=PATH, callback=checked_folder, help="Folder to write."
)
json_file_option = option("--out", type=PATH, callback=checked_file, help="File for the JSON.")
json_option = option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
text_option = option("--text", default="text", help="Column of the text (or chat messages).")
label_option = option(
    "--label",
    default="label",
    help="Column of the label; several, with commas, make a multi-label task.",
)
response_option = option("--response", help="Column of the assistant's answer.")
split_option = option("--split", help="Split of a hub data set.")
missing_label_option = option(
    "--missing-label",
    type=click.Choice(["error", "skip"]),
    default="error",
    help="What to do about a row without a label.",
)
limit_option = option(
    "--limit",
    type=click.IntRange(min=2),
    help="Use N rows, drawn at random, class by class.",
)
max_tokens_option = option(
    "--max-tokens",
    type=click.IntRange(min=8),
    default=1024,
    help="Cut longer texts, and count them; judging never cuts.",
)
positive_option = option("--positive", help="The positive class of a binary task.")
model_option = option(
    "--model",
    help="Backbone: smollm2 (embedded), a folder, or a hub id. [default: smollm2, or the probe's]",
)
dtype_option = option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Dtype of the backbone; auto keeps that of its weights.",
)
device_option = option("--device", default="auto", help="cpu, cuda, cuda:1, or auto.")
_TRAINING_OPTIONS = (
    positive_option,
    option("--validation", help="Validation data. [default: held out of --data]"),
    option("--validation-split", help="Split of a hub data set in --validation."),
    limit_option,
    max_tokens_option,
    option("--cache", type=PATH, help="Folder for hidden states. [default: the user's cache]"),
    option(
        "--cache-budget",
        type=float,
        metavar="GIB",
        help="The most disk that the hidden states of one file may take.",
    ),
    option("--keep-cache", is_flag=True, help="Keep the hidden states for another run."),
)


def column_options(command: Command) -> Command:
    """Where a data file has text, label and response."""
    return text_option(label_option(response_option(split_option(command))))


def backbone_options(command: Command) -> Command:
    """Which backbone, and how it is loaded."""
    return model_option(dtype_option(device_option(command)))


def _names(_context: click.Context, _option: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names:
        from sidelight.mechanisms.base import mechanism_names

        known = ", ".join(mechanism_names())
        raise click.BadParameter(f"no mechanism is named. Leave it out, or choose: {known}.")
    return names


def mechanism_option(*, default: str, help: str) -> Callable[[Command], Command]:
    """Names of mechanisms, written with commas, as a list."""
    return option("--mechanism", "mechanisms", default=default, callback=_names, help=help)


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """What to train on, how to read it, and where hidden states go: see ``training_options``."""

    data: str
    text: str
    label: str
    response: str | None
    split: str | None
    missing_label: "OnMissingLabel"
    positive: str | None
    validation: str | None
    validation_split: str | None
    limit: int | None
    max_tokens: int
    cache: Path | None
    cache_budget: float | None
    keep_cache: bool

    def load(self) -> "tuple[LabelledExamples, LabelledExamples | None]":
        """Training texts, and validation texts where some are named."""
        from sidelight.data.loading import load_examples

        read = partial(
            load_examples,
            text=self.text,
            label=self.label,
            response=self.response,
            on_missing_label=self.missing_label,
        )
        whole = read(self.data, split=self.split, positive=self.positive)
        rows = whole.draw(self.limit or len(whole), seed=0)
        # Warnings about the file hold for some of its rows too.
        training = replace(whole.select(rows), warnings=whole.warnings)
        if self.validation is None:
            return training, None
        return training, read(self.validation, split=self.validation_split, task=training.task)

    def fit_options(self) -> "FitOptions":
        """How the texts are read, and where their hidden states go."""
        from sidelight.prompts import Reads
        from sidelight.training.settings import FitOptions

        budget = self.cache_budget
        return FitOptions(
            reads=Reads(side="response" if self.response else "prompt"),
            max_tokens=self.max_tokens,
            cache_root=self.cache,
            cache_budget_bytes=None if budget is None else int(budget * 2**30),
            keep_cache=self.keep_cache,
        )


def training_options(command: Command) -> Command:
    """What to train on; the command gets ``inputs``, and ``out`` for the result."""

    @wraps(command)
    def gathered(**given: Any) -> Any:
        inputs = {field.name: given.pop(field.name) for field in fields(TrainingInputs)}
        return command(inputs=TrainingInputs(**inputs), **given)

    result: Command = gathered
    for each in reversed(_TRAINING_OPTIONS):
        result = each(result)
    return data_option(out_option(column_options(missing_label_option(result))))
