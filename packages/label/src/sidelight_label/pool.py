"""The texts of a session, with the means and last tokens of their hidden states.

A regression uses these two vectors of each text and layer. Only they are stored, whereas training
stores the states of all tokens. The model reads each text once, and a fit takes seconds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from sidelight.data.annotators import LABELLED, JudgeLabel
from sidelight.data.evaluation import Report
from sidelight.data.examples import Example, Examples, LabelledExamples
from sidelight.errors import SidelightError, warn
from sidelight.models.smollm2 import cache_root
from sidelight.probes.card import ProbeCard, TrainingRecord
from sidelight.probes.mechanisms.base import Geometry, mechanism_spec
from sidelight.probes.probe import Probe
from sidelight.probes.standardisation import Standardisation
from sidelight.states.cache import (
    ActivationCache,
    Shard,
    write_tensors,
)
from sidelight.states.extraction import extract, shard_logits
from sidelight.states.reader import Backbone
from sidelight.training.encoding import TextEncoder, encode_shortened
from sidelight.training.measuring import (
    calibrate_examples,
    describe_training,
)
from sidelight.training.settings import FitOptions
from sidelight.training.validation import complete_folds
from sidelight.types import Task
from sidelight_label.regression import fit_regression

# Maximum labels for the probe that orders texts; the time of a fit is quadratic in their number.
_MOST_SCORED = 1000
# The labels of one text, as a row of ``LabelledExamples.labels``.
Labels = int | list[int]


@dataclass(frozen=True)
class ScoredProbe:
    """A probe with its probabilities of each text, out-of-fold for its training texts."""

    title: str
    probe: Probe
    probabilities: Float[np.ndarray, "text output"]


class Pool:
    """Texts that a model has read.

    Attributes:
        prompts: Token ids of each text, truncated as in training.
        is_normalised: Whether states are divided by their root mean square before pooling.
        initial: The given probes.

    Args:
        backbone: The frozen LLM, which reads texts not read in earlier sessions.
        examples: The texts.
        task: The labels to decide between.
        options: Options for reading the texts and storing their vectors.
        probes: Probes that classify each text while its states are available.

    Raises:
        SidelightError: A probe has another model, other labels or reads another side; the vectors
            would not fit into memory or on the disk; or a text cannot be read.
    """

    def __init__(
        self,
        backbone: Backbone,
        examples: Examples,
        task: Task,
        options: FitOptions,
        probes: Sequence[Probe] = (),
    ):
        self.backbone = backbone
        self.examples = examples
        self.task = task
        self.options = options
        for probe in probes:
            self._require_fits(probe)
        sizes = backbone.fingerprint
        shape = (len(examples), sizes.layers, sizes.width)
        needed = 8 * math.prod(shape)
        if needed > options.memory_bytes:
            raise SidelightError(
                f"The means and last tokens of all layers need {needed / 2**30:.1f} GiB, but the "
                f"limit is {options.memory_bytes / 2**30:.1f} GiB. Raise it with --memory, or "
                "use fewer texts (--limit)."
            )
        limit = min(options.max_tokens, backbone.encoder.max_tokens)
        self.prompts = encode_shortened(
            TextEncoder(backbone.encoder), examples, reads=options.reads, limit=limit
        )
        # As in `sidelight train`: of several classes, a large norm says something.
        self.is_normalised = task.kind != "multiclass"
        cache = _VectorCache(self, probes)
        extract(backbone, cache, title="Reading")
        self._poolings = torch.empty(2, *shape)
        logits = np.empty((len(probes), len(examples), task.outputs))
        for row in range(len(examples)):
            stored = load_file(cache.path(row))
            self._poolings[0, row], self._poolings[1, row] = stored["means"], stored["lasts"]
            for number, of_probe in enumerate(logits):
                of_probe[row] = stored[f"logits{number}"].numpy()
        self.initial = [
            ScoredProbe(probe.name, probe, probe.calibration.apply(of_probe))
            for probe, of_probe in zip(probes, logits, strict=True)
        ]

    def _require_fits(self, probe: Probe) -> None:
        probe.card.backbone.require(self.backbone.fingerprint, probe=probe.name)
        reads = self.options.reads
        if (probe.task, probe.reads.token_roles) != (self.task, reads.token_roles):
            raise SidelightError(
                f"Probe '{probe.name}' decides between {', '.join(probe.task.labels)} "
                f"({probe.task.kind}) and reads {probe.reads.side}, but this session uses the "
                f"labels {', '.join(self.task.labels)} ({self.task.kind}) and reads "
                f"{reads.side}. Name probes with the same labels that read the same side."
            )

    def labelled(
        self, decided: Mapping[int, Labels], classified: Mapping[int, JudgeLabel] | None = None
    ) -> LabelledExamples:
        """These rows with their labels.

        Args:
            decided: The labels, by row.
            classified: Those that are a judge's.
        """
        chosen = self.examples.select(decided)
        labels = np.array([*decided.values()], dtype=np.int64)
        rows = tuple(self.cells(row, (classified or {}).get(row)) for row in decided)
        return LabelledExamples(chosen.items, rows, task=self.task, labels=labels)

    def cells(self, row: int, classified: JudgeLabel | None = None) -> dict[str, Any]:
        """The cells of a text's row, with the judge's answer if the label is a judge's."""
        cells = {name: value for name, value in self.examples.rows[row].items() if name != LABELLED}
        return cells if classified is None else {**cells, LABELLED: classified.cell()}

    def score(self, decided: Mapping[int, Labels]) -> Float[np.ndarray, " text"] | None:
        """Probability of the positive label of a binary task, for each text.

        The probe was not trained on the text. With many labels, it is trained on some, so that it
        takes at most a minute. None if there are too few labels for a probe.
        """
        rows = np.random.default_rng(0).permutation([*decided])[:_MOST_SCORED].tolist()
        try:
            fitted, _ = self.fit({row: decided[row] for row in rows}, name="score", labelling="")
        except SidelightError:
            return None
        return fitted.probabilities[:, 0]

    def fit(
        self,
        decided: Mapping[int, Labels],
        classified: Mapping[int, JudgeLabel] | None = None,
        *,
        name: str,
        labelling: str,
    ) -> tuple[ScoredProbe, Report]:
        """A probe of these labels, and its figures as ``sidelight train`` prints them.

        Args:
            decided: The labels, by row.
            classified: Those that are a judge's.
            name: Name of the probe.
            labelling: Name of the label file.

        Raises:
            SidelightError: A fold would lack a label.
        """
        rows, labelled = [*decided], self.labelled(decided, classified)
        folds = complete_folds(labelled)
        if not folds:
            raise SidelightError(
                "The labelled texts are too similar to hold some of them out for measurement. "
                "Label more texts of each class."
            )
        regression = fit_regression(self._poolings[:, rows], labelled.labels, self.task, folds)
        calibrated = calibrate_examples(regression.left_out, labelled, folds)
        sizes = self.backbone.fingerprint
        geometry = Geometry(sizes.layers, sizes.width, self.task.outputs)
        scaling = Standardisation.identity(geometry, is_normalised=self.is_normalised)
        mechanism = regression.readout()
        training = TrainingRecord(
            training=describe_training(labelled),
            validation=calibrated.texts(labelled),
            folds=len(calibrated.folds),
            settings={"strength": regression.strength},
            max_tokens=self.options.max_tokens,
            parameters=sum(values.numel() for values in mechanism.parameters()),
            labelling=labelling,
        )
        card = ProbeCard(
            name=name,
            mechanism=mechanism_spec("readout", {"heads": 1}),
            task=self.task,
            reads=self.options.reads,
            prompt_format=self.backbone.encoder.prompt_format,
            calibration=calibrated.calibration,
            thresholds=calibrated.report.thresholds,
            backbone=self.backbone.fingerprint,
            training=training,
        )
        probe = Probe(card, mechanism, scaling)
        probabilities = calibrated.calibration.apply(regression.logits(self._poolings))
        probabilities[rows] = calibrated.probabilities
        return ScoredProbe(
            f"the probe of {len(rows)} labels", probe, probabilities
        ), calibrated.report


class _VectorCache(ActivationCache):
    """A cache of two vectors per text and layer, and of probe logits, instead of states."""

    def __init__(self, pool: Pool, probes: Sequence[Probe]):
        root = pool.options.cache_root or cache_root() / "labelling"
        kind = "normalised" if pool.is_normalised else "plain"
        super().__init__(
            root.joinpath(kind, *(probe.version for probe in probes)),
            pool.prompts,
            reads=pool.options.reads,
            fingerprint=pool.backbone.fingerprint,
            engine=pool.backbone.engine,
        )
        self._probes = probes
        self._is_normalised = pool.is_normalised

    def stored_bytes(self, row: int) -> int:
        # For each value, a mean in float32 and a last one in bfloat16.
        return 3 * self.token_bytes

    def write(self, texts: Mapping[int, Float[Tensor, "layer _ width"]]) -> None:
        for row, hidden in texts.items():
            shard = Shard.joined({row: hidden})
            means, lasts = shard.pooled(is_normalised=self._is_normalised)[:, 0]
            tensors = {"means": means, "lasts": lasts.bfloat16()}
            for number, probe in enumerate(self._probes):
                tensors[f"logits{number}"] = torch.from_numpy(shard_logits(probe, shard)[0])
            write_tensors(tensors, self.path(row))


def merged(
    texts: Examples, labelled: LabelledExamples | None
) -> tuple[Examples, dict[int, Labels]]:
    """Merge texts: each distinct text once, with the labels of labelled ones.

    Labelled texts that are not among ``texts`` follow them. If a text was labelled twice, the later
    labels count. Warns about duplicates.
    """
    distinct: dict[object, tuple[Example, Mapping[str, Any]]] = {}
    for examples in [texts] if labelled is None else [texts, labelled]:
        for item, row in zip(examples.items, examples.rows, strict=True):
            distinct.setdefault((item.messages, item.response), (item, row))
    if repeated := len(texts) - len({(item.messages, item.response) for item in texts.items}):
        warn(f"{repeated} of {len(texts)} texts are duplicates and are shown once.")
    items, rows = (tuple(values) for values in zip(*distinct.values(), strict=True))
    decided: dict[int, Labels] = {}
    if labelled is not None:
        numbers = {key: number for number, key in enumerate(distinct)}
        for item, labels in zip(labelled.items, labelled.labels.tolist(), strict=True):
            decided[numbers[item.messages, item.response]] = labels
    return Examples(items, rows), decided
