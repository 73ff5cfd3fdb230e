"""Writes the tables of options in ``docs/reference.md`` from the commands themselves.

    .venv/bin/python .ci/reference.py

``tests/test_docs.py`` says if a table is not that of its command.
"""

import re
from pathlib import Path

import click

from sidelight.cli import app

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
_TABLE = re.compile(r"(<!-- options of (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """The page with the tables as the commands have them now."""
    return _TABLE.sub(lambda match: match[1] + _table(match[2]), page)


def _table(name: str) -> str:
    command = app.get_command(click.Context(app), name)
    assert command is not None
    options = [option for option in command.params if isinstance(option, click.Option)]
    for option in options:
        # Some words of its help come from the installed engines.
        option.get_help_record(click.Context(command))
    rows = [_row(option) for option in options]
    return "\n".join(["| option | default | |", "|---|---|---|", *rows, ""])


def _row(option: click.Option) -> str:
    words = option.help or ""
    told = re.search(r" ?\[(?:env: (\w+); )?(?:env: (\w+)|default: (.+))\]$", words)
    default = option.default if isinstance(option.default, str | int | float) else ""
    if isinstance(option.default, bool):
        default = "on" if option.default else ""
    if told:
        words = words[: told.start()]
        variable = told[1] or told[2]
        words += f" Variable: `{variable}`." if variable else ""
        default = told[3] or default
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if isinstance(option.type, click.Choice):
        words += f" One of {', '.join(f'`{choice}`' for choice in option.type.choices)}."
    return f"| {names} | {default} | {words.replace('|', ',')} |"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
