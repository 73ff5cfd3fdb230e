"""Texts with or without labels, and how to split them."""

import hashlib
import json
import operator
from collections.abc import Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, SupportsIndex, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from sidelight.data.labels import is_missing
from sidelight.data.near_duplicates import NearDuplicates
from sidelight.errors import SidelightError, warn
from sidelight.models.conversation import Message, PlainText, Reads
from sidelight.types import Flags, Numbers, Span, Task, Values

# Rows that suffice to choose a threshold and a calibration.
_ENOUGH_VALIDATION_ROWS = 150


@dataclass(frozen=True, slots=True)
class Example:
    """One chat to classify. A text is a chat of one user message.

    Attributes:
        messages: The prompt, oldest turn first; at least one message has some text. A ``PlainText``
            is read without a chat template.
        response: The assistant's answer, for probes that read responses.
        place: Origin of the text, such as `train.jsonl, line 17`, or "". Ignored by equality.
    """

    messages: tuple[Message, ...] | PlainText
    response: str | None = None
    place: str = field(default="", compare=False)

    @property
    def text(self) -> str:
        """The contents of the prompt's messages, joined by newlines."""
        return "\n".join(message.content for message in self.messages)

    @property
    def span_text(self) -> str:
        """The text whose characters spans label: the response if there is one.

        Raises:
            SidelightError: There is no response, but several messages.
        """
        if self.response is not None:
            return self.response
        if len(self.messages) > 1:
            raise SidelightError(
                f"The text has {len(self.messages)} messages, but spans index the characters of "
                "a single one. Give a single text, or name the column of responses with "
                "--response (response= in Python)."
            )
        return self.text

    @property
    def text_key(self) -> str:
        """A key equal for prompts that differ only in case and spacing."""
        return " ".join(self.text.split()).casefold()

    @property
    def response_key(self) -> str:
        """A key equal for responses that differ only in case and spacing; "" without one."""
        return " ".join((self.response or "").split()).casefold()


def as_example(text: str | Example) -> Example:
    """A plain text as a conversation of one message."""
    return text if isinstance(text, Example) else Example((Message("user", text),))


def place_of(example: Example, index: int) -> str:
    """Where an example was read, or else its number in the call."""
    return example.place or f"Text {index + 1}"


@contextmanager
def located(example: Example, index: int) -> Generator[None]:
    """Prefix the message of any error raised inside with the place of the example."""
    try:
        yield
    except SidelightError as error:
        raise type(error)(f"{place_of(example, index)}: {error}") from error


@dataclass(frozen=True, slots=True)
class Skipped:
    """Number of rows of the source that were left out, and the place of the first empty one."""

    empty_text: int = 0
    missing_label: int = 0
    first_empty: str = ""


# Not typing.Self, which run-time shape checks refuse in a method that is checked individually.
_Rows = TypeVar("_Rows", bound="Examples")


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts in the order of their source. Compare two of them by `content_hash`.

    Attributes:
        items: The texts.
        rows: All cells of each text's row, as read.
        skipped: Rows left out by loading; none for a part made by `select` or `split`.
        compared: Near-duplicates, if the set that these were selected from was compared; None
            compares the texts when needed.
        group_columns: Columns whose equal values keep rows together in `split` and `folds`, like
            near-duplicates.
    """

    items: tuple[Example, ...]
    rows: tuple[Mapping[str, object], ...]
    skipped: Skipped = field(default_factory=Skipped)
    compared: NearDuplicates | None = None
    group_columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of texts, responses, label names and spans, in order.

        It does not depend on the file format.
        """
        digest = hashlib.sha256()
        for item, facts in zip(self.items, self._label_facts(), strict=True):
            turns = [[message.role, message.content] for message in item.messages]
            digest.update(json.dumps([turns, item.response, *facts]).encode() + b"\n")
        return digest.hexdigest()

    @property
    def full_texts(self) -> list[str]:
        """Each prompt, with its response if there is one."""
        return [
            item.text if item.response is None else f"{item.text}\n{item.response}"
            for item in self.items
        ]

    @property
    def sources(self) -> list[str]:
        """The column ``source`` of each row, up to its colon; "" for a row without one."""
        cells = (row.get("source") for row in self.rows)
        return ["" if is_missing(cell) else str(cell).partition(":")[0] for cell in cells]

    def select(self: _Rows, indices: Iterable[SupportsIndex]) -> _Rows:
        """The examples at these positions, in this order."""
        chosen = [operator.index(position) for position in indices]
        is_compared = "_near_duplicates" in self.__dict__ or self.compared is not None
        compared = self._near_duplicates.select(chosen) if is_compared else None
        return replace(self, skipped=Skipped(), compared=compared, **self._at(chosen))

    def split(self: _Rows, fraction: float, seed: int) -> tuple[_Rows, _Rows]:
        """Split into the examples to train on, and a held-out part; as for `hold_out`."""
        held_out = self.hold_out(fraction, seed)
        return self.select(np.setdiff1d(np.arange(len(self)), held_out)), self.select(held_out)

    def hold_out(self, fraction: float, seed: int) -> Int[Numbers, " _"]:
        """Row numbers, in order, of a part of about `fraction`.

        Each label keeps its share and, if it has two distinct texts, appears in both parts.
        Near-duplicates stay together, whatever their responses, and a warning counts them. If all
        examples have the same text, this holds for their responses instead.
        """
        if self.distinct < 2:
            raise SidelightError(
                "The examples cannot be split: all of them have the same text and the same "
                "response, if any. Add more texts."
            )
        held_out = _hold_out(self._grouping[0], self._strata(), fraction=fraction, seed=seed)
        self.warn_of_near_duplicates()
        return np.flatnonzero(held_out)

    def draw(self, count: int, seed: int) -> Int[Numbers, " _"]:
        """Row numbers, in order, of `count` random examples, or of all if there are fewer.

        Each label approximately keeps its share, and none is lost. A text with several labels
        counts towards the rarest of them.
        """
        if count >= len(self):
            return np.arange(len(self))
        strata = self._strata()
        rarest = np.where(strata, strata.sum(axis=0), len(self) + 1).argmin(axis=1)
        if len(np.unique(rarest)) > count:
            raise SidelightError(
                f"{count} examples are too few to contain all {len(np.unique(rarest))} labels. "
                "Raise the limit."
            )
        shuffled = np.random.default_rng(seed).permutation(len(self))
        rank = np.empty(len(self))
        for stratum in np.unique(rarest):
            members = shuffled[rarest[shuffled] == stratum]
            rank[members] = np.arange(len(members)) / len(members)
        # The first example of each label has rank 0, so these are drawn before all others.
        return np.sort(shuffled[np.argsort(rank[shuffled], kind="stable")[:count]])

    def folds(self, count: int, seed: int) -> tuple[Int[Numbers, " _"], ...]:
        """Row numbers of two or more folds, each drawn like the part that `split` holds out."""
        if self.distinct < count:
            raise SidelightError(
                f"{self.distinct} distinct texts cannot be split into {count} folds. Add more "
                "texts."
            )
        groups, strata = self._grouping[0], self._strata()
        left = np.arange(len(self))
        folds: list[Int[Numbers, " _"]] = []
        for remaining in range(count, 1, -1):
            remaining_groups = np.unique(groups[left], return_inverse=True)[1]
            held_out = _hold_out(remaining_groups, strata[left], fraction=1 / remaining, seed=seed)
            folds.append(left[held_out])
            left = left[~held_out]
        return (*folds, left)

    @property
    def distinct(self) -> int:
        """The number of groups of texts that `split` and `folds` keep together."""
        return int(self._grouping[0].max(initial=-1)) + 1

    @property
    def first_rows(self) -> Int[Numbers, " text"]:
        """The first row of each group of texts that `split` and `folds` keep together."""
        return np.unique(self._grouping[0], return_index=True)[1]

    def warn_of_near_duplicates(self) -> None:
        """Warn about texts that are near-duplicates of other texts, and the consequences."""
        groups, divided = self._grouping
        first = np.unique(self._near_duplicates.texts, return_index=True)[1]
        alike = int((np.bincount(groups[first])[groups] > 1).sum())
        shared = " or ".join(self.group_columns)
        share = f" or have the same {shared}" if shared else ""
        sentences = {
            f"{alike} texts are near-duplicates of others{share}. They stay in the same fold, or "
            "on the same side of a split.": alike,
            f"{divided} texts are near-duplicates of too many others{share} to stay in one fold. "
            "They are split across folds, so the metrics are too optimistic. Give texts that "
            "differ in more than a few words, or name a validation set (--validation, "
            "validation=).": divided,
        }
        for sentence, count in sentences.items():
            if count:
                warn(sentence)

    @cached_property
    def _near_duplicates(self) -> NearDuplicates:
        """Near-duplicates by text, or by response if all texts are the same."""
        if self.compared is not None:
            return self.compared
        keys = [item.text_key for item in self.items]
        if len(set(keys)) == 1:
            keys = [item.response_key for item in self.items]
        return NearDuplicates.among(keys)

    @cached_property
    def _grouping(self) -> tuple[Int[Numbers, " row"], int]:
        """The group of each row, which stays together, and the number of rows whose groups were
        divided.
        """
        columns = ([_group_of(cells, name) for cells in self.rows] for name in self.group_columns)
        return self._near_duplicates.joined_by(columns).groups(self._strata())

    def _at(self, rows: Sequence[int]) -> dict[str, Any]:
        """The fields with a value for each row, at these rows."""
        return {
            "items": tuple(self.items[row] for row in rows),
            "rows": tuple(self.rows[row] for row in rows),
        }

    def label_names(self) -> list[list[str]]:
        """The labels of each text; empty for texts without labels."""
        return [[] for _ in self.items]

    def _label_facts(self) -> list[list[object]]:
        """The label names of each text, followed by its spans, if any."""
        return [[names] for names in self.label_names()]

    def _strata(self) -> Bool[Flags, "row stratum"]:
        """The strata whose shares a split preserves: one per label, or a single one."""
        return np.ones((len(self), 1), dtype=np.bool_)


def _group_of(cells: Mapping[str, object], column: str) -> object:
    """The row's value in a group column; None if the cell is empty."""
    cell = cells.get(column)
    return None if is_missing(cell) else str(cell)


def _end_to_end(columns: Sequence[Any]) -> Any:
    """The values of all rows of several sets, which are tuples, arrays or, all of them, None."""
    if isinstance(columns[0], tuple):
        return tuple(chain.from_iterable(columns))
    return None if columns[0] is None else np.concatenate(columns)


_Labelled = TypeVar("_Labelled", bound="LabelledExamples")


@dataclass(frozen=True, eq=False, kw_only=True)
class LabelledExamples(Examples):
    """Labelled texts for training and evaluation.

    Attributes:
        task: The label space.
        labels: `[row]` of class indices (0/1 for a binary task), or `[row, label]` of 0/1 for a
            multi-label task.
        weights: Weight of each text in training; None if all are equal.
        default_mechanism: Name of the mechanism that ``auto`` stands for.
        cross_fitted_below: Training cross-fits fewer texts than these.
        takes_contexts: Whether training also shows the texts within background traffic.
    """

    task: Task
    labels: Int[Numbers, "row ..."]
    weights: Float[Values, " row"] | None = None

    default_mechanism: ClassVar[str] = "readout"
    cross_fitted_below: ClassVar[int] = 1000
    takes_contexts: ClassVar[bool] = True

    def of_texts(self) -> "LabelledExamples":
        """The same texts, of which only labels of whole texts are known."""
        return self

    def joined(self: _Labelled, appended: _Labelled) -> _Labelled:
        """These texts, then those of another set with the same task.

        Texts of a set without weights count as one each beside a set with weights.
        """
        sets = (self, appended)
        if len({each.weights is None for each in sets}) > 1:
            sets = [
                replace(each, weights=np.ones(len(each))) if each.weights is None else each
                for each in sets
            ]
        parts = [each._at(range(len(each))) for each in sets]
        columns = {
            name: _end_to_end([columns_of[name] for columns_of in parts]) for name in parts[0]
        }
        return replace(self, skipped=Skipped(), compared=None, **columns)

    def reads(self, chosen: Reads) -> Reads:
        """The tokens that a probe of these texts reads, given the user's choice.

        Raises:
            SidelightError: The labels do not describe these tokens.
        """
        return chosen

    @property
    def label_counts(self) -> Int[Numbers, " label"]:
        """The number of texts with each label of the task."""
        return self.task.holds(self.labels).sum(0)

    @property
    def count_by_label(self) -> dict[str, int]:
        """``label_counts`` by the labels' names."""
        return dict(zip(self.task.labels, self.label_counts.tolist(), strict=True))

    def label_names(self) -> list[list[str]]:
        names = self.task.labels
        holds = self.task.holds(self.labels)
        return [sorted(names[index] for index in np.flatnonzero(row)) for row in holds]

    def _at(self, rows: Sequence[int]) -> dict[str, Any]:
        return {
            **super()._at(rows),
            "labels": self.labels[np.asarray(rows, dtype=np.int64)],
            "weights": None if self.weights is None else self.weights[np.asarray(rows, np.int64)],
        }

    def _strata(self) -> Bool[Flags, "row stratum"]:
        """One stratum per label; if multi-label, one more for the rows where no label holds."""
        holds = self.task.holds(self.labels)
        return holds if self.labels.ndim == 1 else np.column_stack([holds, ~holds.any(axis=1)])


@dataclass(frozen=True, eq=False, kw_only=True)
class SpanExamples(LabelledExamples):
    """Texts with labelled spans, for probes that label tokens.

    A text has the labels that occur anywhere in it.

    Attributes:
        spans: Labelled spans of each ``Example.span_text``, in order.
    """

    spans: tuple[tuple[Span, ...], ...]

    default_mechanism: ClassVar[str] = "spans"
    cross_fitted_below: ClassVar[int] = 0
    takes_contexts: ClassVar[bool] = False

    @property
    def text_spans(self) -> list[tuple[str, tuple[Span, ...]]]:
        """For each row, the text whose characters are labelled, and its spans."""
        texts = (item.span_text for item in self.items)
        return list(zip(texts, self.spans, strict=True))

    def of_texts(self) -> LabelledExamples:
        values = {each.name: getattr(self, each.name) for each in fields(LabelledExamples)}
        return LabelledExamples(**values)

    def reads(self, chosen: Reads) -> Reads:
        side = "prompt" if self.items[0].response is None else "response"
        if chosen.side != side:
            raise SidelightError(
                f"The spans are labelled in each {side}, but the probe would read: {chosen.side}. "
                f"Set reads={side} (--set reads={side}), or leave reads out."
            )
        # The text of a template has no label.
        return Reads(side, template=False)

    def _at(self, rows: Sequence[int]) -> dict[str, Any]:
        return {**super()._at(rows), "spans": tuple(self.spans[row] for row in rows)}

    def _label_facts(self) -> list[list[object]]:
        facts = super()._label_facts()
        for row_facts, spans in zip(facts, self.spans, strict=True):
            row_facts[1:1] = [span.to_dict() for span in spans]
        return facts


def balanced_order(
    strata: Sequence[tuple[Hashable, ...]], *, weights: Sequence[float] = (), seed: int = 0
) -> list[int]:
    """An order of the rows in which every prefix has all values of a column about equally often.

    The next row is always one whose values have occurred least often so far.

    Args:
        strata: The values of each row, which decide its weight.
        weights: Number of rows that each row counts as; None counts each as one.
        seed: Seed that breaks ties between rows.
    """
    random = np.random.default_rng(seed)
    rows = random.permutation(len(strata))
    numbers: dict[tuple[int, Hashable], int] = {}
    codes = np.array(
        [
            [numbers.setdefault(pair, len(numbers)) for pair in enumerate(strata[row])]
            for row in rows.tolist()
        ]
    )
    kinds, kind_of = np.unique(codes, axis=0, return_inverse=True)
    members = [rows[kind_of == kind].tolist() for kind in range(len(kinds))]
    ties, taken = random.random(len(kinds)), np.zeros(len(numbers))
    weigh = [weights[rows[0]] if weights else 1.0 for rows in members]
    order: list[int] = []
    for _ in rows:
        best = int((taken[kinds].sum(1) + ties).argmin())
        order.append(members[best].pop())
        taken[kinds[best]] += weigh[best]
        if not members[best]:
            ties[best] = np.inf
    return order


def validation_share(rows: int) -> float:
    """The share of the rows to hold out for validation: 15 %, or up to 30 % if there are few."""
    return max(0.15, min(0.3, _ENOUGH_VALIDATION_ROWS / rows))


def _hold_out(
    groups: Int[Numbers, " row"],
    strata: Bool[Flags, "row stratum"],
    *,
    fraction: float,
    seed: int,
) -> Bool[Flags, " row"]:
    """Choose whole groups, rarest stratum first, until each stratum has its share held out.

    A greedy form of iterative stratification (Sechidis, Tsoumakas & Vlahavas 2011); with one label
    per row it is plain stratified sampling.

    Rows of one group, numbered from 0, stay together; each row is in at least one stratum. The seed
    determines the order in which groups are tried.
    """
    sizes = np.zeros((int(groups.max(initial=-1)) + 1, strata.shape[1]), dtype=np.int64)
    np.add.at(sizes, groups, strata)
    order = np.random.default_rng(seed).permutation(len(sizes))
    training, held_out = np.zeros((2, len(sizes)), dtype=np.bool_)
    for stratum in np.argsort(sizes.sum(axis=0), kind="stable"):
        counts = sizes[:, stratum]
        free = [group for group in order if counts[group] and not training[group] | held_out[group]]
        # Each side gets a group if possible.
        if free and not counts[training].any():
            training[free.pop(0)] = True
        missing = fraction * counts.sum() - counts[held_out].sum()
        if free and not counts[held_out].any():
            free.sort(key=counts.__getitem__)
            missing = max(missing, counts[free[0]])
        for group in free:
            held_out[group] = counts[group] <= round(missing)
            training[group] = not held_out[group]
            missing -= counts[group] * held_out[group]
    return held_out[groups]
