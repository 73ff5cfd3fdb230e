"""Labelled spans of a text: extraction from token scores, and comparison with other spans.

Works on characters and scores, independent of probes and files.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

from sidelight.statistics.calibration import Calibration
from sidelight.types import Flags, Span, Task, TokenLabel, Values

# Scripts without spaces between words, where each character counts as a word: Thai to Lao, Myanmar,
# Khmer, kana and Han.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
_LETTER = rf"[^\W{_UNSPACED}]"
_APOSTROPHE = "['\N{RIGHT SINGLE QUOTATION MARK}]"
# Accents, vowel signs, joiners and soft hyphens belong to the preceding letter (Unicode annex 29,
# rule WB4); a zero-width space does not. Restricted to the basic plane, for which sets are fast.
_EXTENSIONS = "".join(
    character
    for character in map(chr, range(0x80, 0x10000))
    if unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf") and character != "\u200b"
)
# A word, or a single punctuation mark.
_WORD = re.compile(
    rf"{_LETTER}+(?:[{_EXTENSIONS}]+{_LETTER}*|{_APOSTROPHE}{_LETTER}+)*|[{_UNSPACED}]|[^\w\s]"
)
_UNFINISHED_WORD = re.compile(rf"{_LETTER}|{_APOSTROPHE}|[{_EXTENSIONS}]")


def words(text: str) -> list[tuple[int, int]]:
    """The character ranges of words, and of punctuation marks outside words."""
    return [match.span() for match in _WORD.finditer(text)]


def token_labels(
    text: str, tokens: Sequence[tuple[int, int]], spans: Iterable[Span], labels: Sequence[str]
) -> Bool[Flags, "token label"]:
    """The labels of each token: the labels of its characters, ignoring surrounding spaces.

    Args:
        text: The text.
        tokens: The characters of each token.
        spans: The labelled spans.
        labels: The labels in order.
    """
    holds = labelled_characters(text, spans, labels)
    flags = np.zeros((len(tokens), len(labels)), dtype=np.bool_)
    for flag, (start, end) in zip(flags, tokens, strict=True):
        token_text = text[start:end]
        if token_text.strip():
            start, end = end - len(token_text.lstrip()), start + len(token_text.rstrip())
        flag[:] = holds[start:end].any(0)
    return flags


def labelled_characters(
    text: str, spans: Iterable[Span], labels: Sequence[str]
) -> Bool[Flags, "character label"]:
    """The labels of each character."""
    holds = np.zeros((len(text), len(labels)), dtype=np.bool_)
    for span in spans:
        holds[span.start : span.end, labels.index(span.label)] = True
    return holds


def character_scores(
    text: str, tokens: Sequence[tuple[int, int]], scores: Float[Values, "token label"]
) -> Float[Values, "character label"]:
    """The score of each character, which is the highest token score of its word.

    Spaces between two words have the lower of their scores, so that adjacent words join; other
    characters, and words without a token, have 0.

    Args:
        text: The text.
        tokens: The characters of each token, in order.
        scores: Score of each token, 0 or more.
    """
    ranges = np.array([*words(text)], dtype=np.int64).reshape(-1, 2)
    # Tokens of parts of a character cover the same characters; none ends before an earlier one.
    starts, ends = np.array([*tokens], dtype=np.int64).reshape(-1, 2).T
    first, stop = (
        np.searchsorted(ends, ranges[:, 0], "right"),
        np.searchsorted(starts, ranges[:, 1]),
    )
    # A row for each word, between rows for what precedes and what follows it.
    segment_scores = np.zeros((2 * len(ranges) + 1, scores.shape[1]))
    of_words = segment_scores[1::2]
    if (has_token := first < stop).any():
        # The maximum from first to stop; the rows between two words are left out.
        edges = np.stack([first, stop], 1)[has_token].ravel()
        padded = np.vstack([scores, np.zeros((1, scores.shape[1]))])
        of_words[has_token] = np.maximum.reduceat(padded, edges)[::2]
    segment_scores[2:-1:2] = np.minimum(of_words[:-1], of_words[1:])
    return np.repeat(segment_scores, np.diff(ranges.ravel(), prepend=0, append=len(text)), axis=0)


def within_margin(
    scores: Float[Values, " character"], margin: float | None
) -> Float[Values, " character"]:
    """The probabilities of characters, set to 0 if below the maximum by more than the margin.

    Annotators do not label a weak word next to a strong one, but label the strongest where all are
    weak.
    """
    if margin is None:
        return scores
    highest = scores.max(initial=0.0)
    least = highest / (highest + (1 - highest) * np.exp(margin)) if highest else 0.0
    return np.where(scores >= least, scores, 0.0)


@dataclass(frozen=True)
class SpanRule:
    """The rule by which the logits of a text's tokens become spans.

    Attributes:
        calibration: Map from the logits of a token to probabilities.
        thresholds: Lowest probability at which each label holds.
        margins: Maximum distance of a word from the most confident word of its text, in log-odds;
            None for no limit.
    """

    calibration: Calibration
    thresholds: tuple[float, ...]
    margins: tuple[float | None, ...]

    def fits(self, task: Task) -> bool:
        """Whether each label of a task has a threshold between 0 and 1, and a margin."""
        return (
            self.calibration.fits(task)
            and len(self.thresholds) == len(self.margins) == task.outputs
            and all(0 <= least <= 1 for least in self.thresholds)
            and all(margin is None or margin >= 0 for margin in self.margins)
        )

    def token_labels(
        self, logits: Float[Values, "token label"], labels: Sequence[str]
    ) -> list[TokenLabel]:
        """The tokens that reach the threshold of a label; no other token can be part of a span."""
        probabilities = self.calibration.apply(logits)
        return [
            (token, labels[label], float(probabilities[token, label]))
            for token, label in np.argwhere(probabilities >= self.thresholds).tolist()
        ]

    def labelled_spans(
        self,
        text: str,
        tokens: Sequence[tuple[int, int]],
        token_labels: Iterable[TokenLabel],
        labels: Sequence[str],
    ) -> list[Span]:
        """The spans of a text, from only the labels of its tokens."""
        scores = np.zeros((len(tokens), len(labels)))
        for token, label, probability in token_labels:
            scores[token, labels.index(label)] = probability
        if not scores.any():
            return []
        spans = self.read(character_scores(text, tokens, scores), labels)
        return [replace(span, words=text[span.start : span.end]) for span in spans]

    def read(self, scores: Float[Values, "character label"], labels: Sequence[str]) -> list[Span]:
        """Extract the runs of characters whose probability reaches the threshold of a label, in
        order.
        """
        spans: list[Span] = []
        label_scores = zip(labels, self.within_margins(scores).T, self.thresholds, strict=True)
        for label, character_scores, threshold in label_scores:
            # A character with a score of 0 belongs to no word that was read.
            reaches = np.concatenate(
                [[False], (character_scores >= threshold) & (character_scores > 0), [False]]
            )
            edges = np.flatnonzero(reaches[1:] != reaches[:-1]).tolist()
            spans += [
                Span(start, end, label, float(character_scores[start:end].max()))
                for start, end in zip(edges[::2], edges[1::2], strict=True)
            ]
        return sorted(spans)

    def within_margins(
        self, scores: Float[Values, "character label"]
    ) -> Float[Values, "character label"]:
        """``within_margin`` of each label's probabilities."""
        pairs = zip(scores.T, self.margins, strict=True)
        return np.stack([within_margin(label_scores, margin) for label_scores, margin in pairs], 1)


def final_characters(text: str, characters: int) -> int:
    """Number of leading characters of a growing text whose spans are final.

    A word counts once it is complete, and the spaces after it count once the next word is complete.

    Args:
        text: The text so far.
        characters: Number of characters whose tokens have final labels.
    """
    if characters == len(text) or _UNFINISHED_WORD.match(text, characters):
        while characters and _UNFINISHED_WORD.match(text, characters - 1):
            characters -= 1
    return len(text[:characters].rstrip())


def character_f1(
    actual: Bool[Flags, "character ..."], predicted: Bool[Flags, "character ..."]
) -> float:
    """The character F1 of a text (SemEval-2021 task 5, Pavlopoulos et al. 2021).

    It is 1 if neither side has spans, and 0 if only one side has.
    """
    total = int(actual.sum()) + int(predicted.sum())
    return 2 * int((actual & predicted).sum()) / total if total else 1.0


def threshold_f1(
    actual: Sequence[Bool[Flags, " character"]],
    scores: Sequence[Float[Values, " character"]],
    thresholds: Float[Values, " threshold"],
) -> Float[Values, " threshold"]:
    """Mean of ``character_f1`` over the texts at each of the thresholds, which are above 0."""
    sums = np.zeros(len(thresholds))
    for holds, label_scores in zip(actual, scores, strict=True):
        flagged, hits = (
            len(values) - np.searchsorted(np.sort(values), thresholds)
            for values in (label_scores, label_scores[holds])
        )
        total = holds.sum() + flagged
        sums += np.where(total > 0, 2 * hits / np.maximum(total, 1), 1.0)
    return sums / max(len(actual), 1)
