"""The record of when test data was opened: once, and if more often, for all to see."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

OPENED = "test_opened.json"


@dataclass(frozen=True)
class Opening:
    """One look at the test data.

    Attributes:
        time: UTC, ISO 8601.
        config: Hash of every run that was measured.
    """

    time: str
    config: str


def record_opening(
    directory: Path, *, config: str, versions: Mapping[str, str]
) -> tuple[Opening, ...]:
    """Notes that test data is opened now, before anything of it is read.

    A run with the settings of an earlier opening sees nothing new, and is not noted.

    Args:
        directory: Of the table.
        config: Hash of every run that is measured.
        versions: Of packages.

    Returns:
        Earlier openings with other settings: rows chosen after one of them have seen test data.
    """
    path = directory / OPENED
    entries: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    if config not in [entry["config"] for entry in entries]:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entries.append({"time": now, "config": config, "packages": dict(versions)})
        write_json(path, entries)
    known = [Opening(entry["time"], entry["config"]) for entry in entries]
    return tuple(known[: [one.config for one in known].index(config)])


def opening_note(earlier: tuple[Opening, ...]) -> str:
    """What the table says of it."""
    if not earlier:
        return (
            "Test data had not been opened with other settings before, and every row had its "
            "validation results first."
        )
    times = ", ".join(one.time for one in earlier)
    return (
        f"Test data had been opened before with other settings ({times}): rows or settings that "
        "were changed since were changed with test figures in sight."
    )


def write_json(path: Path, value: Any) -> None:
    """A JSON file that exists afterwards whole or, if killed, not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file that exists afterwards whole or, if killed, not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)
