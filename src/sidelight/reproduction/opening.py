"""The record of when test data was opened: once, and if more often, for all to see."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sidelight.storage import write_json

OPENED = "test_opened.json"


@dataclass(frozen=True)
class Opening:
    """One look at the test data.

    Attributes:
        time: UTC, ISO 8601.
        config: Hash of every run that was measured, and of how.
        test: Hash of the test texts and labels; None where a kill came before they were read.
    """

    time: str
    config: str
    test: str | None


def record_opening(directory: Path, *, config: str, versions: Mapping[str, str]) -> None:
    """Notes that test data is opened now, before anything of it is read.

    A run with the settings of an earlier opening is not noted: ``record_test`` is, where it reads
    other texts.

    Args:
        directory: Of the table.
        config: Hash of every run that is measured, and of how.
        versions: Of packages.
    """
    entries = _entries(directory)
    if config not in [entry["config"] for entry in entries]:
        _add(directory, entries, {"config": config, "packages": dict(versions)})


def record_test(
    directory: Path, *, config: str, test: str, versions: Mapping[str, str]
) -> tuple[Opening, ...]:
    """Notes which texts were opened, once they are read and before they are measured on.

    Args:
        directory: Of the table.
        config: As ``record_opening`` noted it.
        test: Hash of the test texts and labels.
        versions: Of packages.

    Returns:
        Earlier openings with other settings or other texts: rows chosen after one of them have seen
        test data.
    """
    entries = _entries(directory)
    open_ones = [one for one in entries if one["config"] == config and one.get("test") is None]
    if (config, test) not in [(entry["config"], entry.get("test")) for entry in entries]:
        if open_ones:
            open_ones[0]["test"] = test
            write_json(directory / OPENED, entries)
        else:
            _add(directory, entries, {"config": config, "test": test, "packages": dict(versions)})
    known = [Opening(one["time"], one["config"], one.get("test")) for one in entries]
    return tuple(known[: [(one.config, one.test) for one in known].index((config, test))])


def opening_note(earlier: tuple[Opening, ...]) -> str:
    """What the table says of it."""
    if not earlier:
        return (
            "Test data had not been opened with other settings or other texts before, and every "
            "row had its validation results first."
        )
    times = ", ".join(one.time for one in earlier)
    return (
        f"Test data had been opened before with other settings or other texts ({times}): what was "
        "changed since was changed with test figures in sight."
    )


def _entries(directory: Path) -> list[dict[str, Any]]:
    path = directory / OPENED
    return json.loads(path.read_text("utf-8")) if path.exists() else []


def _add(directory: Path, entries: list[dict[str, Any]], entry: Mapping[str, Any]) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entries.append({"time": now, **entry})
    write_json(directory / OPENED, entries)
