"""Labelled spans of a text: read off the scores of its tokens, and compared with others.

Knows characters and scores, and neither probes nor files.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float

from sidelight.calibration import Calibration
from sidelight.types import Flags, Task, Values

# A word, or a mark by itself.
_WORD = re.compile(r"\w+(?:['\N{RIGHT SINGLE QUOTATION MARK}]\w+)*|[^\w\s]")


@dataclass(frozen=True, order=True)
class Span:
    """Characters of a text that have a label.

    Attributes:
        start: The first, in Unicode code points.
        end: The one after the last.
        label: What they are.
        probability: Of their surest token, calibrated; None if somebody has labelled them.
    """

    start: int
    end: int
    label: str
    probability: float | None = field(default=None, compare=False)


def words(text: str) -> list[tuple[int, int]]:
    """The characters of each word, and of each mark that is part of none."""
    return [match.span() for match in _WORD.finditer(text)]


def token_labels(
    text: str, tokens: Sequence[tuple[int, int]], spans: Iterable[Span], labels: Sequence[str]
) -> Bool[Flags, "token label"]:
    """Which labels each token has: those of its characters, blanks around it aside.

    Args:
        text: The text.
        tokens: The characters of each token.
        spans: What is labelled.
        labels: Their order.
    """
    holds = labelled_characters(text, spans, labels)
    flags = np.zeros((len(tokens), len(labels)), dtype=np.bool_)
    for flag, (start, end) in zip(flags, tokens, strict=True):
        own = text[start:end]
        if own.strip():
            start, end = end - len(own.lstrip()), start + len(own.rstrip())
        flag[:] = holds[start:end].any(0)
    return flags


def labelled_characters(
    text: str, spans: Iterable[Span], labels: Sequence[str]
) -> Bool[Flags, "character label"]:
    """Which labels each character has."""
    holds = np.zeros((len(text), len(labels)), dtype=np.bool_)
    for span in spans:
        holds[span.start : span.end, labels.index(span.label)] = True
    return holds


def character_scores(
    text: str, tokens: Sequence[tuple[int, int]], scores: Float[Values, "token label"]
) -> Float[Values, "character label"]:
    """The score of each character: that of its word, which is its highest token's.

    Blanks between two words have the lower score of these, so that neighbours join; other
    characters, and words without a token, have 0.

    Args:
        text: The text.
        tokens: The characters of each token, in order.
        scores: Of each token, 0 or more.
    """
    found = np.zeros((len(text), scores.shape[1]))
    spans = words(text)
    # Tokens of parts of a character have the same characters; none ends before an earlier one.
    starts, ends = np.array([*tokens], dtype=np.int64).reshape(-1, 2).T
    for start, end in spans:
        first, last = np.searchsorted(ends, start, "right"), np.searchsorted(starts, end)
        if first < last:
            found[start:end] = scores[first:last].max(0)
    for (left, gap), (right, _) in pairwise(spans):
        found[gap:right] = np.minimum(found[left], found[right])
    return found


def within_margin(
    scores: Float[Values, " character"], margin: float | None
) -> Float[Values, " character"]:
    """The probabilities of characters, and 0 where the surest is surer by more than the margin.

    Nobody labels a weak word beside a strong one, and where all are weak, the strongest of them.
    """
    if margin is None:
        return scores
    highest = scores.max(initial=0.0)
    least = highest / (highest + (1 - highest) * np.exp(margin)) if highest else 0.0
    return np.where(scores >= least, scores, 0.0)


def read_spans(
    scores: Float[Values, "character label"], labels: Sequence[str], thresholds: Sequence[float]
) -> list[Span]:
    """The runs of characters whose score reaches the threshold of a label, in order."""
    spans: list[Span] = []
    for label, own, threshold in zip(labels, scores.T, thresholds, strict=True):
        # A character with a score of 0 is no part of a word that was read.
        reaches = np.concatenate([[False], (own >= threshold) & (own > 0), [False]])
        edges = np.flatnonzero(reaches[1:] != reaches[:-1]).tolist()
        spans += [
            Span(start, end, label, float(own[start:end].max()))
            for start, end in zip(edges[::2], edges[1::2], strict=True)
        ]
    return sorted(spans)


@dataclass(frozen=True)
class SpanRule:
    """How the logits of a text's tokens become spans.

    Attributes:
        calibration: From the logits of a token to probabilities.
        thresholds: The probability from which each label holds.
        margins: How far, in log-odds, a word may be below the surest of its text; None: any.
    """

    calibration: Calibration
    thresholds: tuple[float, ...]
    margins: tuple[float | None, ...]

    def fits(self, task: Task) -> bool:
        """Whether it has a threshold between 0 and 1 for each label of a task."""
        calibration = self.calibration
        parts = (self.thresholds, self.margins, calibration.scale, calibration.shift)
        is_complete = {*map(len, parts)} == {task.outputs}
        return is_complete and all(0 <= least <= 1 for least in self.thresholds)

    def spans(
        self,
        text: str,
        tokens: Sequence[tuple[int, int]],
        logits: Float[Values, "token label"],
        labels: Sequence[str],
    ) -> list[Span]:
        """The spans of a text, in order; the arguments are those of the functions above."""
        return self.read(character_scores(text, tokens, self.calibration.apply(logits)), labels)

    def read(self, scores: Float[Values, "character label"], labels: Sequence[str]) -> list[Span]:
        """The spans of a text by the probabilities of its characters."""
        columns = [
            within_margin(own, margin) for own, margin in zip(scores.T, self.margins, strict=True)
        ]
        return read_spans(np.stack(columns, 1), labels, self.thresholds)


def character_f1(
    actual: Bool[Flags, "character ..."], predicted: Bool[Flags, "character ..."]
) -> float:
    """The F1 of a text's characters (SemEval-2021 task 5, Pavlopoulos et al. 2021).

    It is 1 if neither has any, and 0 if only one has.
    """
    total = int(actual.sum()) + int(predicted.sum())
    return 2 * int((actual & predicted).sum()) / total if total else 1.0


def threshold_f1(
    actual: Sequence[Bool[Flags, " character"]],
    scores: Sequence[Float[Values, " character"]],
    thresholds: Float[Values, " threshold"],
) -> Float[Values, " threshold"]:
    """The mean of ``character_f1`` over texts, at each of some thresholds above 0."""
    sums = np.zeros(len(thresholds))
    for holds, own in zip(actual, scores, strict=True):
        flagged, hits = (
            len(part) - np.searchsorted(np.sort(part), thresholds) for part in (own, own[holds])
        )
        total = holds.sum() + flagged
        sums += np.where(total > 0, 2 * hits / np.maximum(total, 1), 1.0)
    return sums / max(len(actual), 1)
