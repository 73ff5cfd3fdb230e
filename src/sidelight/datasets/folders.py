"""Where local data sets lie: the folder of all, and the file of one split."""

import os
from pathlib import Path

from sidelight.data.readers import is_readable
from sidelight.errors import SidelightError

VARIABLE = "SIDELIGHT_DATA"
FORMATS = ".jsonl, .jsonl.gz, .csv or .parquet"

_CHECKOUT = Path(__file__).parents[3]


def default_root() -> Path:
    """The folder that `SIDELIGHT_DATA` names, else `../shared/data` beside the checkout.

    The latter need not exist.

    Raises:
        SidelightError: The variable names something that is no folder.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return _CHECKOUT.parent / "shared" / "data"
    root = Path(named).expanduser()
    if not root.is_dir():
        raise SidelightError(
            f"{VARIABLE} is '{named}', but there is no such folder. Set it to the folder that has "
            "one folder per data set, or unset it."
        )
    return root


def split_file(folder: Path, split: str) -> Path:
    """The one readable file of a split, whatever its format.

    Raises:
        SidelightError: There is none, or more than one.
    """
    files = sorted(path for path in folder.iterdir() if is_readable(path))
    matches = [path for path in files if path.name.partition(".")[0] == split]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(path.name for path in matches)
        raise SidelightError(f"'{folder}' has several files for '{split}': {names}. Keep one.")
    names = ", ".join(path.name for path in files) or "no readable file"
    raise SidelightError(
        f"'{folder}' lacks the split '{split}': it has {names}. Add it as {split} with the ending "
        f"{FORMATS}."
    )
