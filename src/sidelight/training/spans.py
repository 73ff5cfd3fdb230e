"""Selection and calibration of a span probe.

Every token of a text is an example. Candidates with different lookaheads are trained together, and
held-out texts decide among them.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sidelight.data.evaluation import SpanReport, evaluate_spans
from sidelight.data.examples import SpanExamples
from sidelight.data.spans import (
    SpanRule,
    character_scores,
    labelled_characters,
    threshold_f1,
    token_labels,
    within_margin,
    words,
)
from sidelight.statistics.calibration import fit_calibration, suggested_calibration
from sidelight.statistics.thresholds import F1, OperatingCurve, ThresholdRule
from sidelight.training.dataset import Split, TokenPlaces
from sidelight.training.optimisation import TrainingRun
from sidelight.training.validation import FOLDS
from sidelight.types import Span

LOOKAHEADS = (0, 1, 2, 4)
# In log-odds. Responses have no margin, because they are redacted before the most confident word is
# known.
MARGINS = (None, 3.0, 2.0, 1.5, 1.25, 1.0, 0.75)
# A candidate with a larger lookahead must improve character F1 by this much, because it classifies
# later.
_LEAST_GAIN = 0.003

# The probabilities or logits of each text's tokens, ``[token, label]``.
TokenScores = Sequence[Float[np.ndarray, "_ label"]]


def choose_lookahead(
    candidates: Sequence[TrainingRun], measured: Split
) -> tuple[TrainingRun, dict[str, float]]:
    """The run with the smallest lookahead that is as good as the best, and the character F1 of
    each.
    """
    examples, scores = measured.span_examples, dict[str, float]()
    for run in candidates:
        _, report = calibrate_spans(
            examples, measured.places, run.token_logits, rule=F1, bootstrap=0
        )
        f1 = [metrics["character_f1"].value or 0.0 for metrics in report.per_label.values()]
        scores[str(run.mechanism.lookahead)] = float(np.mean(f1))
    least = max(scores.values()) - _LEAST_GAIN
    pairs = zip(candidates, scores.values(), strict=True)
    return next(run for run, score in pairs if score >= least), scores


def calibrate_spans(
    examples: SpanExamples,
    places: TokenPlaces,
    logits: TokenScores,
    *,
    rule: ThresholdRule,
    bootstrap: int = 1000,
) -> tuple[SpanRule, SpanReport]:
    """Calibrate the tokens of held-out texts, choose thresholds, and measure fold by fold.

    Args:
        examples: The texts.
        places: Character range of each text's tokens.
        logits: Logits of these tokens.
        rule: Objective of the thresholds: ``f1`` applies to characters, and the rates of the others
            to words, so ``fpr=0.005`` means 5 false positives in 1,000 words.
        bootstrap: As for ``evaluate_spans``.
    """
    task, labels = examples.task, examples.task.output_labels
    texts, spans_of = zip(*examples.text_spans, strict=True)
    rows = list(zip(texts, places, spans_of, logits, strict=True))
    holds = np.concatenate(
        [token_labels(text, ranges, spans, labels) for text, ranges, spans, _ in rows]
    )
    calibration = fit_calibration(
        suggested_calibration(task), np.concatenate(logits), task.labels_of(holds), task
    )
    scores = [character_scores(text, ranges, calibration.apply(z)) for text, ranges, _, z in rows]
    actual = [labelled_characters(text, spans, labels) for text, _, spans, _ in rows]
    of_words = [words(text) for text in texts]
    margins = MARGINS if examples.items[0].response is None else MARGINS[:1]

    def rule_of(chosen: Sequence[int]) -> SpanRule:
        """The rule with the best thresholds and margins on these texts."""
        decisions = [decision(label, chosen) for label in range(len(labels))]
        return SpanRule(calibration, *zip(*decisions, strict=True))

    def decision(label: int, chosen: Sequence[int]) -> tuple[float, float | None]:
        starts = [(i, start, end) for i in chosen for start, end in of_words[i]]
        curve = OperatingCurve.of(
            np.array([scores[i][start, label] for i, start, _ in starts]),
            np.array([actual[i][start:end, label].any() for i, start, end in starts]),
        )
        if rule.kind != "f1" or not curve.positives:
            # A word's highest token says too much of it for the calibration to have a say.
            return curve.threshold(rule, prior_texts=0), None
        points = np.array(curve.thresholds)
        holds = [actual[i][:, label] for i in chosen]
        utilities = np.array(
            [
                threshold_f1(
                    holds, [within_margin(scores[i][:, label], margin) for i in chosen], points
                )
                for margin in margins
            ]
        )
        margin, point = np.unravel_index(utilities.argmax(), utilities.shape)
        return float(points[point]), margins[margin]

    full_rule = rule_of(range(len(rows)))
    predicted: list[list[Span]] = [[]] * len(rows)
    count = min(FOLDS, examples.distinct)
    folds = examples.folds(count, seed=0) if count > 1 else (np.arange(len(rows)),)
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(rows)), fold).tolist()
        rule_of_rest = rule_of(rest) if rest else full_rule
        for i in fold.tolist():
            predicted[i] = rule_of_rest.read(scores[i], labels)
    return full_rule, evaluate_spans(examples, predicted, bootstrap=bootstrap)
