"""Ready guards: packaged training texts and tests, each set with a card that says what it is.

``guard:injection`` stands wherever a data file does, ``guard:injection,mine.jsonl`` adds rows of
one's own, and ``guard:injection:agentdojo`` names a test. Packages offer guards by entry points of
the group ``sidelight.guards``: the name of a guard, and the package whose resources are its card
``NAME.toml``, ``NAME/train.jsonl.gz`` and ``NAME/test_*.jsonl.gz``.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sidelight.data.examples import LabelledExamples, balanced_order
from sidelight.data.labels import TRUTH, is_missing, label_name
from sidelight.data.readers import Row, is_list, is_mapping, read_file, read_rows
from sidelight.errors import SidelightError, did_you_mean
from sidelight.types import Task

_GROUP, _PREFIX = "sidelight.guards", "guard:"
_PACKAGE = "sidelight-guards"
_PACKAGED = ("harmful", "injection", "pii", "refusal", "toxicity")
# Rows of one's own count as much as all packaged ones together, but none more than so many.
_MOST_WEIGHT = 10.0


class Origin(BaseModel):
    """Where texts are from, and under which licence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    licence: Annotated[str, Field(min_length=1)]
    where: Annotated[str, Field(min_length=1)]


class TestCard(Origin):
    """A packaged test.

    Attributes:
        title: What it is, in a line.
        drawn: Which of its rows are packaged; "": all.
    """

    title: str
    drawn: str = ""


class Card(BaseModel):
    """What a guard is.

    Attributes:
        title: Its name for people.
        positive: What is positive, in a sentence.
        reads: The side that it judges.
        labels: The negative and the positive class; None if it labels spans.
        noise: How many labels are doubtful.
        languages: Those of the training texts.
        limits: What it cannot do, in sentences.
        sources: Of the training texts, by the column ``source``.
        tests: By name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    positive: str
    reads: Literal["prompt", "response"]
    labels: tuple[str, str] | None = None
    noise: str
    languages: str
    limits: tuple[str, ...]
    sources: Mapping[str, Origin]
    tests: Mapping[str, TestCard] = {}

    @property
    def response(self) -> str | None:
        """The column of answers."""
        return "response" if self.reads == "response" else None

    @property
    def spans(self) -> str | None:
        """The column of spans."""
        return "spans" if self.labels is None else None

    @property
    def task(self) -> Task | None:
        """The label space; None if spans name theirs."""
        return None if self.labels is None else Task("binary", self.labels)


@dataclass(frozen=True)
class Guard:
    """Packaged texts.

    Attributes:
        name: As ``guard:NAME`` names it.
        card: What it is.
        folder: Holds its files.
    """

    name: str
    card: Card
    folder: Path

    def training(self, own: str | None = None) -> list[Row]:
        """The training texts, and rows of one's own, which count more."""
        packaged = read_file(self.folder / "train.jsonl.gz")
        if own is None:
            return packaged
        given = read_rows(own, split=None, text="text", label="label")
        weight = min(_MOST_WEIGHT, max(1.0, len(packaged) / len(given)))
        return [*packaged, *(replace(self._adapted(row), weight=weight) for row in given)]

    def test(self, name: str) -> list[Row]:
        """The rows of a packaged test."""
        if name not in self.card.tests:
            raise SidelightError(
                f"The guard '{self.name}' has no test '{name}'."
                f"{did_you_mean(name, self.card.tests)}"
            )
        return read_file(self.folder / f"test_{name}.jsonl.gz")

    def _adapted(self, row: Row) -> Row:
        """A row with ``messages`` as one with ``text``, and their answer in a column of its own."""
        cells = dict(row.cells)
        messages = cells.get("messages")
        if cells.get("text") is None and is_list(messages):
            last = messages[-1] if messages else None
            if self.card.response and "response" not in cells and is_mapping(last):
                if last.get("role") != "assistant":
                    raise SidelightError(
                        f"{row.place}: the guard '{self.name}' reads answers, but the last message "
                        f"is of the role '{last.get('role')}'. End with the assistant's answer, or "
                        "give it in a column 'response'."
                    )
                cells["response"], messages = last.get("content"), messages[:-1]
            cells["text"] = messages
        wanted = [name for name in ("text", self.card.response, self.card.spans or "label") if name]
        if missing := [name for name in wanted if name not in cells]:
            raise SidelightError(
                f"{row.place}: no column '{missing[0]}'. Rows beside the guard '{self.name}' have "
                f"{', '.join(wanted)}; messages may stand for the text and its answer."
            )
        return replace(row, cells=cells)


def guard_names() -> list[str]:
    """The guards that are installed."""
    return sorted(entry_points(group=_GROUP).names)


def find_guard(name: str) -> Guard:
    """An installed guard.

    Raises:
        SidelightError: There is none of this name, or its card is wrong.
    """
    packages = {entry.value for entry in entry_points(group=_GROUP, name=name)}
    if not packages and name in _PACKAGED:
        raise SidelightError(
            f"The guard '{name}' belongs to the package {_PACKAGE}, which is not installed. "
            f"Run `pip install {_PACKAGE}`."
        )
    if not packages:
        raise SidelightError(f"There is no guard '{name}'.{did_you_mean(name, guard_names())}")
    if len(packages) > 1:
        raise SidelightError(
            f"Several packages have a guard '{name}': {', '.join(sorted(packages))}. Uninstall all "
            "but one."
        )
    folder = Path(str(files(packages.pop())))
    path = folder / f"{name}.toml"
    try:
        card = Card.model_validate(tomllib.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise SidelightError(
            f"Cannot read the card {path} ({reason}). Install the package again, or correct it."
        ) from error
    return Guard(name, card, folder / name)


@dataclass(frozen=True)
class GuardData:
    """What ``guard:...`` names.

    Attributes:
        guard: The guard.
        test: The name of a test; None: the training texts.
        own: A file of rows beside these.
    """

    guard: Guard
    test: str | None = None
    own: str | None = None

    @property
    def card(self) -> Card:
        return self.guard.card

    def rows(self, task: Task | None) -> list[Row]:
        """The rows, with the class names of the card, or of another task of two classes."""
        guard, labels = self.guard, self.card.labels
        rows = guard.training(self.own) if self.test is None else guard.test(self.test)
        if labels is None:
            return rows
        names = task.labels if task is not None and task.kind == "binary" else labels
        index = {name: int(truth) for name, truth in TRUTH.items()} | {labels[0]: 0, labels[1]: 1}
        renamed: list[Row] = []
        for row in rows:
            cell = row.cells.get("label")
            number = None if is_missing(cell) else index.get(label_name(cell, row.place))
            # Another name is refused where all labels are.
            cells = row.cells if number is None else {**row.cells, "label": names[number]}
            renamed.append(replace(row, cells=cells))
        return renamed

    def require(self, **given: str | None) -> None:
        """Refuses columns, or a class, that contradict the card; None contradicts nothing.

        Raises:
            SidelightError: The message names the option, as the command line calls it.
        """
        card = self.card
        wanted = {"text": "text", "label": "label", "response": card.response, "spans": card.spans}
        wanted["positive"] = card.labels and card.labels[1]
        for option, value in given.items():
            if value not in (None, wanted.get(option)):
                raise SidelightError(
                    f"--{option} {value} contradicts the card of the guard '{self.guard.name}', "
                    f"which has {wanted.get(option) or 'none'}. Leave it out ({option}= in Python)."
                )


def guard_data(source: object) -> GuardData | None:
    """What ``guard:NAME``, ``guard:NAME,FILE`` or ``guard:NAME:TEST`` names; None of other sources.

    Raises:
        SidelightError: There is no such guard, or no such test.
    """
    if not isinstance(source, str) or not source.startswith(_PREFIX):
        return None
    head, comma, own = source.removeprefix(_PREFIX).partition(",")
    name, colon, test = head.partition(":")
    guard = find_guard(name)
    if comma and (colon or not own):
        raise SidelightError(
            f"Cannot read '{source}'. Write guard:NAME, guard:NAME,FILE to add rows of your own to "
            "the training texts, or guard:NAME:TEST for a test."
        )
    if colon:
        guard.test(test)
    return GuardData(guard, test if colon else None, own if comma else None)


def draw_texts(examples: LabelledExamples, count: int) -> LabelledExamples:
    """So many of a guard's texts, balanced over sources and labels; the same ones each time."""
    # All background is one source: its many would outweigh the others.
    sources = (str(cells.get("source")).partition(":")[0] for cells in examples.rows)
    strata = zip(sources, map(tuple, examples.label_names()), strict=True)
    drawn = examples.select(sorted(balanced_order([*strata])[:count]))
    return replace(drawn, warnings=examples.warnings)
