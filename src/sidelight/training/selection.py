"""How a probe is chosen among trained candidates and calibrated: on whole texts, or on spans."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sidelight.data.evaluation import SpanReport
from sidelight.data.examples import LabelledExamples, SpanExamples
from sidelight.data.spans import SpanRule
from sidelight.probes.mechanisms.base import mechanism_spec
from sidelight.statistics.calibration import fit_calibration, suggested_calibration
from sidelight.statistics.metrics import log_losses
from sidelight.training.dataset import Split
from sidelight.training.measuring import Calibrated, calibrate_examples
from sidelight.training.optimisation import TrainingRun
from sidelight.training.preparing import ProbeDataset
from sidelight.training.settings import FitOptions
from sidelight.training.spans import LOOKAHEADS, calibrate_spans, choose_lookahead
from sidelight.training.tfidf import measure_baseline
from sidelight.training.traffic import conversations_among
from sidelight.types import MechanismSpec


class TextSelection:
    """Selection on labels of whole texts."""

    def specs(self) -> list[MechanismSpec]:
        """The mechanisms that ``auto`` trains."""
        return [mechanism_spec(LabelledExamples.default_mechanism)]

    def baseline(self, dataset: ProbeDataset, options: FitOptions) -> Calibrated | None:
        """The results of a bag of words on the same validation texts; None if it cannot compete."""
        return measure_baseline(dataset, options)

    def choose(
        self, runs: Sequence[TrainingRun], measured: Split
    ) -> tuple[TrainingRun, dict[str, float]]:
        """The run to keep of equally deep ones, and the score of each lookahead that was tried."""
        del measured
        return runs[0], {}

    def losses(
        self, run: TrainingRun, dataset: ProbeDataset, options: FitOptions
    ) -> Float[np.ndarray, " text"]:
        """The calibrated log loss of each text, together with its contexts."""
        task, scored, texts = dataset.task, dataset.scored, len(dataset.validation)
        logits, in_contexts = run.logits[:texts], run.logits[texts:]
        calibrated = calibrate_examples(
            logits,
            dataset.validation.examples,
            dataset.folds,
            kind=options.calibration,
            rule=options.threshold,
            background=conversations_among(dataset.contexts, in_contexts),
        )
        losses = calibrated.losses
        if len(in_contexts):
            probabilities = calibrated.calibration.apply(in_contexts)
            rest = log_losses(task, probabilities, scored.labels[texts:])
            losses = np.concatenate([losses, rest])
        # A text and its contexts are one observation, as is a single conversation.
        owners = np.arange(len(losses))
        for row, context in enumerate(scored.contexts):
            owners[row] = len(dataset.split) + row if context.text is None else context.text
        owners = np.unique(owners, return_inverse=True)[1]
        weights = scored.weights
        sums = np.bincount(owners, losses * weights)
        return sums * len(sums) / weights.sum()

    def calibrate(
        self, run: TrainingRun, measured: Split, options: FitOptions
    ) -> tuple[SpanRule | None, SpanReport | None]:
        """The rule by which tokens become spans, and its results; None for whole texts."""
        del run, measured, options
        return None, None


class SpanSelection(TextSelection):
    """Selection on labelled spans, where every token is an example."""

    def specs(self) -> list[MechanismSpec]:
        name = SpanExamples.default_mechanism
        return [mechanism_spec(name, {"lookahead": tokens}) for tokens in LOOKAHEADS]

    def baseline(self, dataset: ProbeDataset, options: FitOptions) -> Calibrated | None:
        del dataset, options

    def choose(
        self, runs: Sequence[TrainingRun], measured: Split
    ) -> tuple[TrainingRun, dict[str, float]]:
        return choose_lookahead(runs, measured)

    def losses(
        self, run: TrainingRun, dataset: ProbeDataset, options: FitOptions
    ) -> Float[np.ndarray, " text"]:
        """The calibrated log loss of each text, the mean over its tokens."""
        del options
        task = dataset.task
        labels = task.labels_of(dataset.scored.targets.labels.values.numpy())
        logits = np.concatenate(run.token_logits)
        calibration = fit_calibration(suggested_calibration(task), logits, labels, task)
        losses = log_losses(task, calibration.apply(logits), labels)
        ends = np.cumsum([*map(len, run.token_logits)])
        return np.array([each.mean() for each in np.split(losses, ends[:-1])])

    def calibrate(
        self, run: TrainingRun, measured: Split, options: FitOptions
    ) -> tuple[SpanRule | None, SpanReport | None]:
        return calibrate_spans(
            measured.span_examples, measured.places, run.token_logits, rule=options.threshold
        )


def selection_for(examples: LabelledExamples) -> TextSelection:
    """How a probe of these examples is chosen."""
    return SpanSelection() if isinstance(examples, SpanExamples) else TextSelection()
