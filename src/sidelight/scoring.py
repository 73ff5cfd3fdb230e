"""Classification by a probe: logits, spans, and metrics on labelled rows or on a guard's tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from sklearn.metrics import roc_auc_score

from sidelight.data.evaluation import Report, SpanReport, evaluate, evaluate_spans
from sidelight.data.examples import Example, LabelledExamples, SpanExamples, located
from sidelight.data.guards import find_guard
from sidelight.data.spans import character_scores
from sidelight.models.conversation import EncodedPrompt
from sidelight.models.encode import PromptEncoder
from sidelight.probes.bank import Bank
from sidelight.probes.probe import Probe, ProbeOutput
from sidelight.states.extraction import text_logits
from sidelight.states.reader import Backbone
from sidelight.statistics.metrics import Predictions, decide
from sidelight.statistics.thresholds import OperatingPoint, operating_curves
from sidelight.training.encoding import span_places
from sidelight.training.measuring import trained_texts, warn_of_trained_texts
from sidelight.training.tfidf import fit_tfidf
from sidelight.training.traffic import excerpt
from sidelight.training.validation import require_side
from sidelight.types import Span

_LISTED_MISTAKES = 5


def encode(
    encoder: PromptEncoder, examples: Sequence[Example], *, with_places: bool = False
) -> list[EncodedPrompt]:
    """Encode the examples as token ids, optionally with the characters of each token.

    Raises:
        ContextLengthError: A text exceeds the backbone's context length.
        SidelightError: A text cannot be rendered.
    """
    prompts: list[EncodedPrompt] = []
    for index, example in enumerate(examples):
        with located(example, index):
            prompts.append(
                encoder.encode(example.messages, example.response, with_places=with_places)
            )
    return prompts


def classify(backbone: Backbone, probe: Probe, examples: Sequence[Example]) -> list[ProbeOutput]:
    """Return a probe's output for each text.

    Raises:
        ContextLengthError: A text is longer than the backbone reads.
        SidelightError: The probe reads responses and a text has none, or it finds spans in prompts
            and a text has a response.
        VerdictError: A logit is not finite; the message names the first text with one.
    """
    require_side(probe.card, examples)
    return _classify_prompts(backbone, probe, examples, encode(backbone.encoder, examples))


def _classify_prompts(
    backbone: Backbone,
    probe: Probe,
    examples: Sequence[Example],
    prompts: Sequence[EncodedPrompt],
) -> list[ProbeOutput]:
    bank = Bank([probe], device=backbone.device)
    (outputs,) = text_logits(backbone, bank, prompts)
    for index, text in enumerate(outputs):
        with located(examples[index], index):
            probe.require_finite(text.logits)
    return outputs


def probe_logits(
    backbone: Backbone, probe: Probe, examples: Sequence[Example]
) -> Float[np.ndarray, "text output"]:
    """A probe's logits of each text; the errors are those of ``classify``."""
    outputs = classify(backbone, probe, examples)
    return np.reshape([text.logits for text in outputs], (len(outputs), probe.task.outputs))


def find_spans(
    backbone: Backbone, probe: Probe, examples: Sequence[Example]
) -> tuple[Float[np.ndarray, "text output"], list[list[Span]]]:
    """The logits of whole texts, and the spans in each, from one forward pass.

    Raises:
        ContextLengthError: A text is longer than the backbone reads.
        VerdictError: A logit is not finite.
        SidelightError: The probe reads responses and a text has none, or the reverse.
    """
    scored = score_characters(backbone, probe, examples)
    logits = np.reshape([text.logits for text, _ in scored], (len(examples), probe.task.outputs))
    labels = probe.task.output_labels
    return logits, [probe.span_rule.read(scores, labels) for _, scores in scored]


def score_characters(
    backbone: Backbone, probe: Probe, examples: Sequence[Example]
) -> list[tuple[ProbeOutput, Float[np.ndarray, "character label"]]]:
    """The output of a span probe for each text, and the probabilities of its characters."""
    calibration = probe.span_rule.calibration
    texts: list[str] = []
    for index, example in enumerate(examples):
        with located(example, index):
            texts.append(example.span_text)
    require_side(probe.card, examples)
    prompts = encode(backbone.encoder, examples, with_places=True)
    outputs = _classify_prompts(backbone, probe, examples, prompts)
    tokens = [calibration.apply(text.tokens) for text in outputs if text.tokens is not None]
    places = span_places(examples, prompts, [*map(len, tokens)])
    scores = map(character_scores, texts, places, tokens)
    return list(zip(outputs, scores, strict=True))


class Mistake(NamedTuple):
    """An error on a label, with the beginning of the text."""

    label: str
    is_missed: bool
    probability: float
    text: str


@dataclass(frozen=True)
class Assessment:
    """The result of measuring a probe on whole texts.

    Attributes:
        examples: The labelled rows.
        probe: The probe.
        probabilities: Its probabilities for the rows.
        report: Metrics on whole texts.
    """

    examples: LabelledExamples
    probe: Probe
    probabilities: Float[np.ndarray, "row output"]
    report: Report

    @property
    def headline(self) -> Report | SpanReport:
        """Metrics of what is labelled: whole texts, or spans."""
        return self.report

    @property
    def operating_points(self) -> list[OperatingPoint]:
        """Alternative thresholds measured on these rows; empty except for a binary probe."""
        task, labels = self.probe.task, self.examples.labels
        if task.kind != "binary" or len(np.unique(labels)) < 2:
            return []
        (curve,) = operating_curves(task, self.probabilities, labels).values()
        return curve.operating_points()

    def to_dict(self) -> dict[str, Any]:
        """The metrics at the top level, as JSON values."""
        return {
            "probe": self.probe.name,
            "mechanism": self.probe.card.mechanism.name,
            **self._metrics(),
            "operating_points": [point._asdict() for point in self.operating_points],
        }

    def _metrics(self) -> dict[str, Any]:
        flagged, conversations = self.probe.card.training.flagged
        traffic = {"flagged": flagged, "conversations": conversations}
        return {**self.report.to_dict(), "traffic": traffic}

    def test_results(
        self, score_words: Callable[[LabelledExamples], Float[np.ndarray, " text"]]
    ) -> dict[str, Any]:
        """The metrics that the tests of a guard record.

        Args:
            score_words: Scores of TF-IDF, compared at the same number of false positives.
        """
        examples, probe = self.examples, self.probe
        positive = examples.labels == 1
        flags = self.probabilities[:, 0] >= probe.thresholds[0]
        scores = score_words(examples)
        alarms, negatives = int(flags[~positive].sum()), np.sort(scores[~positive])[::-1]
        highest = [*negatives, -np.inf][alarms]
        has_both = 0 < positive.sum() < len(positive)
        return {
            "positives": int(positive.sum()),
            "found": int(flags[positive].sum()),
            "false_positives": alarms,
            "auroc": self.report.metrics["auroc"].to_dict(),
            "tfidf_auroc": float(roc_auc_score(positive, scores)) if has_both else None,
            "tfidf_found": int((scores[positive] > highest).sum()) if has_both else None,
        }

    def plot(self, folder: Path) -> None:
        """Draw the probe's plots."""
        from sidelight.data.plots import plot_report

        plot_report(self._predictions, folder, title=self.probe.name)

    @property
    def _predictions(self) -> Predictions:
        probe, labels = self.probe, self.examples.labels
        return decide(probe.task, self.probabilities, labels, thresholds=probe.thresholds)

    @property
    def mistakes(self) -> list[Mistake]:
        """The errors in which the probe was most confident."""
        task, probabilities, thresholds = self.probe.task, self.probabilities, self.probe.thresholds
        predictions = self._predictions
        holds = predictions.targets[:, predictions.headline]
        is_wrong = predictions.decisions[:, predictions.headline] != holds
        if task.kind == "multiclass":
            # Two of its labels are wrong; the one that it names counts.
            is_wrong &= ~holds
        distances = np.where(is_wrong, np.abs(probabilities - np.array(thresholds or 0)), 0)
        order = np.argsort(-distances, axis=None, kind="stable")[:_LISTED_MISTAKES].tolist()
        worst = [divmod(place, task.outputs) for place in order if distances.flat[place]]
        names = task.output_labels
        return [
            Mistake(
                names[output],
                bool(holds[row, output]),
                float(probabilities[row, output]),
                excerpt(self.examples.items[row].text),
            )
            for row, output in worst
        ]


@dataclass(frozen=True)
class SpanAssessment(Assessment):
    """The result of measuring a probe that labels spans.

    Attributes:
        spans: Span metrics.
    """

    spans: SpanReport

    @property
    def headline(self) -> SpanReport:
        return self.spans

    @property
    def operating_points(self) -> list[OperatingPoint]:
        """None: the thresholds of whole texts do not decide on spans."""
        return []

    def _metrics(self) -> dict[str, Any]:
        return {**self.spans.to_dict(), "full_texts": self.report.to_dict()}

    def test_results(
        self, score_words: Callable[[LabelledExamples], Float[np.ndarray, " text"]]
    ) -> dict[str, Any]:
        del score_words
        return self.spans.to_dict()


def assess(backbone: Backbone, probe: Probe, examples: LabelledExamples) -> Assessment:
    """Measure a probe on labelled rows.

    Args:
        backbone: The model that the probe was trained on.
        probe: The probe.
        examples: Rows loaded with the task of the probe's card, and with spans for a span probe.

    Raises:
        SidelightError: The probe and the texts do not fit each other.
    """
    warn_of_trained_texts(probe.card.training, examples)
    if isinstance(examples, SpanExamples) and probe.spans is not None:
        return _assess_spans(backbone, probe, examples)
    return assess_logits(probe, examples, probe_logits(backbone, probe, examples.items))


def assess_logits(
    probe: Probe, examples: LabelledExamples, logits: Float[np.ndarray, "text output"]
) -> Assessment:
    """Measure a probe on whole texts whose logits are known."""
    probabilities = probe.calibration.apply(logits)
    predictions = decide(probe.task, probabilities, examples.labels, thresholds=probe.thresholds)
    return Assessment(examples, probe, probabilities, evaluate(predictions))


def _assess_spans(backbone: Backbone, probe: Probe, examples: SpanExamples) -> SpanAssessment:
    logits, found = find_spans(backbone, probe, examples.items)
    spans = evaluate_spans(examples, found)
    # The label of a span holds for its text, regardless of the text's own probability.
    names = [{span.label for span in found_spans} for found_spans in found]
    limits = [*zip(probe.task.output_labels, probe.thresholds, strict=True)]
    row_thresholds = np.array(
        [[0.0 if x in text_labels else t for x, t in limits] for text_labels in names]
    )
    probabilities = probe.calibration.apply(logits)
    predictions = decide(
        probe.task,
        probabilities,
        examples.labels,
        thresholds=probe.thresholds,
        row_thresholds=row_thresholds,
    )
    return SpanAssessment(examples, probe, probabilities, evaluate(predictions), spans)


@dataclass(frozen=True)
class GuardTests:
    """The packaged tests of a guard, for measuring the guard and TF-IDF.

    Attributes:
        texts: Training texts of the guard and of TF-IDF.
        tests: Texts by name of the test.
    """

    texts: LabelledExamples
    tests: dict[str, LabelledExamples]

    @cached_property
    def _tfidf(self) -> Any:
        return fit_tfidf(self.texts.full_texts, self.texts.labels, self.texts.task)

    def measure(self, backbone: Backbone, probe: Probe, test: str) -> dict[str, Any]:
        """Measure a probe on a test, next to TF-IDF at the same number of false positives."""
        return self.results(assess(backbone, probe, self.tests[test]), test)

    def results(self, assessment: Assessment, test: str) -> dict[str, Any]:
        """As ``measure``, from an assessment."""
        probe, examples = assessment.probe, assessment.examples
        results = {
            "title": find_guard(probe.name).card.tests[test].title,
            "rows": len(examples),
            "trained": trained_texts(probe.card.training, examples),
            # Identifies stale results of another probe, or of a corrected test.
            "probe": probe.version,
            "texts_sha256": examples.content_hash,
        }
        return results | assessment.test_results(self._score_words)

    def _score_words(self, examples: LabelledExamples) -> Float[np.ndarray, " text"]:
        return self._tfidf.logits(examples.full_texts)[:, 0]
