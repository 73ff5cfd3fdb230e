"""Background conversations, which are the context of training texts and which a probe learns to let
pass.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np

from sidelight.data.examples import Example, Examples, LabelledExamples, balanced_order
from sidelight.data.labels import is_missing
from sidelight.data.loading import load_examples
from sidelight.data.near_duplicates import are_alike
from sidelight.errors import warn
from sidelight.models.conversation import Message

Messages = tuple[Message, ...]

# See NOTICE for the sources and licences of its rows.
PACKAGED = Path(__file__).with_name("background.jsonl.gz")
# Limits of characters and turns between the length strata.
_LENGTHS, _TURNS = (64, 256, 1024, 4096), (2, 5)
_WEIGHTS = (1.0, 1.0, 1.0, 3.0, 8.0)
# Cosine from which background counts as a labelled text, and the batch size of the comparison.
_SAME_TEXT, _COMPARED_TEXTS = 0.85, 5000
# Texts whose lengths differ by more than this factor are never near-duplicates.
_LONGER = 4
# Training warns about fewer conversations.
_FEW_CONVERSATIONS = 50


@dataclass(frozen=True)
class Background:
    """Background conversations, each ending with a turn that the assistant would answer.

    Attributes:
        conversations: Turns of each conversation; empty if training uses none.
        sources: Source of each conversation; "" means a source of its own. None if unknown.
    """

    conversations: tuple[Messages, ...] = ()
    sources: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.conversations)

    def select(self, rows: Iterable[int]) -> "Background":
        """Only these conversations, in this order."""
        rows, sources = [*rows], self.sources
        conversations = tuple(self.conversations[row] for row in rows)
        return replace(
            self,
            conversations=conversations,
            sources=sources and tuple(sources[row] for row in rows),
        )

    def split_into(self, count: int) -> list["Background"]:
        """Split the conversations into parts of similar size, keeping each source in one part.

        A held-out part is then as different from the rest as traffic that was never collected,
        because conversations of one source resemble each other.
        """
        rows_of: dict[object, list[int]] = {}
        for row, source in enumerate(self.sources or ("",) * len(self)):
            rows_of.setdefault(source or row, []).append(row)
        folds: list[list[int]] = [[] for _ in range(count)]
        for rows in sorted(rows_of.values(), key=len, reverse=True):
            min(folds, key=len).extend(rows)
        return [self.select(sorted(rows_of_fold)) for rows_of_fold in folds]


def load_background(name: str | Path) -> Background:
    """Load the named background traffic, in a balanced order.

    Every prefix has balanced numbers of conversations of each length, number of turns, kind and
    source, and a third to a half of the user's own.

    Args:
        name: A file with a column ``text`` of texts or chat messages, to which the packaged set is
            added, because few files have every length and kind; ``packaged`` for only that set; or
            ``none``. Columns ``kind`` and ``source`` are used if present.

    Raises:
        SidelightError: The file does not exist, or contains no text.
    """
    if name == "none":
        return Background()
    if name == "packaged":
        return _packaged(PACKAGED)
    return _balanced(load_examples(PACKAGED, label=None), load_examples(Path(name), label=None))


@cache
def _packaged(path: Path) -> Background:
    return _balanced(load_examples(path, label=None))


def _balanced(*sets: Examples) -> Background:
    """All conversations, with each set balanced over its own strata."""
    conversations: list[Messages] = []
    sources: list[str] = []
    strata: list[tuple[Hashable, ...]] = []
    weights: list[float] = []
    for number, examples in enumerate(sets):
        for item, cells in zip(examples.items, examples.rows, strict=True):
            turns = _request(tuple(item.messages))
            length, *features = _stratum(turns, cells, unknown=len(strata))
            strata.append((number, length, *features))
            # Only a third or an eighth of the conversations that take the most time.
            weights.append(_WEIGHTS[length])
            conversations.append(turns)
            source = cells.get("source")
            sources.append("" if is_missing(source) else str(source))
    background = Background(tuple(conversations), tuple(sources))
    return background.select(balanced_order(strata, weights=weights))


def _request(messages: Messages) -> Messages:
    """The turns up to the last one that the assistant would answer."""
    asked = [index for index, turn in enumerate(messages) if turn.role != "assistant"]
    return messages[: asked[-1] + 1] if asked else messages


def _stratum(
    turns: Messages, cells: Mapping[str, object], *, unknown: int
) -> tuple[int, *tuple[Hashable, ...]]:
    """The stratum of a conversation; unknown kinds and sources have their own."""
    characters = sum(len(turn.content) for turn in turns)
    named = (str(cells.get(column) or unknown) for column in ("kind", "source"))
    return int(np.digitize(characters, _LENGTHS)), int(np.digitize(len(turns), _TURNS)), *named


def choose_conversations(background: Background, examples: LabelledExamples) -> Background:
    """The background without conversations that contain a labelled text, with a warning."""
    conversations = background.conversations
    keys = {item.text_key for item in examples.items}
    turns = [[Example((turn,)).text_key for turn in messages] for messages in conversations]
    labelled = {*keys}
    lengths = [*map(len, keys)]
    shortest, longest = min(lengths) / _LONGER, max(lengths) * _LONGER
    compared = [key for key in {*chain(*turns)} if shortest <= len(key) <= longest]
    ordered = sorted(keys)
    for start in range(0, len(ordered), _COMPARED_TEXTS):
        batch = ordered[start : start + _COMPARED_TEXTS]
        is_alike = are_alike(compared, batch, cosine=_SAME_TEXT)
        labelled |= {compared[index] for index in np.flatnonzero(is_alike)}
    chosen = background.select(row for row, texts in enumerate(turns) if not labelled & {*texts})
    if left_out := len(conversations) - len(chosen):
        warn(
            f"{left_out} background conversations contain a labelled text and were left out, "
            "because background traffic counts as negative."
        )
    if 0 < len(chosen) < _FEW_CONVERSATIONS:
        warn(
            f"The background has only {len(chosen)} conversations, too few to estimate a "
            f"false-positive rate. Give {_FEW_CONVERSATIONS} or more (--background)."
        )
    return chosen
