"""Spans of prompts and responses: conversion of token labels to character ranges.

A bank knows which tokens have a label; an engine knows the position of each token.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import compress

from sidelight.data.spans import final_characters, words
from sidelight.models.conversation import EncodedPrompt
from sidelight.probes.probe import Probe
from sidelight.types import Span, TokenLabel, Verdicts


def labels_spans(probes: Iterable[Probe]) -> bool:
    """Whether any of the probes labels spans, so that token positions are needed."""
    return any(probe.spans is not None for probe in probes)


def annotate_spans(verdicts: Verdicts, probes: Iterable[Probe], prompt: EncodedPrompt) -> Verdicts:
    """Add the spans to the verdicts on a text, if the positions of its tokens are known.

    The result has no verdicts on tools if it is unknown which turns are theirs.

    Args:
        verdicts: Verdicts from the bank.
        probes: The probes that classified the text.
        prompt: The text, with any response.
    """
    if not prompt.is_attributed:
        verdicts = replace(verdicts, tools=None)
    if not prompt.places:
        return verdicts
    messages = prompt.texts
    # The response is the last text; the prompt may be a single one.
    unnamed = {len(messages) - 1, *([0] if len(messages) == 2 else [])}
    by_name = {probe.name: probe for probe in probes}

    def as_sent(span: Span, message: int) -> Span:
        start, end = prompt.as_sent(message, span.start, span.end)
        named = None if message in unnamed else message
        return replace(span, start=start, end=end, message=named)

    def spans(name: str, labels: Iterable[TokenLabel]) -> tuple[Span, ...] | None:
        probe = by_name[name]
        is_read = prompt.mask(probe.reads).tolist()
        # By message, the positions of its tokens, and the index of each token among these.
        tokens: dict[int, list[tuple[int, int]]] = defaultdict(list)
        read: list[tuple[int, int] | None] = []
        for place in compress(prompt.places, is_read):
            if place is None:
                read.append(None)
            else:
                ranges = tokens[place.message]
                read.append((place.message, len(ranges)))
                ranges.append((place.start, place.end))
        by_message: dict[int, list[TokenLabel]] = defaultdict(list)
        for token, label, score in labels:
            if (found := read[token]) is None:
                return None
            message, number = found
            by_message[message].append((number, label, score))
        return tuple(
            as_sent(span, message)
            for message, ranges in sorted(by_message.items())
            for span in probe.span_rule.labelled_spans(
                messages[message], tokens[message], ranges, probe.task.output_labels
            )
        )

    return _with_spans(
        verdicts,
        by_name,
        {name: spans(name, labels) for name, labels in verdicts.token_labels.items()},
    )


class AnswerSpans:
    """The spans of a response that is being generated.

    The final part is processed only once; otherwise each token of a long response would process all
    of it.

    Args:
        probes: Probes that classify it.

    Attributes:
        text: The text so far.
        places: Position of each token whose characters are complete.
    """

    def __init__(self, probes: Iterable[Probe]):
        self._probes = {
            probe.name: probe for probe in probes if probe.spans and probe.reads.includes_response
        }
        lookaheads = (probe.mechanism.lookahead for probe in self._probes.values())
        self._lookahead = max(lookaheads, default=0)
        self.text = ""
        self.places: list[tuple[int, int]] = []
        self._pending = 0
        self._final_end = 0
        # By probe: the last word that is final, and the spans that begin before it.
        self._prefixes: dict[str, tuple[int, list[Span]]] = {name: (0, []) for name in self._probes}

    def push(self, text: str) -> None:
        """Add a token and the text that it completes; a character may consist of several tokens."""
        self._pending += 1
        if text:
            start = len(self.text)
            self.text += text
            self.places += [(start, len(self.text))] * self._pending
            self._pending = 0

    def annotate(self, verdicts: Verdicts) -> Verdicts:
        """Add the spans to the verdicts on the tokens so far."""
        spans: dict[str, tuple[Span, ...] | None] = {}
        for name, labels in verdicts.token_labels.items():
            if name in self._probes:
                final_words = words(self.text[self._prefixes[name][0] : self._final_end])
                if len(final_words) > 1:
                    first, last = (edge + self._prefixes[name][0] for edge in final_words[-1])
                    candidates = self._spans(name, labels, last)
                    earlier = [span for span in candidates if span.start < first]
                    self._prefixes[name] = first, earlier
                spans[name] = tuple(self._spans(name, labels, len(self.text)))
        return _with_spans(verdicts, self._probes, spans)

    def _spans(self, name: str, labels: Iterable[TokenLabel], end: int) -> list[Span]:
        """The spans of the text before ``end``, which is the end of a word."""
        probe, (start, earlier) = self._probes[name], self._prefixes[name]
        first = bisect_right(self.places, start, key=lambda place: place[1])
        stop = bisect_left(self.places, end, key=lambda place: place[0])
        rest = probe.span_rule.labelled_spans(
            self.text[start:end],
            [(place[0] - start, place[1] - start) for place in self.places[first:stop]],
            # The characters of later tokens are not complete.
            [(i - first, label, score) for i, label, score in labels if first <= i < stop],
            probe.task.output_labels,
        )
        # By label: the span that extends to the word from which the text is reprocessed.
        reaching = {span.label: span for span in earlier if span.end >= start}
        spans = [span for span in earlier if reaching.get(span.label) is not span]
        for span in rest:
            moved = replace(span, start=span.start + start, end=span.end + start)
            if span.start == 0 and (before := reaching.pop(span.label, None)) is not None:
                probability = max(before.probability or 0, moved.probability or 0)
                merged = self.text[before.start : moved.end]
                moved = replace(moved, start=before.start, probability=probability, words=merged)
            spans.append(moved)
        return sorted([*spans, *reaching.values()])

    def final_characters(self, tokens: int) -> int | None:
        """Number of leading characters whose spans are final; None without a span probe.

        Args:
            tokens: Number of tokens that the probes have read.
        """
        if not self._probes:
            return None
        final = max(0, tokens - self._lookahead)
        end = self.places[final][0] if final < len(self.places) else len(self.text)
        self._final_end = final_characters(self.text, end)
        return self._final_end


def _with_spans(
    text_verdicts: Verdicts,
    probes: Mapping[str, Probe],
    spans: Mapping[str, tuple[Span, ...] | None],
) -> Verdicts:
    verdicts = (
        verdict
        if (probe_spans := spans.get(verdict.probe)) is None
        else probes[verdict.probe].labelled_verdict(verdict, probe_spans)
        for verdict in text_verdicts.verdicts
    )
    return replace(text_verdicts, verdicts=tuple(verdicts))
