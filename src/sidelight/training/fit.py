"""From labelled examples to a calibrated probe with its figures."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sidelight.data.evaluation import Report, SpanReport
from sidelight.data.examples import LabelledExamples
from sidelight.errors import warn
from sidelight.models.fingerprint import Fingerprint
from sidelight.probes.artifact import save_probe
from sidelight.probes.card import Epochs, ProbeCard, TrainingRecord
from sidelight.probes.probe import Probe
from sidelight.states.reader import Reader
from sidelight.statistics.background import Traffic
from sidelight.training.depth import candidate_depths, choose_depth
from sidelight.training.loop import Candidate, divergence, train_mechanisms
from sidelight.training.measuring import (
    FLATTERING,
    calibrate_examples,
    describe_training,
)
from sidelight.training.optimisation import TrainingRun, validation_score
from sidelight.training.preparing import ProbeDataset, prepare
from sidelight.training.selection import selection_for
from sidelight.training.settings import FitOptions, suggested_settings
from sidelight.training.tfidf import warn_of_better_words
from sidelight.training.traffic import (
    conversations_among,
    measure_traffic,
    warn_of_traffic,
)
from sidelight.types import NONE

# The file that a training continues from, beside its hidden states.
CHECKPOINT = "checkpoint.safetensors"
# The share of labelled texts that may be taken for background traffic without a word.
_TAKEN = 0.02


@dataclass(frozen=True)
class Fit:
    """A trained probe, and how it does.

    Attributes:
        probe: Ready to serve.
        score: ``validation_score`` of its final logits, by which `sidelight search` compares.
        report: Its figures on validation data, each text calibrated without it.
        losses: The log loss of each validation text, likewise.
        traffic: Its figures in background traffic; None if it was trained without.
        spans: Its figures of the spans of validation texts, by thresholds that other texts gave;
            None if it labels whole texts.
        baseline: The figures of TF-IDF with logistic regression on the same validation texts; None
            for spans.
    """

    probe: Probe
    score: float
    report: Report
    losses: Float[np.ndarray, " text"]
    traffic: Traffic | None = None
    spans: SpanReport | None = None
    baseline: Report | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures on validation data, as JSON values."""
        reports = {"traffic": self.traffic, "spans": self.spans, "baseline": self.baseline}
        return {
            "probe": self.probe.name,
            "mechanism": self.probe.card.mechanism.name,
            "score": self.score,
            "validation": self.report.to_dict(),
            **{name: report.to_dict() for name, report in reports.items() if report is not None},
        }


def _candidates(
    options: FitOptions, texts: LabelledExamples, model: Fingerprint
) -> list[Candidate]:
    """The mechanism at several depths, or those that a probe of spans is chosen from.

    The deepest are first.
    """
    specs = [options.mechanism] if options.mechanism else selection_for(texts).specs()
    settings = [options.settings or suggested_settings(spec.name) for spec in specs]
    if not options.early_exit:
        return [*zip(specs, settings, strict=True)]
    deepest = model.first_layers(settings[0].layers)
    return [
        (spec, replace(each, layers=depth))
        for depth in candidate_depths(deepest)
        for spec, each in zip(specs, settings, strict=True)
    ]


def fit(
    reader: Reader,
    training: LabelledExamples,
    validation: LabelledExamples | None,
    *,
    name: str,
    options: FitOptions,
    out: Path | None = None,
) -> Fit:
    """Trains a probe, from one pass of a model over the texts.

    Args:
        reader: The frozen LLM, in any engine.
        training: Labelled texts. Of labelled spans, the probe labels spans; they are shown alone,
            and if the options name no mechanism, held-out texts choose how far it looks ahead.
        validation: Labelled texts for early stopping, threshold and calibration; None holds out
            part of ``training``, or cross-fits it if it is small.
        name: How verdicts will name it.
        options: What to train.
        out: Folder that it is written to, before the hidden states are removed. They are cached in
            a folder derived from ``out`` and everything that decides the training, where the same
            training finds them after a kill.

    Raises:
        SidelightError: There are no labels, the hidden states do not fit the disk, the training
            diverged, or the spans are of what the probe would not read.
    """
    training_sha256 = options.training_sha256(
        training,
        validation,
        name=name,
        model=reader.fingerprint,
        engine=reader.engine,
    )
    options = options.resolved_for(training)
    with options.temporary_states(training_sha256, out and out.resolve()) as states:
        candidates = _candidates(options, training, reader.fingerprint)
        dataset = prepare(
            reader,
            training,
            validation,
            options=replace(options, cache_root=states),
            candidates=candidates,
        )
        # The baseline first: what it refuses in seconds must not cost the hours of training.
        baseline = selection_for(training).baseline(dataset, options)
        results = train_mechanisms(
            candidates,
            split=dataset.split,
            left_out=dataset.left_out,
            device=reader.device,
            # Depths are trained side by side: without, each would cost a training of its own.
            shares_matmuls=options.early_exit,
            checkpoint=None if options.keep_cache else states / CHECKPOINT,
        )
        trained = [run for run in results if run is not None]
        if not trained:
            raise divergence(*candidates[0])
        diverged = [
            candidate for candidate, run in zip(candidates, results, strict=True) if run is None
        ]
        result = calibrate_probe(
            trained, dataset, name=name, options=options, training_sha256=training_sha256
        )
        for candidate in diverged:
            warn(f"{divergence(*candidate)} The probe is made without it.")
        if baseline is not None:
            warn_of_better_words(result.losses, baseline.losses, dataset.validation.examples)
        warn_of_none(result)
        if result.traffic is not None and result.probe.thresholds:
            warn_of_traffic(
                result.traffic,
                result.probe.card.training.curves,
                result.probe.thresholds,
                options.threshold,
            )
        if out is not None:
            save_probe(result.probe, out)
    return replace(result, baseline=baseline and baseline.report)


def calibrate_probe(
    candidates: Sequence[TrainingRun],
    dataset: ProbeDataset,
    *,
    name: str,
    options: FitOptions,
    training_sha256: str = "",
) -> Fit:
    """Calibrates on validation logits, chooses the threshold there, and measures fold by fold.

    Of several trainings, held-out texts choose one: of spans by lookahead at full depth, then by
    depth.
    """
    scored = dataset.scored
    selection = selection_for(scored.examples)
    deepest = [run for run in candidates if run.depth == max(run.depth for run in candidates)]
    trained, lookaheads = selection.choose(deepest, scored)
    of_depths = [run for run in candidates if run.spec == trained.spec]
    trained, depths = choose_depth(
        of_depths, partial(selection.losses, dataset=dataset, options=options)
    )
    rule, spans = selection.calibrate(trained, scored, options)
    task, validation, contexts = dataset.task, dataset.validation.examples, dataset.contexts
    logits, in_contexts = trained.logits[: len(validation)], trained.logits[len(validation) :]
    background = conversations_among(contexts, in_contexts)
    calibrated = calibrate_examples(
        logits,
        validation,
        dataset.folds,
        kind=options.calibration,
        rule=options.threshold,
        background=background,
    )
    calibration, report = calibrated.calibration, calibrated.report
    traffic = None
    if (report.thresholds or task.abstains) and contexts:
        traffic = measure_traffic(
            task,
            contexts,
            background,
            calibration.apply(in_contexts),
            scored.labels[len(validation) :],
            background.left_out_thresholds(
                calibrated.text_thresholds, calibration, options.threshold
            ),
        )
    training = _record(trained, dataset, options).model_copy(
        update={
            "validation": calibrated.texts(validation),
            "traffic": traffic,
            "spans": spans,
            "lookaheads": lookaheads,
            "depths": depths,
            "training_sha256": training_sha256,
        }
    )
    card = ProbeCard(
        name=name,
        mechanism=trained.spec,
        task=task,
        reads=dataset.training.states.reads,
        prompt_format=dataset.reader.encoder.prompt_format,
        calibration=calibration,
        thresholds=report.thresholds,
        backbone=dataset.reader.fingerprint,
        training=training,
        spans=rule,
    )
    if not calibrated.folds and spans is None:
        warn(FLATTERING)
    probe = Probe(card, trained.mechanism, trained.standardisation)
    return Fit(
        probe,
        validation_score(task, logits, validation.labels),
        report,
        calibrated.losses,
        traffic,
        spans,
    )


def _record(trained: TrainingRun, dataset: ProbeDataset, options: FitOptions) -> TrainingRecord:
    """The texts and the settings of a training."""
    settings = asdict(trained.settings)
    contexts = Counter(context.kind for context in dataset.training.contexts)
    del contexts["without_context"]
    return TrainingRecord(
        engine=dataset.training.states.engine,
        states=dataset.training.states.record,
        training=describe_training(
            dataset.training.without_contexts().examples, dataset.input_sha256
        ),
        contexts=dict(contexts),
        threshold_rule=str(options.threshold),
        max_tokens=options.max_tokens,
        folds=len(dataset.folds),
        seed=settings.pop("seed"),
        settings=settings,
        epochs=Epochs(scores=tuple(trained.validation_scores), best=trained.best_epoch),
        parameters=sum(p.numel() for p in trained.mechanism.parameters()),
    )


def warn_of_none(result: Fit) -> None:
    """Warn if ``none`` takes labelled texts, as it does beside a class of all the rest."""
    task, counts = result.probe.task, result.report.confusion_matrix
    if not task.abstains or (taken := counts[:-1, -1]).sum() <= _TAKEN * counts.sum():
        return
    label = task.labels[int(taken.argmax())]
    warn(
        f"{taken.sum()} of {counts.sum()} labelled texts are classified as '{NONE}', most of them "
        f"labelled '{label}' ({taken.max()}). If '{label}' already means none of the others, train "
        "without 'none' (--set none=false)."
    )
