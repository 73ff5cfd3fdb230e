"""Options that several commands of the laboratory share, and what they make of them."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.options import checked_folder

if TYPE_CHECKING:
    from sidelight.backbone import TransformersBackbone
    from sidelight_lab.bench.record import Record

option = partial(click.option, show_default=True)
AT_LEAST_ONE = click.IntRange(min=1)
AT_LEAST_TWO = click.IntRange(min=2)
POSITIVE = click.FloatRange(min=0, min_open=True)
FOLDER = click.Path(path_type=Path)

plots_option = option("--plots", type=FOLDER, help="Folder for plots.")
trials_option = option(
    "--trials",
    type=AT_LEAST_ONE,
    default=100,
    help="Trials of each searched mechanism, with those of an earlier run in the same folder.",
)


def cache_option(default: str = "the user's cache") -> Callable[[Any], Any]:
    """The folder for hidden states; ``default`` says in the help what happens without it."""
    return option(
        "--cache",
        type=FOLDER,
        help=f"Folder for hidden states; they stay there. [default: {default}]",
    )


def files_option(files: str) -> Callable[[Any], Any]:
    """The folder in which a benchmark writes these files."""
    return option("--out", type=FOLDER, callback=checked_folder, help=f"Folder for {files}.")


def split_names(text: str | None) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def split_numbers(
    _context: click.Context, _option: click.Parameter, value: str | None
) -> tuple[int, ...]:
    """Positive whole numbers separated by commas; none where nothing is given."""
    words = [word.strip() for word in value.split(",")] if value else []
    if not all(word.isdecimal() and int(word) for word in words):
        raise click.BadParameter(
            f"got '{value}', wanted whole numbers of 1 or more with commas, like 16,64,256."
        )
    return tuple(map(int, words))


def given_backbone(given: Mapping[str, Any], **more: Any) -> "TransformersBackbone":
    """The backbone that ``backbone_options`` describe; ``more`` goes to ``load_backbone``."""
    from sidelight.backbone import load_backbone

    model = given["model"] or "smollm2"
    return load_backbone(model, dtype=given["dtype"], device=given["device"], **more)


def publish(record: "Record", out: Path | None, *, as_json: bool) -> None:
    """Saves the record if a folder is given, and prints it."""
    if out is not None:
        record.save(out)
    click.echo(record.to_json() if as_json else record.to_markdown(), nl=False)
