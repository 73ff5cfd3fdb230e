"""From labelled examples to calibrated probes with their figures."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from sidelight.backbone import TransformersBackbone
from sidelight.calibration import CalibrationKind
from sidelight.data.examples import Example, LabelledExamples
from sidelight.evaluation import Report
from sidelight.mechanisms.base import mechanism_spec
from sidelight.mechanisms.distance import Distance
from sidelight.mechanisms.linear import Linear
from sidelight.mechanisms.readout import Readout
from sidelight.probe import Probe
from sidelight.states.extraction import StateSource
from sidelight.thresholds import ThresholdRule, read_curves, require_thresholds
from sidelight.training.dataset import ProbeDataset, linear_refusal, prepare
from sidelight.training.distance import fit_distance
from sidelight.training.linear import LinearSolution
from sidelight.training.loop import Trained, cross_fit, divergence, train_mechanisms
from sidelight.training.measuring import (
    FLATTERING,
    Calibrated,
    Traffic,
    beginning,
    calibrate_examples,
    describe_examples,
    describe_scores,
    highest_logits,
    measure_traffic,
    text_hashes,
    traffic_warnings,
)
from sidelight.training.optimisation import validation_score
from sidelight.training.settings import Background, FitOptions
from sidelight.training.tfidf import fit_tfidf
from sidelight.types import NONE

# Shares of the linear solution.
_SHARES = (0.25, 0.5, 0.75)
# Standard errors of a difference that make TF-IDF clearly better, and texts of the rarest label
# that are enough to say so.
_CLEAR, _ENOUGH_TEXTS = 2.0, 30
# The share of labelled texts that may be taken for ordinary traffic without a word.
_TAKEN = 0.02


@dataclass(frozen=True)
class FittedProbe:
    """One trained probe.

    Attributes:
        probe: Ready to serve.
        seed: The seed that it was trained with.
        score: ``validation_score`` of its final logits; the best run is chosen by it.
        report: Its figures on validation data, each text calibrated without it.
        losses: The log loss of each validation text, likewise.
        traffic: Its figures in ordinary traffic; None if it was trained without.
    """

    probe: Probe
    seed: int
    score: float
    report: Report
    losses: Float[np.ndarray, " text"]
    traffic: Traffic | None = None


def calibrate_probe(
    trained: Trained,
    dataset: ProbeDataset,
    *,
    name: str,
    options: FitOptions,
    distance: Distance | None = None,
) -> FittedProbe:
    """Calibrates on validation logits, chooses the threshold there, and measures fold by fold."""
    task, texts = dataset.task, len(dataset.validation)
    logits, in_contexts = trained.logits[:texts], trained.logits[texts:]
    rule = options.threshold
    highest = highest_logits(dataset.contexts, in_contexts)
    calibrated = calibrate_examples(
        logits,
        dataset.validation.examples,
        folds=dataset.folds,
        kind=options.calibration,
        rule=rule,
        traffic=highest,
    )
    probabilities = calibrated.calibration.apply(logits)
    thresholds, traffic = calibrated.report.thresholds, None
    kept: dict[str, Any] = {}
    if (thresholds or task.abstains) and dataset.contexts:
        chances = calibrated.calibration.apply(in_contexts)
        labels = dataset.measured.labels[texts:]
        traffic = measure_traffic(task, dataset.contexts, chances, labels, thresholds)
        kept = {"traffic": _kept(traffic, highest, options.background)}
    probe = Probe(
        name=name,
        task=task,
        reads=dataset.training.states.reads,
        prompt_format=dataset.backbone.encoder.prompt_format,
        spec=trained.job.spec,
        mechanism=trained.mechanism,
        standardisation=trained.standardisation,
        calibration=calibrated.calibration,
        thresholds=thresholds,
        fingerprint=dataset.backbone.fingerprint,
        distance=distance,
        record={
            "engine": dataset.training.states.engine,
            "training": {
                **describe_examples(dataset.originals.examples),
                "texts": text_hashes(dataset.originals.examples),
                **({"given_sha256": dataset.given_sha256} if dataset.given_sha256 else {}),
            },
            "contexts": dict(Counter(context.kind for context in dataset.contexts)),
            **kept,
            "validation": {
                **describe_examples(dataset.validation.examples),
                "metrics": calibrated.report.to_dict(),
                **describe_scores(task, probabilities, dataset.validation.labels),
            },
            "threshold_rule": str(options.threshold),
            "max_tokens": options.max_tokens,
            "folds": len(dataset.folds),
            "settings": asdict(trained.job.settings),
            "seed": trained.job.seed,
            "epochs": {"scores": list(trained.history), "best": trained.best_epoch},
            "parameters": sum(p.numel() for p in trained.mechanism.parameters()),
        },
    )
    score = validation_score(task, logits, dataset.validation.labels)
    return FittedProbe(
        probe, trained.job.seed, score, calibrated.report, calibrated.losses, traffic
    )


def _kept(
    traffic: Traffic, logits: Float[np.ndarray, "conversation output"], background: Background
) -> dict[str, Any]:
    """What an artifact keeps of traffic: no text that is a user's own."""
    own = background.conversations[: background.private]
    private = {beginning(Example(turns).text) for turns in own}
    return {
        **traffic.to_dict(),
        # A threshold may lie just above one of them: not rounded.
        "logits": logits.tolist(),
        "worst": [
            {"probability": round(probability, 4), "text": text}
            for probability, text in traffic.worst
            if text not in private
        ],
    }


@dataclass(frozen=True)
class Fit:
    """Everything that one call to ``fit`` made.

    Attributes:
        runs: One per mechanism and seed.
        best: The best run of the mechanism whose mean validation score is the best.
        baseline: The figures of TF-IDF with logistic regression on the same validation texts.
        warnings: What the user should know, one sentence each.
    """

    runs: tuple[FittedProbe, ...]
    best: FittedProbe
    baseline: Report
    warnings: tuple[str, ...]


def fit(
    backbone: TransformersBackbone,
    training: LabelledExamples,
    validation: LabelledExamples | None,
    *,
    name: str,
    options: FitOptions,
    source: StateSource | None = None,
) -> Fit:
    """Trains every mechanism with every seed, from one pass of the backbone over the texts.

    Args:
        backbone: The frozen LLM.
        training: Labelled texts.
        validation: Labelled texts for early stopping, threshold and calibration; None holds out
            part of ``training``, or cross-fits it if it is small.
        name: How verdicts will name the probe.
        options: What to train.
        source: The engine that computes the hidden states; None is the backbone itself.

    Raises:
        SidelightError: There are no labels, the hidden states do not fit the disk, or every
            training diverged.
    """
    require_thresholds(training.task, options.threshold)
    options.with_none(training.task)
    dataset = prepare(backbone, training, validation, options=options, source=source)
    refusal = linear_refusal(backbone, len(dataset.training), options)
    jobs = [job for job in options.jobs() if not (refusal and job.spec.name == "linear")]
    # The baseline first: what it refuses in seconds must not cost the hours of training.
    words = _baseline(dataset, options.threshold, options.calibration)
    if dataset.folds:
        trained = cross_fit(jobs, dataset.training, dataset.folds, device=backbone.device)
    else:
        trained = train_mechanisms(
            jobs,
            training=dataset.training,
            validation=dataset.validation,
            to_score=dataset.measured,
            device=backbone.device,
        )
    finite = [one for one in trained if one is not None]
    if not finite:
        raise divergence(jobs[0])
    pairs = zip(jobs, trained, strict=True)
    warnings = [
        *dataset.warnings,
        *(f"{divergence(job)} This run is left out." for job, one in pairs if one is None),
    ]
    measured = dataset.validation.examples
    if not words.folds:
        warnings.append(FLATTERING)
    if options.mechanisms is None:
        warnings += [f"{refusal}: the readout is alone."] if refusal else []
        finite = mix(finite, dataset, kind=options.calibration)
    distance = fit_distance(dataset)
    runs = [
        calibrate_probe(one, dataset, name=name, options=options, distance=distance)
        for one in finite
    ]
    best = _best(runs)
    warnings += better_words(best.losses, words.losses, measured)
    warnings += taken_by_none(best)
    if best.traffic is not None and best.probe.thresholds:
        curves = read_curves(best.probe.record["validation"]["curves"])
        warnings += traffic_warnings(best.traffic, curves, best.probe.thresholds, options.threshold)
    if not options.keep_cache:
        for split in (dataset.training, dataset.measured):
            split.states.remove()
    return Fit(tuple(runs), best, words.report, tuple(warnings))


def taken_by_none(run: FittedProbe) -> list[str]:
    """A warning if ``none`` takes labelled texts, as it does beside a class of all the rest."""
    task, counts = run.probe.task, run.report.confusion_matrix
    if not task.abstains or (taken := counts[:-1, -1]).sum() <= _TAKEN * counts.sum():
        return []
    label = task.labels[int(taken.argmax())]
    return [
        f"Of {counts.sum()} labelled texts {taken.sum()} are said to be '{NONE}', most of them of "
        f"'{label}' ({taken.max()}). If that class is for what is of no other, train without "
        "'none' (--set none=false)."
    ]


def _best(runs: Sequence[FittedProbe]) -> FittedProbe:
    by_mechanism: dict[str, list[float]] = {}
    for run in runs:
        by_mechanism.setdefault(repr(run.probe.spec), []).append(run.score)
    return max(
        runs, key=lambda run: (float(np.mean(by_mechanism[repr(run.probe.spec)])), run.score)
    )


def _baseline(
    dataset: ProbeDataset, rule: ThresholdRule, kind: CalibrationKind | None
) -> Calibrated:
    """The figures of TF-IDF with logistic regression, trained on texts alone."""
    task, training = dataset.task, dataset.originals
    if dataset.folds:
        logits = np.empty((len(training), task.outputs))
        for fold in (fold[fold < len(training)] for fold in dataset.folds):
            rest = training.without(fold)
            words = fit_tfidf(rest.texts, rest.labels, task)
            logits[fold] = words.logits(training.select(fold).texts)
    else:
        words = fit_tfidf(training.texts, training.labels, task)
        logits = words.logits(dataset.validation.texts)
    texts = dataset.validation.examples
    return calibrate_examples(logits, texts, folds=dataset.folds, kind=kind, rule=rule)


# The default probe: a readout and a linear solution, mixed as left-out texts decide.


def mix(
    trained: Sequence[Trained], dataset: ProbeDataset, *, kind: CalibrationKind | None
) -> list[Trained]:
    """Each readout mixed with the linear solution; as they are if there is none.

    The share is the one with the lowest log loss of left-out texts.

    Args:
        trained: Readouts, and at most one linear mechanism, with logits of the measured texts.
        dataset: The texts.
        kind: How logits are calibrated before they are compared.
    """
    linear = next((one for one in trained if isinstance(one.mechanism, Linear)), None)
    readouts = [one for one in trained if isinstance(one.mechanism, Readout)]
    if linear is None or not readouts:
        return [*trained]

    texts, folds = dataset.validation.examples, dataset.folds

    def loss(candidate: Trained) -> float:
        logits = candidate.logits[: len(texts)]
        calibrated = calibrate_examples(logits, texts, folds=folds, kind=kind, bootstrap=0)
        return float(calibrated.losses.mean())

    return [min(mixtures(linear, readout) or [readout], key=loss) for readout in readouts]


def mixtures(linear: Trained, readout: Trained) -> list[Trained]:
    """Readouts whose logits are between a readout's and a linear mechanism's.

    Such a mixture is a readout again, with one more gate, which is zero. There is none if the two
    read different states.
    """
    assert isinstance(linear.mechanism, Linear)
    assert isinstance(readout.mechanism, Readout)
    if linear.standardisation.is_normalised != readout.standardisation.is_normalised:
        return []
    solution = LinearSolution.of(linear.mechanism, linear.standardisation)
    device = readout.mechanism.bias.device
    moved = solution.standardised(readout.standardisation)
    parameters = {name: value.to(device) for name, value in moved.items()}
    spec = readout.job.spec
    heads = readout.mechanism.gate.shape[2] + 1
    return [
        replace(
            readout,
            job=replace(
                readout.job, spec=mechanism_spec(spec.name, {**spec.options, "heads": heads})
            ),
            mechanism=readout.mechanism.mixed(**parameters, share=share),
            logits=(1 - share) * readout.logits + share * linear.logits,
        )
        for share in _SHARES
    ]


def better_words(
    losses: Float[np.ndarray, " text"],
    of_words: Float[np.ndarray, " text"],
    examples: LabelledExamples,
) -> list[str]:
    """A warning if TF-IDF's loss is clearly below that of the probe.

    Args:
        losses: Log loss of each left-out text by the probe.
        of_words: The same by TF-IDF.
        examples: The texts; with few of a label, chance could decide.
    """
    lost = losses - of_words
    is_clear = lost.mean() > _CLEAR * lost.std() / np.sqrt(len(lost))
    if not is_clear or examples.label_counts.min() < _ENOUGH_TEXTS:
        return []
    return [
        "The words alone (TF-IDF) predict left-out texts better than the probe: a log loss of "
        f"{of_words.mean():.3f} against {losses.mean():.3f}. Add texts, or try another model "
        "(--model)."
    ]
