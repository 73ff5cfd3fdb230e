"""Ready guards: packaged training texts and tests, each set described by a card.

``guard:injection`` can be used in place of a data file, ``guard:injection,mine.jsonl`` adds the
user's rows, and ``guard:injection:agentdojo`` names a test. Packages provide guards through entry
points of the group ``sidelight.guards``: the name of a guard, and the package whose resources are
its card ``NAME.toml``, ``NAME/train.jsonl.gz`` and ``NAME/test_*.jsonl.gz``.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, PositiveInt, ValidationError

from sidelight.data.examples import LabelledExamples, balanced_order
from sidelight.data.labels import TRUTH, is_missing, label_name
from sidelight.data.readers import Row, is_list, is_mapping, read_file, read_rows
from sidelight.errors import SidelightError, did_you_mean, how_to_install
from sidelight.extensions import extension_names, find_extension
from sidelight.types import Task, is_label

_GROUP = "sidelight.guards"
PREFIX = "guard:"
_PACKAGED = ("harmful", "injection", "pii", "refusal", "toxicity")
# The user's rows together count as much as all packaged rows, within these limits of the weight of
# a row.
_LEAST_WEIGHT, _MOST_WEIGHT = 2.0, 10.0


class Origin(BaseModel, extra="forbid", frozen=True):
    """Source and licence of some texts."""

    licence: str
    where: str


def _require_classes(labels: tuple[str, str]) -> tuple[str, str]:
    if labels[0] == labels[1] or not all(map(is_label, labels)):
        raise ValueError("expected two different names, each on one line")
    return labels


class TestCard(Origin, frozen=True):
    """A packaged test; ``drawn`` describes which of its rows are packaged, if not all."""

    title: str
    drawn: str = ""


class Card(BaseModel, extra="forbid", frozen=True):
    """The description of a guard; see docs/guards.md for an example.

    Attributes:
        labels: Negative and positive class; None if the guard labels spans.
        version: Version of the texts; it changes with the texts or the threshold of the trained
            probe.
        groups: Columns whose equal values keep rows in the same fold, such as the source document.
        sources: Origins of the training texts, by the column ``source``.
    """

    title: str
    positive: str
    reads: Literal["prompt", "response"]
    version: PositiveInt = 1
    labels: Annotated[tuple[str, str], AfterValidator(_require_classes)] | None = None
    groups: tuple[str, ...] = ()
    noise: str
    languages: str
    limits: tuple[str, ...]
    sources: Mapping[str, Origin]
    tests: Mapping[str, TestCard] = {}

    @property
    def columns(self) -> dict[str, str | None]:
        """The value of each option that names a column or a class."""
        return {
            "text": "text",
            "label": "label",
            "response": "response" if self.reads == "response" else None,
            "spans": "spans" if self.labels is None else None,
            "positive": self.labels and self.labels[1],
        }


@dataclass(frozen=True)
class Guard:
    """The texts named by ``guard:...``.

    Attributes:
        name: Name of the guard.
        card: Its description.
        folder: Folder of its files.
        test: Name of a test; None means the training texts.
        user_file: File of additional rows from the user.
    """

    name: str
    card: Card
    folder: Path
    test: str | None = None
    user_file: str | None = None

    def rows(self, task: Task | None = None) -> list[Row]:
        """The rows, with the class names of the card or of another binary task.

        If the task has other names, its positive class corresponds to that of the card.
        """
        stem = "train" if self.test is None else f"test_{self.test}"
        rows = read_file(self.folder / f"{stem}.jsonl.gz")
        if self.user_file is not None:
            user_rows = read_rows(self.user_file, split=None, text="text", label="label")
            weight = _user_weight(len(rows), len(user_rows))
            rows += [replace(self._adapted(row), weight=weight) for row in user_rows]
        if (labels := self.card.labels) is None:
            return rows
        has_renamed_labels = (
            task is not None and task.kind == "binary" and {*task.labels} != {*labels}
        )
        names = task.labels if task is not None and has_renamed_labels else labels
        index = {**TRUTH, labels[0]: False, labels[1]: True}
        for place, row in enumerate(rows):
            cell = row.cells.get("label")
            # Other names are refused later, together with all wrong labels.
            if not is_missing(cell) and (name := label_name(cell, row.place)) in index:
                rows[place] = replace(row, cells={**row.cells, "label": names[index[name]]})
        return rows

    def require(self, **options: str | None) -> None:
        """Refuse columns or a class that contradict the card; None is always accepted."""
        for option, value in options.items():
            wanted = self.card.columns.get(option)
            if value not in (None, wanted):
                raise SidelightError(
                    f"--{option} {value} contradicts the card of the guard '{self.name}', which "
                    f"has {wanted or 'none'}. Leave --{option} out ({option}= in Python)."
                )

    def _adapted(self, row: Row) -> Row:
        """A row with ``messages`` converted to ``text`` and a separate response."""
        cells, columns = {**row.cells}, self.card.columns
        if cells.get("text") is None:
            cells["text"] = cells.get("messages")
        turns, reads = cells["text"], columns["response"]
        last = turns[-1] if is_list(turns) and turns else None
        is_open = reads is not None and cells.get(reads) is None
        if is_open and is_mapping(last) and last.get("role") == "assistant":
            assert is_list(turns)
            cells |= {"text": turns[:-1], "response": last.get("content")}
        elif columns["spans"] and reads is None and is_list(turns) and len(turns) > 1:
            raise SidelightError(
                f"{row.place}: {len(turns)} messages, but spans index the characters of a single "
                "one. Give each message a row of its own."
            )
        wanted = [name for name in ("text", reads, columns["spans"] or "label") if name]
        if missing := [name for name in wanted if name not in cells or cells["text"] is None]:
            raise SidelightError(
                f"{row.place}: no column '{missing[0]}'. Your rows for the guard '{self.name}' "
                f"need {', '.join(wanted)}. A list of messages can replace the text; its last "
                "message can be the response."
            )
        return replace(row, cells=cells)


def _user_weight(packaged: int, users: int) -> float:
    """Training weight of each of the user's rows."""
    return min(_MOST_WEIGHT, max(_LEAST_WEIGHT, packaged / max(1, users)))


def guard_names() -> list[str]:
    """The names of the installed guards."""
    return extension_names(_GROUP)


def find_guard(name: str) -> Guard:
    """An installed guard.

    Raises:
        SidelightError: No guard or several guards have this name, or its card is not valid.
    """
    package = find_extension(_GROUP, name)
    if package is None and name in _PACKAGED:
        raise SidelightError(
            f"The guard '{name}' belongs to the package sidelight-guards, which is not installed. "
            f"{how_to_install('./packages/guards')}"
        )
    if package is None:
        raise SidelightError(f"There is no guard '{name}'.{did_you_mean(name, guard_names())}")
    try:
        # For a package without code, files() is not a path, but a file in it is.
        path = Path(str(files(package.value) / f"{name}.toml"))
    except Exception as error:  # Code of other packages may raise anything.
        raise SidelightError(
            f"Cannot read the package '{package.value}' of the guard '{name}' ({error}). Fix the "
            "package or uninstall it."
        ) from error
    try:
        card = Card.model_validate(tomllib.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise SidelightError(f"Cannot read the card {path} ({reason}). Correct it.") from error
    return Guard(name, card, path.with_name(name))


def guard_of(source: object) -> Guard | None:
    """Parse ``guard:NAME``, ``guard:NAME,FILE`` or ``guard:NAME:TEST``; None for other sources.

    Raises:
        SidelightError: The guard or the test does not exist.
    """
    if not isinstance(source, str) or not source.startswith(PREFIX):
        return None
    head, comma, user_file = source.removeprefix(PREFIX).partition(",")
    name, colon, test = head.partition(":")
    if user_file.strip().startswith(PREFIX):
        raise SidelightError(
            f"'{source}' names two guards, but data belongs to one guard. Train each separately "
            "with `sidelight guard --only NAME,NAME`."
        )
    guard = find_guard(name)
    if comma and (colon or not user_file):
        raise SidelightError(
            f"Cannot read '{source}'. Write guard:NAME, guard:NAME,FILE to add your own rows to "
            "the training texts, or guard:NAME:TEST for a test."
        )
    if colon and test not in guard.card.tests:
        raise SidelightError(
            f"The guard '{name}' has no test '{test}'.{did_you_mean(test, guard.card.tests)}"
        )
    return replace(guard, test=test if colon else None, user_file=user_file if comma else None)


def span_column(source: object, spans: str | None) -> str | None:
    """The column of spans: the given one, or else that of a guard that labels spans."""
    guard = guard_of(source)
    return spans if guard is None else spans or guard.card.columns["spans"]


def draw_texts(
    examples: LabelledExamples,
    count: int | None = None,
    *,
    sizes: Sequence[int] = (),
    most: int = 0,
    seed: int = 0,
) -> LabelledExamples:
    """Draw some of the packaged texts, balanced by label and by source and label.

    All of the user's rows are kept, with the weight that fits the number of packaged texts.

    Args:
        examples: Examples of a guard, possibly with the user's rows.
        count: Number of texts to draw; None draws as many as fit within ``most``.
        sizes: Size of each text.
        most: Limit on the total size of the drawn texts.
        seed: Seed of the draw.
    """
    is_users = np.zeros(len(examples)) if examples.weights is None else examples.weights > 1
    packaged, users = np.flatnonzero(is_users == 0), np.flatnonzero(is_users)
    # All background counts as one source, because its many sources would outweigh the others.
    sources, labels = examples.sources, examples.label_names()
    # If both were balanced separately, sources with both labels would contribute only positives
    # next to many negative sources, and the probe would learn the style of a source instead of the
    # label.
    strata = [((sources[row], *labels[row]), tuple(labels[row])) for row in packaged]
    order = packaged[balanced_order(strata, seed=seed)]
    if count is None:
        count = int(np.searchsorted(np.cumsum(np.asarray(sizes)[order]), most, side="right"))
    rows = np.sort(order[:count])
    weights = np.array([1.0] * len(rows) + [_user_weight(len(rows), len(users))] * len(users))
    drawn = examples.select([*rows, *users])
    return replace(drawn, weights=weights if len(users) else None)
