"""Rows from a Hugging Face data set, through the optional package `datasets`."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from sidelight.data.readers.files import files_beside
from sidelight.data.rows import Row
from sidelight.errors import SidelightError, did_you_mean

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def is_hub_name(source: str) -> bool:
    """Whether a text reads as `name`, `owner/name` or `owner/name:config`."""
    return _HUB_NAME.fullmatch(source) is not None


def read_hub(source: str, *, split: str | None) -> list[Row]:
    """All rows of one split of a data set.

    Columns of class numbers become class names where there are three or more classes; with two,
    they stay 0 and 1, so that 1 is the positive class.

    Args:
        source: `name` or `name:config`.
        split: Name of the split; None means `train`.

    Raises:
        SidelightError: The package is missing, the hub is out of reach, or it has no such data set,
            configuration or split, or the data set cannot be built.
    """
    datasets = _import_datasets(source)
    name, _, config = source.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split or "train")
    except _loading_errors(datasets) as error:
        raise SidelightError(
            f"Cannot load '{source}', split '{split or 'train'}', from the Hugging Face hub "
            f"({str(error)[:300]}). Check name, configuration, split and network, "
            "or download it once and give the file."
        ) from error
    names = _class_names(table, datasets.ClassLabel)
    rows = [Row(source, "row", n, _with_names(cells, names)) for n, cells in enumerate(table, 1)]
    if not rows:
        raise SidelightError(f"'{source}' has no rows in split '{split or 'train'}'. Name another.")
    return rows


def _import_datasets(source: str) -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise SidelightError(
            f"There is no file '{source}'.{did_you_mean(source, files_beside(Path(source)))} "
            "To read it as a Hugging Face data set, run `pip install 'sidelight[datasets]'`."
        ) from error


def _loading_errors(datasets: Any) -> tuple[type[Exception], ...]:
    """What loading raises; a data set that is a script is refused by a RuntimeError."""
    own, transport = datasets.exceptions.DatasetsError, import_module("httpx").HTTPError
    return (OSError, ValueError, RuntimeError, own, transport)


def _class_names(table: Any, class_label: type[Any]) -> dict[str, list[str]]:
    """Names of the classes, for each column of class numbers."""
    features = table.features.items()
    return {name: feature.names for name, feature in features if isinstance(feature, class_label)}


def _with_names(cells: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    return {**cells, **{column: _class(cells[column], names[column]) for column in names}}


def _class(number: int | None, names: list[str]) -> int | str | None:
    # The hub marks an unlabelled row by -1, as in hidden test sets.
    if number is None or number == -1:
        return None
    return names[number] if len(names) > 2 else number
