"""Options that several commands of the laboratory share, and what they make of them."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sidelight_lab.bench.measurement import Record

AT_LEAST_TWO = click.IntRange(min=2)
POSITIVE = click.FloatRange(min=0, min_open=True)


def names(_context: click.Context, _option: click.Parameter, value: str | None) -> list[str] | None:
    """Names separated by commas; None where nothing is given."""
    if value is None:
        return None
    return [name.strip() for name in value.split(",") if name.strip()]


def split_numbers(
    _context: click.Context, _option: click.Parameter, value: str | None
) -> tuple[int, ...]:
    """Positive whole numbers separated by commas; none where nothing is given."""
    words = [word.strip() for word in value.split(",")] if value else []
    if not all(word.isdecimal() and int(word) for word in words):
        raise click.BadParameter(
            f"got '{value}', expected a comma-separated list of whole numbers of 1 or more, such "
            "as 16,64,256."
        )
    return tuple(map(int, words))


def publish(record: "Record", out: Path | None, *, as_json: bool) -> None:
    """Save the record where a folder is given, and print it."""
    if out is not None:
        record.save(out)
    click.echo(record.to_json() if as_json else record.to_markdown(), nl=False)
