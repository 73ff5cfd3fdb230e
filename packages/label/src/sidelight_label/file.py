"""The files of a session: labels, the criterion, and a judge's answers.

Labels are rows in the format of ``sidelight train``, each written to disk before it counts.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sidelight.errors import SidelightError
from sidelight.judges.answers import AnswerFile
from sidelight.judges.settings import read_criterion
from sidelight.storage import replacing, sync, write_text


class LabelFile:
    """A JSON Lines file of labels. People's labels are appended; only judge rows are replaced.

    Each change replaces the file atomically, and is on disk before the call returns.

    Args:
        path: The file. If absent, it is created with its folder, and only its owner can read it.
        is_judge_row: Whether an existing row is a judge's; such rows are at the end, and
            ``replace_judge_rows`` replaces them.

    Raises:
        SidelightError: The file is not JSON Lines, or cannot be written.
    """

    def __init__(self, path: Path, is_judge_row: Callable[[Mapping[str, Any]], bool] | None = None):
        if path.suffix != ".jsonl":
            raise SidelightError(
                f"Labels are appended as JSON lines, but the file is '{path.name}'. Name a file "
                "that ends in .jsonl with --out."
            )
        self.path = path.resolve()
        self._seen = self._state()
        self._before = b"" if self._seen is None else self.path.read_bytes()
        if self._before and not self._before.endswith(b"\n"):
            self._before += b"\n"
        self._rows: tuple[bytes, ...] = ()
        self._judge_rows: tuple[bytes, ...] = ()
        if is_judge_row is not None:
            lines = self._before.splitlines(keepends=True)
            is_by_judge = [is_judge_row(_cells(line)) for line in lines]
            pairs = [*zip(lines, is_by_judge, strict=True)]
            self._judge_rows = tuple(line for line, is_judge_row in pairs if is_judge_row)
            self._before = b"".join(line for line, is_judge_row in pairs if not is_judge_row)
        if self._seen is None:
            self._write((), ())

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row.

        Raises:
            SidelightError: The row was not saved, because the disk is full or another program has
                changed the file.
        """
        self._write((*self._rows, _line(row)), self._judge_rows)

    def take_back(self) -> None:
        """Remove the row that was appended last.

        Raises:
            SidelightError: As for ``append``.
        """
        self._write(self._rows[:-1], self._judge_rows)

    def replace_judge_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace all of the judge's rows with these.

        Raises:
            SidelightError: As for ``append``.
        """
        is_by_judge = tuple(map(_line, rows))
        if is_by_judge != self._judge_rows:
            self._write(self._rows, is_by_judge)

    def _write(self, rows: Sequence[bytes], is_by_judge: Sequence[bytes]) -> None:
        try:
            with replacing(self.path) as partial:
                partial.touch(0o600)
                partial.write_bytes(self._before + b"".join((*rows, *is_by_judge)))
                sync(partial)
                self._require_unchanged()
                if self._seen is not None:
                    shutil.copymode(self.path, partial)
            sync(self.path.parent)
        except OSError as error:
            raise SidelightError(
                f"The labels were not saved to {self.path} ({error.strerror}). Free some space, or "
                "name another file with --out, and label the text again."
            ) from error
        self._rows, self._judge_rows, self._seen = tuple(rows), tuple(is_by_judge), self._state()

    def _require_unchanged(self) -> None:
        if self._state() != self._seen:
            raise SidelightError(
                f"Another program has changed {self.path}, so nothing is written to it. Stop "
                "'sidelight label' and start it again: it reads the file as it is now."
            )

    def _state(self) -> tuple[int, int, int] | None:
        try:
            state = self.path.stat()
        except FileNotFoundError:
            return None
        return state.st_ino, state.st_size, state.st_mtime_ns


class Criterion:
    """The labelling rule in English, and its file.

    Attributes:
        path: The file.
        text: Text of the rule.

    Raises:
        SidelightError: The file cannot be read, or is empty.
    """

    def __init__(self, path: Path):
        self.path = path
        self.text = read_criterion(path)

    def change(self, text: str, *, seen: str) -> None:
        """Write a new text to the file.

        Args:
            text: The new text.
            seen: The text that was edited.

        Raises:
            SidelightError: The new text is empty, the file has changed in the meantime, or it
                cannot be written.
        """
        if not text.strip():
            raise SidelightError("The criterion is empty. Write what a text must do to meet it.")
        if seen.strip() != self.text:
            raise SidelightError(
                "Another tab has changed the criterion. Copy your text, reload the page, and "
                "edit the new criterion."
            )
        if read_criterion(self.path) != self.text:
            raise SidelightError(
                f"Another program has changed {self.path}, so nothing is written to it. Stop "
                "'sidelight label' and start it again: it reads the file as it is now."
            )
        try:
            write_text(self.path, text.strip() + "\n")
        except OSError as error:
            raise SidelightError(
                f"The criterion was not saved to {self.path} ({error.strerror}). Free some "
                "space, and save it again."
            ) from error
        self.text = text.strip()


class ReviewFile(AnswerFile):
    """A judge's answers, and the blind samples as digests of texts."""

    def __init__(self, path: Path):
        self._samples: dict[str, list[list[str]]] = {}
        super().__init__(path)

    def sample(self, judge: str) -> list[list[str]] | None:
        """The strata of the blind sample of the judge with this digest; None if there is none."""
        return self._samples.get(judge)

    def keep_sample(self, judge: str, strata: list[list[str]]) -> None:
        """Add a sample, synced to disk."""
        self._append({"judge": judge, "sample": strata})
        self.sync()

    def _take(self, record: Mapping[str, Any]) -> None:
        if "sample" in record:
            strata = [[str(text) for text in each] for each in record["sample"]]
            self._samples[str(record["judge"])] = strata
        else:
            super()._take(record)


def _line(row: Mapping[str, Any]) -> bytes:
    # A lone surrogate in another cell is written as a JSON escape.
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _cells(line: bytes) -> Mapping[str, Any]:
    """The cells of a line; empty if it is blank or unreadable."""
    try:
        cells = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return cells if isinstance(cells, dict) else {}
