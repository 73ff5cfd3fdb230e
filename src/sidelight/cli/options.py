"""Options that several commands share, and what they make. Folders are checked before the work."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.errors import SidelightError

if TYPE_CHECKING:
    from sidelight.data.examples import LabelledExamples
    from sidelight.data.loading import OnMissingLabel
    from sidelight.training.settings import FitOptions


Command = Callable[..., Any]

model_option = click.option(
    "--model",
    default=None,
    help="Backbone: smollm2 (embedded), a folder, or a hub id. [default: smollm2, or the probe's]",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Dtype of the backbone; auto is as its weights are stored.",
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, or auto."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
text_option = click.option(
    "--text", default="text", show_default=True, help="Column of the text (or chat messages)."
)
label_option = click.option(
    "--label",
    default="label",
    show_default=True,
    help="Column of the label; several with commas make a multi-label task.",
)
response_option = click.option("--response", default=None, help="Column of the assistant's answer.")
split_option = click.option("--split", default=None, help="Split of a hub data set.")
missing_label_option = click.option(
    "--missing-label",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="What a row without a label is.",
)
data_option = click.option(
    "--data", required=True, help="JSONL, JSON, CSV, TSV (or .gz), Parquet, or hub name."
)
out_option = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write."
)
positive_option = click.option(
    "--positive", default=None, help="The positive class of a binary task."
)
limit_option = click.option(
    "--limit",
    type=click.IntRange(min=2),
    default=None,
    help="Use N rows, drawn at random, class by class.",
)
max_tokens_option = click.option(
    "--max-tokens",
    type=click.IntRange(min=8),
    default=1024,
    show_default=True,
    help="Longer texts are cut, and counted; judging never cuts.",
)
_CACHE_OPTIONS = (
    click.option(
        "--cache",
        type=click.Path(path_type=Path),
        default=None,
        help="Folder for activations. [default: the user's cache]",
    ),
    click.option(
        "--cache-budget",
        type=float,
        default=None,
        metavar="GIB",
        help="The most that activations of one file may take.",
    ),
    click.option("--keep-cache", is_flag=True, help="Keep the activations for another run."),
)


def _names(_context: click.Context, _option: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names:
        from sidelight.mechanisms.base import mechanism_names

        known = ", ".join(mechanism_names())
        raise click.BadParameter(f"it names none. Leave it out, or choose: {known}.")
    return names


def mechanism_option(*, default: str, help: str) -> Callable[[Command], Command]:
    """Names of mechanisms, as a list.

    Args:
        default: With commas, as users write them.
        help: What may be named.
    """
    return click.option(
        "--mechanism", "mechanisms", default=default, callback=_names, show_default=True, help=help
    )


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """What to train on, how texts are read, and where activations go: see ``training_options``."""

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

        whole = load_examples(
            self.data,
            text=self.text,
            label=self.label,
            response=self.response,
            on_missing_label=self.missing_label,
            split=self.split,
            positive=self.positive,
        )
        rows = whole.draw(self.limit or len(whole), seed=0)
        # Warnings about the file hold for some of its rows too.
        training = replace(whole.select(rows), warnings=whole.warnings)
        if self.validation is None:
            return training, None
        return training, load_examples(
            self.validation,
            text=self.text,
            label=self.label,
            response=self.response,
            on_missing_label=self.missing_label,
            split=self.validation_split,
            task=training.task,
        )

    def fit_options(self) -> "FitOptions":
        """How the texts are read, and where their activations go."""
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
    validation = click.option(
        "--validation", default=None, help="Validation data. [default: held out of --data]"
    )
    validation_split = click.option(
        "--validation-split", default=None, help="Split of a hub data set in --validation."
    )
    options = (
        data_option, out_option, column_options, missing_label_option, positive_option, validation,
        validation_split, limit_option, max_tokens_option, *_CACHE_OPTIONS,
    )  # fmt: skip

    @wraps(command)
    def gathered(**given: Any) -> Any:
        inputs = {field.name: given.pop(field.name) for field in fields(TrainingInputs)}
        return command(inputs=TrainingInputs(**inputs), **given)

    result: Command = gathered
    for option in reversed(options):
        result = option(result)
    return result


def column_options(command: Command) -> Command:
    """Where a data file has text, label and response."""
    return text_option(label_option(response_option(split_option(command))))


def backbone_options(command: Command) -> Command:
    """Which backbone, and how it is loaded."""
    return model_option(dtype_option(device_option(command)))


def examples_epilog(*commands: str) -> str:
    """Example commands for the end of a help page, each on its own line."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def checked_folder(_context: click.Context, _option: Any, folder: Path | None) -> Path | None:
    """The folder, if it can be written.

    Raises:
        SidelightError: It cannot.
    """
    from sidelight.training.runs import check_folder

    if folder is not None:
        check_folder(folder)
    return folder


def checked_file(context: click.Context, option: Any, path: Path | None) -> Path | None:
    """The file, if it can be written.

    Raises:
        SidelightError: It cannot, or is a folder.
    """
    if path is None:
        return None
    if path.is_dir():
        raise SidelightError(f"{path} is a folder. Name a file in it with --out.")
    checked_folder(context, option, path.parent)
    return path


json_file_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=checked_file,
    default=None,
    help="File for the JSON.",
)
