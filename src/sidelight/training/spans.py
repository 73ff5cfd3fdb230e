"""Trains probes that label spans of a text, and finds the spans of texts.

Every token of a text is an example. Candidates that look ahead by different numbers of tokens train
side by side, and left-out texts decide among them.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from sidelight.artifact import save_probe
from sidelight.backbone import TransformersBackbone
from sidelight.bank import Bank
from sidelight.calibration import fit_calibration, suggested_calibration
from sidelight.data.examples import Example, located
from sidelight.data.spans import SpanExamples, span_text
from sidelight.errors import SidelightError
from sidelight.evaluation import (
    Report,
    SpanReport,
    evaluate_spans,
)
from sidelight.mechanisms.base import mechanism_spec
from sidelight.mechanisms.spans import Spans
from sidelight.probe import Probe
from sidelight.progress import progress
from sidelight.prompts import Reads
from sidelight.ragged import Ragged, by_length
from sidelight.spans import (
    SpanRule,
    character_scores,
    labelled_characters,
    threshold_f1,
    token_labels,
    within_margin,
    words,
)
from sidelight.states.extraction import StateSource
from sidelight.storage import write_json
from sidelight.thresholds import F1, OperatingCurve, ThresholdRule
from sidelight.training.classifier import encode, require_responses
from sidelight.training.dataset import TokenPlaces, prepare, span_places
from sidelight.training.fit import calibrate_probe
from sidelight.training.loop import divergence, train_mechanisms
from sidelight.training.settings import FitOptions, Job, suggested_settings
from sidelight.training.validation import FOLDS
from sidelight.types import Span

if TYPE_CHECKING:
    from rich.table import Table

LOOKAHEADS = (0, 1, 2, 4)
# Of log-odds. An answer has none: it is redacted before its surest word is written.
MARGINS = (None, 3.0, 2.0, 1.5, 1.25, 1.0, 0.75)
# A candidate that looks ahead farther must be better by so much of character F1: it judges later.
_WORTH_WAITING = 0.003

# The probabilities or logits of each text's tokens, ``[token, label]``.
TokenScores = Sequence[Float[np.ndarray, "_ label"]]


@dataclass(frozen=True)
class FittedSpans:
    """A trained probe of spans.

    Attributes:
        probe: Ready to serve.
        report: Of the spans of left-out texts, by thresholds that other texts gave.
        whole_texts: Of the verdicts on left-out texts.
        warnings: What the user should know, one sentence each.
    """

    probe: Probe
    report: SpanReport
    whole_texts: Report
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-ready values."""
        whole = self.whole_texts.to_dict()
        return {**self.report.to_dict(), "whole_texts": whole, "warnings": list(self.warnings)}

    def table(self) -> "Table":
        """The figures of spans, for a terminal."""
        return self.report.table()

    def __str__(self) -> str:
        """How far the probe looks ahead."""
        return f"Looks {self.probe.spec.options['lookahead']} tokens ahead."


def fit_spans(
    backbone: TransformersBackbone,
    training: SpanExamples,
    validation: SpanExamples | None,
    *,
    name: str,
    options: FitOptions,
    source: StateSource | None = None,
    out: Path | None = None,
) -> FittedSpans:
    """Trains a probe of spans.

    Args:
        backbone: The frozen LLM.
        training: Texts with labelled spans.
        validation: Those that decide and calibrate; None holds out part of ``training``.
        name: How verdicts will name the probe.
        options: Texts are shown alone, and the first seed counts. If they name no mechanism, the
            left-out texts choose a lookahead.
        source: As for ``fit``.
        out: As for ``fit``.

    Raises:
        SidelightError: As for ``fit``.
    """
    side = "prompt" if training.items[0].response is None else "response"
    if options.reads.side != side:
        raise SidelightError(
            f"The spans are of each {side}, but the probe would read: {options.reads.side}. Read "
            f"what is labelled (--set reads={side}, or leave it out)."
        )
    # Whatever the template writes has no label.
    options = replace(options, reads=Reads(side, template=False))
    dataset = prepare(backbone, training, validation, options=options, source=source)
    texts, places = dataset.measured.examples, dataset.measured.places
    assert isinstance(texts, SpanExamples)
    specs = options.mechanisms or [
        mechanism_spec("spans", {"lookahead": lookahead}) for lookahead in LOOKAHEADS
    ]
    settings = options.settings.get("spans", suggested_settings("spans"))
    jobs = [Job(spec, options.seeds[0], settings) for spec in specs]
    results = train_mechanisms(
        jobs, training=dataset.training, validation=dataset.measured, device=backbone.device
    )
    candidates = [run for run in results if run is not None]
    if not candidates:
        raise divergence(jobs[0])
    scores: dict[str, float] = {}
    for run in candidates:
        _, report = calibrate_spans(texts, places, run.token_logits, rule=F1, bootstrap=0)
        f1 = [figures["character_f1"].value or 0.0 for figures in report.per_label.values()]
        scores[str(run.job.spec.options["lookahead"])] = float(np.mean(f1))
    least = max(scores.values()) - _WORTH_WAITING
    pairs = zip(candidates, scores.values(), strict=True)
    trained = next(run for run, score in pairs if score >= least)
    fitted = calibrate_probe(trained, dataset, name=name, options=options)
    rule, report = calibrate_spans(texts, places, trained.token_logits, rule=options.threshold)
    record = {**fitted.probe.record, "spans": report.to_dict(), "lookaheads": scores}
    probe = replace(fitted.probe, spans=rule, record=record)
    result = FittedSpans(probe, report, fitted.report, dataset.warnings)
    if out is not None:
        save_probe(probe, out)
        write_json(out / "training.json", result.to_dict())
    dataset.remove_states()
    return result


def calibrate_spans(
    examples: SpanExamples,
    places: TokenPlaces,
    logits: TokenScores,
    *,
    rule: ThresholdRule,
    bootstrap: int = 1000,
) -> tuple[SpanRule, SpanReport]:
    """Calibrates the tokens of left-out texts, chooses thresholds, and measures fold by fold.

    Args:
        examples: The texts.
        places: The characters of each text's tokens.
        logits: Of these tokens.
        rule: What thresholds are chosen for: ``f1`` is that of characters; the rates of the others
            are of words, so ``fpr=0.005`` are 5 false alarms in 1,000 words.
        bootstrap: As for ``measure_spans``.
    """
    task, labels = examples.task, examples.span_labels
    texts = [span_text(item) for item in examples.items]
    rows = list(zip(texts, places, examples.spans, logits, strict=True))
    holds = np.concatenate([token_labels(text, own, spans, labels) for text, own, spans, _ in rows])
    numbers = holds.astype(np.int64).reshape(len(holds), *([] if task.kind == "binary" else [-1]))
    calibration = fit_calibration(
        suggested_calibration(task), np.concatenate(logits), numbers, task
    )
    scores = [character_scores(text, own, calibration.apply(z)) for text, own, _, z in rows]
    actual = [labelled_characters(text, spans, labels) for text, _, spans, _ in rows]
    of_words = [words(text) for text in texts]
    margins = MARGINS if examples.items[0].response is None else MARGINS[:1]

    def rule_of(chosen: Sequence[int]) -> SpanRule:
        """With the thresholds and margins that are best on these texts."""
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
        worths = np.array(
            [
                threshold_f1(
                    holds, [within_margin(scores[i][:, label], margin) for i in chosen], points
                )
                for margin in margins
            ]
        )
        margin, point = np.unravel_index(worths.argmax(), worths.shape)
        return float(points[point]), margins[margin]

    whole_rule = rule_of(range(len(rows)))
    predicted: list[list[Span]] = [[]] * len(rows)
    count = min(FOLDS, examples.distinct)
    folds = examples.folds(count, seed=0) if count > 1 else (np.arange(len(rows)),)
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(rows)), fold).tolist()
        rule_of_rest = rule_of(rest) if rest else whole_rule
        for i in fold.tolist():
            predicted[i] = rule_of_rest.read(scores[i], labels)
    return whole_rule, measure_spans(examples, predicted, bootstrap=bootstrap)


def measure_spans(
    examples: SpanExamples, predicted: Sequence[Sequence[Span]], *, bootstrap: int = 1000
) -> SpanReport:
    """``evaluate_spans`` of these texts."""
    texts = [span_text(item) for item in examples.items]
    return evaluate_spans(
        texts, examples.spans, predicted, examples.span_labels, bootstrap=bootstrap
    )


def find_spans(
    backbone: TransformersBackbone, probe: Probe, examples: Sequence[Example]
) -> tuple[Float[np.ndarray, "text output"], list[list[Span]]]:
    """The logits of whole texts, and the spans in each, from one forward pass.

    Raises:
        ContextLengthError: A text is longer than the backbone reads.
        VerdictError: A logit is not finite.
        SidelightError: The probe reads responses and a text has none, or the reverse.
    """
    assert probe.spans is not None
    logits = np.full((len(examples), probe.task.outputs), np.nan)
    found: list[list[Span]] = [[] for _ in examples]
    for i, of_text, scores in judge_characters(backbone, probe, examples):
        logits[i] = of_text
        found[i] = probe.spans.read(scores, probe.span_labels)
    return logits, found


@torch.inference_mode()
def judge_characters(
    backbone: TransformersBackbone, probe: Probe, examples: Sequence[Example]
) -> Generator[tuple[int, Float[np.ndarray, " output"], Float[np.ndarray, "character label"]]]:
    """Of each text its place, its logits, and the probabilities of its characters."""
    assert probe.spans is not None
    require_responses(probe, examples)
    if not probe.reads.includes_response and any(item.response is not None for item in examples):
        raise SidelightError(
            f"Probe '{probe.name}' finds spans in prompts, and these texts have responses. Leave "
            "--response out (response= in Python)."
        )
    bank = Bank([probe], device=backbone.device)
    mechanism = bank.probes[0].mechanism
    assert isinstance(mechanism, Spans)
    prompts = encode(backbone, examples)
    masks = [prompt.mask(probe.reads) for prompt in prompts]
    places = span_places(backbone, examples, [int(mask.sum()) for mask in masks])
    with progress("Judging", sum(map(len, prompts)), unit="tokens") as shown:
        for batch in by_length([*map(len, prompts)]):
            tap = bank.tap()
            with backbone.tapped(tap):
                backbone.run([prompts[i] for i in batch])
            for i, columns in zip(batch, tap.projected(), strict=True):
                own = columns[: len(masks[i])][masks[i].to(columns.device)]
                state = mechanism.summarise(Ragged(own, torch.tensor([len(own)]).to(own.device)))
                logits = mechanism.finish(state)[0].double().cpu().numpy()
                with located(examples[i], i):
                    probe.require_finite(logits)
                tokens = mechanism.token_logits(state).values.double().cpu().numpy()
                probabilities = probe.spans.calibration.apply(tokens)
                text = span_text(examples[i])
                yield i, logits, character_scores(text, places[i], probabilities)
                shown.advance(len(prompts[i]))
