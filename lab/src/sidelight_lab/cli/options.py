"""Options that several commands of the laboratory share, and what they make of them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sidelight.cli import options

if TYPE_CHECKING:
    from sidelight_lab.bench.measurement import Record

AT_LEAST_TWO = click.IntRange(min=2)
POSITIVE = click.FloatRange(min=0, min_open=True)

trials_option = click.option(
    "--trials",
    type=options.AT_LEAST_ONE,
    default=100,
    help="Trials of each searched mechanism, with those of an earlier run in the same folder.",
)


def cache_option(default: str = "the user's cache") -> Callable[[options.Command], options.Command]:
    """The folder for hidden states; ``default`` says in the help what happens without it."""
    text = f"Folder for hidden states; they stay there. [default: {default}]"
    return click.option("--cache", type=options.PATH, help=text)


def record_options(
    files: str, *, has_plots: bool = True
) -> Callable[[options.Command], options.Command]:
    """How a benchmark is published: see ``publish``. ``files`` are those that it writes."""
    out = click.option(
        "--out", type=options.PATH, callback=options.checked_folder, help=f"Folder for {files}."
    )
    plots = click.option("--plots", type=options.PATH, help="Folder for plots.")
    return options.together(out, *([plots] if has_plots else []), options.as_json)


def split_names(text: str | None) -> list[str]:
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


def publish(
    record: "Record", out: Path | None, *, as_json: bool, plots: Path | None = None
) -> None:
    """Saves the record and its plots where folders are given, and prints the record."""
    if out is not None:
        record.save(out)
    click.echo(record.to_json() if as_json else record.to_markdown(), nl=False)
    if plots is not None:
        assert record.draw is not None
        record.draw(plots)
