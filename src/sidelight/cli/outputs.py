"""Where a command's results go: checked before the work, which may take hours."""

from pathlib import Path
from typing import Any

import click

from sidelight.errors import SidelightError


def checked_folder(_context: click.Context, _option: Any, folder: Path | None) -> Path | None:
    """The folder, if it can be written.

    Raises:
        SidelightError: It cannot.
    """
    from sidelight.runs import check_folder

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
