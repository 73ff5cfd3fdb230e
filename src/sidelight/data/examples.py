"""A text cell as the messages of a chat. Knows no labels and no chat template.

The examples that a probe learns from or is measured on. Knows no file format.
"""

import hashlib
import json
import operator
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Int

from sidelight.data.readers import is_list, is_mapping, plain, require_whole_characters
from sidelight.data.splitting import Flags, Numbers, hold_out, indicators
from sidelight.errors import SidelightError, did_you_mean
from sidelight.prompts import Message
from sidelight.types import Task


def parse_chat(cell: object, *, place: str) -> tuple[Message, ...]:
    """The messages of a text cell: a string is one user message, a list is a chat.

    Args:
        cell: A string, a list of objects with `role` and `content`, or None.
        place: Where the cell stands, for the error message.

    Returns:
        No message at all when the cell holds nothing but white space.

    Raises:
        SidelightError: The cell is neither, or its characters are not valid Unicode.
    """
    cell = plain(cell)
    if not is_list(cell):
        cell = [{"role": "user", "content": cell}]
    messages = tuple(_parse_message(message, place) for message in cell)
    return messages if any(message.content.strip() for message in messages) else ()


def parse_text(cell: object, *, place: str) -> str:
    """The text of a cell that must be a string; None is the empty text.

    Raises:
        SidelightError: The cell is not a string, or its characters are not valid Unicode.
    """
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise SidelightError(
            f"{place}: expected a text (a string, or a list of messages), got {_shown(cell)}. "
            "Quote it, or name the right column."
        )
    require_whole_characters(cell, place=place)
    return cell


def _parse_message(message: object, place: str) -> Message:
    role = message.get("role") if is_mapping(message) else None
    if not (is_mapping(message) and isinstance(role, str) and role and "content" in message):
        raise SidelightError(
            f"{place}: expected messages such as {{'role': 'user', 'content': 'Hello'}}, "
            f"got {_shown(message)}."
        )
    content = plain(message["content"])
    if is_list(content):
        return Message(role, _join_parts(content, place))
    return Message(role, parse_text(content, place=place))


def _join_parts(parts: Sequence[object], place: str) -> str:
    """The text of a message whose content is a list of OpenAI content parts."""
    for part in parts:
        if not (is_mapping(part) and part.get("type") == "text"):
            raise SidelightError(
                f"{place}: a probe reads text only, but a message has the part {_shown(part)}. "
                "Remove the parts that are not of type 'text'."
            )
    return "\n".join(
        parse_text(part.get("text"), place=place) for part in parts if is_mapping(part)
    )


def _shown(value: object) -> str:
    """A cell's value, short enough for an error message."""
    return repr(value)[:80]


Labels = Int[Numbers, "row ..."]


@dataclass(frozen=True, slots=True)
class Example:
    """One chat to classify. A plain text is a chat of one user message.

    Attributes:
        messages: The prompt, oldest turn first; at least one has some text.
        response: The assistant's answer, for probes that read responses.
        place: Where it stood, such as `train.jsonl, line 17`; empty if nowhere. It makes no
            difference to equality.
    """

    messages: tuple[Message, ...]
    response: str | None = None
    place: str = field(default="", compare=False)

    @property
    def text(self) -> str:
        """The contents of the prompt's messages, joined by newlines."""
        return "\n".join(message.content for message in self.messages)

    @property
    def text_key(self) -> str:
        """The same for prompts that differ in case and spacing only."""
        return _folded(self.text)


def place_of(example: Example, index: int) -> str:
    """Where an example stood, or its number among those that are judged together.

    Args:
        example: With or without a place.
        index: Its position among them, from 0.
    """
    return example.place or f"Text {index + 1}"


@contextmanager
def located(example: Example, index: int) -> Generator[None]:
    """Begins the message of an error about one example with `place_of` it."""
    try:
        yield
    except SidelightError as error:
        raise type(error)(f"{place_of(example, index)}: {error}") from error


@dataclass(frozen=True, slots=True)
class Skipped:
    """How many rows of the source were left out, by reason.

    Attributes:
        empty_text: Rows without a text or response.
        missing_label: Rows without a label.
        first_empty: Where the first row without a text or response stood.
    """

    empty_text: int = 0
    missing_label: int = 0
    first_empty: str = ""


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples in the order of their source, with their labels.

    Compare two of them by `content_hash`.

    Attributes:
        items: The texts.
        task: The label space; None when loaded without labels or a task.
        labels: `[row]` class index (0/1 for a binary task), or `[row, label]` of 0/1 for a
            multi-label task; None when loaded without labels.
        rows: All cells of each example's row, as read.
        skipped: What loading left out; zero for a part made by `select` or `split`.
        warnings: What the user should know of the data, one sentence each; a part made by
            `select` or `split` has its own, not those of the whole.
    """

    items: tuple[Example, ...]
    task: Task | None
    labels: Labels | None
    rows: tuple[Mapping[str, object], ...]
    skipped: Skipped = field(default_factory=Skipped)
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.items)

    @cached_property
    def content_hash(self) -> str:
        """Sha256 over texts, responses and label names, in order; the same for every format."""
        digest = hashlib.sha256()
        for item, names in zip(self.items, self._label_names(), strict=True):
            turns = [[message.role, message.content] for message in item.messages]
            digest.update(json.dumps([turns, item.response, names]).encode() + b"\n")
        return digest.hexdigest()

    def column(self, name: str) -> tuple[object, ...]:
        """One cell of each row, None where the row lacks it; for reports on a subset.

        Raises:
            SidelightError: No row has the column.
        """
        if not any(name in row for row in self.rows):
            known = {key for row in self.rows for key in row}
            raise SidelightError(
                f"The examples have no column '{name}'.{did_you_mean(name, known)}"
            )
        return tuple(row.get(name) for row in self.rows)

    def select(self, indices: Iterable[SupportsIndex]) -> "Examples":
        """The examples at these positions, in this order."""
        chosen = [operator.index(position) for position in indices]
        return Examples(
            items=tuple(self.items[position] for position in chosen),
            task=self.task,
            labels=None if self.labels is None else self.labels[chosen],
            rows=tuple(self.rows[position] for position in chosen),
        )

    def split(self, fraction: float, seed: int) -> tuple["Examples", "Examples"]:
        """Two parts: the examples to train on, and about `fraction` of them held out.

        Each label keeps its share and, where it has two distinct texts, appears on both sides.
        Texts that differ only in case and spacing stay together, whatever their responses; where
        all examples have one text, responses that do stay together. A label with a single text
        stays in the first part, which then carries a warning.

        Args:
            fraction: Share to hold out, above 0 and below 1.
            seed: Decides which examples are held out.

        Raises:
            SidelightError: The fraction is out of range, or there are no two distinct texts.
        """
        if not 0 < fraction < 1:
            raise SidelightError(
                f"Cannot hold out {fraction} of the examples: choose 0 < share < 1."
            )
        if self.distinct < 2:
            raise SidelightError(
                "Cannot split: all examples have the same text, and the same response if any. "
                "Add more texts."
            )
        groups = self._text_groups()
        held_out = hold_out(groups, self._strata(), fraction=fraction, seed=seed)
        training = self.select(np.flatnonzero(~held_out))
        warned = replace(training, warnings=self._lonely_labels(groups))
        return warned, self.select(np.flatnonzero(held_out))

    def draw(self, count: int, seed: int) -> Int[Numbers, " _"]:
        """Row numbers of so many examples, or of all if there are fewer, in their order.

        Each label keeps about its share, and none is lost. A text with several labels counts for
        its rarest.

        Args:
            count: How many.
            seed: Decides which.

        Raises:
            SidelightError: There are more labels than examples to draw.
        """
        if count >= len(self):
            return np.arange(len(self))
        strata = self._strata()
        sizes = strata.sum(axis=0)
        rarest = np.where(strata, sizes, len(self) + 1).argmin(axis=1)
        if len(np.unique(rarest)) > count:
            raise SidelightError(
                f"{count} examples cannot show {len(np.unique(rarest))} labels. Use more (--limit)."
            )
        shuffled = np.random.default_rng(seed).permutation(len(self))
        place = np.empty(len(self))
        for stratum in np.unique(rarest):
            own = shuffled[rarest[shuffled] == stratum]
            place[own] = np.arange(len(own)) / len(own)
        # The first of every label has place 0, so all of these are drawn before any other.
        return np.sort(shuffled[np.argsort(place[shuffled], kind="stable")[:count]])

    def folds(self, count: int, seed: int) -> tuple[Int[Numbers, " _"], ...]:
        """Row numbers of `count` parts, each drawn as `split` draws its held-out part.

        Args:
            count: Parts, 2 or more.
            seed: Decides which example is in which part.

        Raises:
            SidelightError: There are fewer distinct texts than parts.
        """
        groups, strata = self._text_groups(), self._strata()
        if self.distinct < count:
            raise SidelightError(f"Cannot make {count} parts of fewer texts. Add more texts.")
        left = np.arange(len(self))
        parts: list[Int[Numbers, " _"]] = []
        for remaining in range(count, 1, -1):
            own = np.unique(groups[left], return_inverse=True)[1]
            held_out = hold_out(own, strata[left], fraction=1 / remaining, seed=seed)
            parts.append(left[held_out])
            left = left[~held_out]
        return (*parts, left)

    @property
    def distinct(self) -> int:
        """How many texts there are that `split` and `folds` can part."""
        return int(self._text_groups().max(initial=-1)) + 1

    def _label_names(self) -> list[list[str]]:
        if self.labels is None or self.task is None:
            return [[] for _ in self.items]
        names = self.task.labels
        chosen = self.labels[:, None] if self.labels.ndim == 1 else self.labels
        if self.task.kind == "multilabel":
            return [sorted(names[index] for index in np.flatnonzero(row)) for row in chosen]
        return [[names[index] for index in row] for row in chosen]

    def _text_groups(self) -> Int[Numbers, " row"]:
        """Number of each example's text, or of its response where all have the same text."""
        numbers: dict[str, int] = {}
        keys = [item.text_key for item in self.items]
        if len(set(keys)) == 1:
            keys = [_folded(item.response or "") for item in self.items]
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)

    def _strata(self) -> Bool[Flags, "row stratum"]:
        """What a split keeps the shares of: the labels; without labels, all rows as one."""
        if self.labels is None or self.task is None:
            return np.ones((len(self), 1), dtype=np.bool_)
        return indicators(self.labels, classes=len(self.task.labels))

    def _lonely_labels(self, groups: Int[Numbers, " row"]) -> tuple[str, ...]:
        names = self.task.labels if self.task else ()
        texts = [len(np.unique(groups[column])) for column in self._strata().T]
        # Not strict: the last stratum of a multi-label task is no label.
        return tuple(
            f"Label '{name}' has only one distinct text: it stays in the training part."
            for name, count in zip(names, texts, strict=False)
            if count == 1
        )


def _folded(text: str) -> str:
    """The text without what case and spacing tell."""
    return " ".join(text.split()).casefold()
