"""The card of a probe: everything but its tensors, validated field by field when it is read.

It is stored in the header of the probe's file, and as README.md for people next to it.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from sidelight.data.annotators import Annotator
from sidelight.data.evaluation import Estimate, Report, SpanReport
from sidelight.data.spans import SpanRule
from sidelight.errors import SidelightError
from sidelight.models.conversation import PromptFormat, Reads
from sidelight.models.fingerprint import Fingerprint
from sidelight.statistics.background import Conversations, Detections, Traffic
from sidelight.statistics.calibration import Calibration
from sidelight.statistics.combination import combined_log_odds
from sidelight.statistics.thresholds import F1, OperatingCurve
from sidelight.types import MechanismSpec, Task, visible

FORMAT_VERSION = 4
PROBE = "probe.safetensors"
README = "README.md"
# The line of a card's front matter that distinguishes it from another README.md.
CARD_LIBRARY = "library_name: sidelight"

# Key in the header's metadata.
_ENTRY = "sidelight"
# The most that the library reads.
_HEADER_BYTES = 10**8
# Dots alone name another folder.
# The metrics that are shown of a probe.
_SUMMARY_METRICS = ("auprc", "f1", "accuracy")
_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,64}")


class _Record(BaseModel):
    """An immutable record that forbids unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Texts(_Record):
    """Labelled texts.

    Attributes:
        rows: Number of texts.
        sha256: Hash of all texts.
        classes: Number of texts with each label.
    """

    rows: NonNegativeInt = 0
    sha256: str = ""
    classes: Mapping[str, NonNegativeInt] = {}


class TrainingTexts(Texts):
    """The texts that a probe was trained on.

    Attributes:
        input_sha256: Hash of the texts before some were held out.
        texts: A short hash of each text, from ``text_hashes``.
        annotators: Who labelled the texts; empty unless a judge labelled some.
    """

    input_sha256: str = ""
    texts: str = ""
    # Omitted if empty, so that the versions of other probes do not change.
    annotators: tuple[Annotator, ...] = Field(default=(), exclude_if=lambda value: not value)


class CalibrationTexts(Texts):
    """The texts that a probe was calibrated on, and its metrics on them.

    Attributes:
        report: Metrics; each text is calibrated on the other texts.
        curves: Operating curve of each label that has a threshold.
        sources: Counts of found and flagged texts by source.
    """

    report: Report | None = None
    curves: Mapping[str, OperatingCurve] = {}
    sources: Mapping[str, Detections] = {}


class Recalibration(_Record):
    """A recalibration.

    Attributes:
        date: When, as an ISO date.
        what: What the probe was recalibrated by, as a clause.
        version: Version of the probe before it.
        calibration: Calibration before it.
        thresholds: Thresholds before it.
        before: Metrics before it, on its texts.
        texts: Texts that the probe was recalibrated on; None if only the thresholds changed.
    """

    date: str
    what: str
    version: str = ""
    calibration: Calibration | None = None
    thresholds: tuple[float, ...] = ()
    before: Report | None = None
    texts: CalibrationTexts | None = None


class StatesRecord(_Record):
    """How the hidden states of a training run were stored, and their size in bytes per token."""

    form: Literal["whole", "compressed"]
    streamed: bool
    token_bytes: NonNegativeInt


class Epochs(_Record):
    """Validation score by epoch, and the epoch whose parameters were kept, counted from 1."""

    scores: tuple[float, ...] = ()
    best: NonNegativeInt = 0


class DepthTrial(_Record):
    """A depth that training evaluated on held-out texts.

    Attributes:
        layers: Number of hidden states read per token, from the embedding up.
        loss: Mean log loss per text.
        lost: Mean increase of the loss over that at full depth.
        lost_at_most: Upper end of the one-sided 95 % confidence interval of ``lost``.
        is_accepted: Whether this increase is within the tolerance.
    """

    layers: PositiveInt
    loss: float
    lost: float = 0.0
    lost_at_most: float = 0.0
    is_accepted: bool = True


class TrainingRecord(_Record):
    """How a probe was trained and recalibrated.

    Attributes:
        engine: Engine that computed the hidden states.
        states: How the hidden states were stored.
        training: Texts that the parameters were fitted to.
        training_sha256: Hash of everything that determines the probe.
        contexts: Number of contexts of each kind in which training texts were also shown.
        validation: Held-out texts used for calibration.
        traffic: Metrics on background traffic; None if trained without.
        recalibrations: Recalibrations, oldest first.
        threshold_rule: What the thresholds were chosen for, as ``--threshold`` takes it.
        max_tokens: Length to which longer training texts were truncated.
        folds: Number of cross-fitting folds; 0 with a validation set.
        seed: Random seed of the training run.
        settings: Optimisation settings.
        epochs: Validation scores by epoch.
        parameters: Number of trained parameters.
        spans: Span metrics on held-out texts.
        lookaheads: Character F1 by lookahead tried.
        depths: Depths tried, deepest first; the probe has the last accepted one. Empty if the depth
            was given.
        labelling: Label file, if ``sidelight label`` trained the probe.
        copy_of: Version of the original probe, if this is its copy for a copy of the model.
    """

    engine: str = ""
    states: StatesRecord | None = None
    training: TrainingTexts = TrainingTexts()
    training_sha256: str = ""
    contexts: Mapping[str, NonNegativeInt] = {}
    validation: CalibrationTexts = CalibrationTexts()
    traffic: Traffic | None = None
    recalibrations: tuple[Recalibration, ...] = ()
    threshold_rule: str = str(F1)
    max_tokens: NonNegativeInt = 0
    folds: NonNegativeInt = 0
    seed: NonNegativeInt = 0
    settings: Mapping[str, bool | int | float | str | None] = {}
    epochs: Epochs = Epochs()
    parameters: NonNegativeInt = 0
    spans: SpanReport | None = None
    lookaheads: Mapping[str, float] = {}
    # An entry that an artifact lacks does not change its version.
    depths: Annotated[tuple[DepthTrial, ...], Field(exclude_if=lambda depths: not depths)] = ()
    labelling: str = ""
    copy_of: str = ""

    @property
    def calibrated_on(self) -> CalibrationTexts:
        """The texts of the latest recalibration on texts, or else those of validation."""
        newest_first = (recalibration.texts for recalibration in reversed(self.recalibrations))
        return next((texts for texts in newest_first if texts is not None), self.validation)

    @property
    def curves(self) -> Mapping[str, OperatingCurve]:
        """The operating curve of each label with a threshold; empty for multi-class tasks."""
        return self.calibrated_on.curves

    @property
    def flagged(self) -> tuple[int, int]:
        """Number of flagged background conversations, and of all; (0, 0) without background."""
        if self.traffic is None:
            return 0, 0
        return self.traffic.flagged, len(self.traffic.background)


class JudgeFit(_Record):
    """How a probe and a judge jointly decide on the texts that a rule defers.

    A text is flagged if ``weight * logit(probe) + (1 - weight) * logit(judge)`` reaches the
    threshold.

    Attributes:
        judge: ``JudgeSettings.digest`` of the only judge that the fit applies to.
        model: Model name on the judge's server.
        weight: Weight of the probe, from 0 to 1.
        threshold: Threshold of the weighted sum, in log-odds.
        threshold_rule: Objective that the threshold was chosen for, as in ``--threshold``.
        share: Share of background traffic that is deferred.
        texts: The labelled texts.
        deferred: Number of texts that were deferred.
        recall: Recall at 1 % false positives, out of fold.
        recall_of_probe: Recall of the probe alone on the same texts.
        date: When, as an ISO date.
    """

    judge: str = Field(pattern=r"^[0-9a-f]{12}$")
    model: str
    weight: float = Field(ge=0, le=1)
    threshold: float = Field(allow_inf_nan=False)
    threshold_rule: str
    share: float = Field(ge=0, lt=1)
    texts: Texts
    deferred: NonNegativeInt
    recall: Estimate
    recall_of_probe: Estimate
    date: str

    def flags(self, probe: float, judge: float) -> bool:
        """Whether a deferred text is flagged.

        Args:
            probe: The probe's calibrated probability.
            judge: The judge's probability.
        """
        combined = combined_log_odds(self.weight, np.array(probe), np.array(judge))
        return bool(combined >= self.threshold)


class ProbeCard(_Record):
    """Everything about a probe but its tensors.

    Attributes:
        format: Version of this layout.
        name: Its name in verdicts.
        mechanism: Name and options of the mechanism.
        task: The classes.
        reads: The tokens that it reads.
        prompt_format: How texts are rendered. A probe of ``both`` classifies chats, and plain text
            without a template; a probe of ``chat`` fails on plain text.
        calibration: Map from logits to probabilities.
        thresholds: Lowest probability at which a label holds: one for a binary task, one per label
            for a multi-label task, none for a multi-class task.
        backbone: The fingerprint of the model that it belongs to.
        training: How it was trained.
        spans: How tokens are labelled; None for a probe of whole texts.
        judge_fit: How the probe decides together with a judge; None if a judge decides alone.
        is_normalised: As in ``Standardisation``; set on saving.
        weights_sha256: Hash of the tensors in the same file; "" before the probe is saved.
    """

    format: int = FORMAT_VERSION
    name: str
    mechanism: MechanismSpec
    task: Task
    reads: Reads
    prompt_format: PromptFormat
    calibration: Calibration
    thresholds: tuple[float, ...]
    backbone: Fingerprint
    training: TrainingRecord = TrainingRecord()
    spans: SpanRule | None = None
    # Omitted if there is none, so that the versions of other probes do not change.
    judge_fit: JudgeFit | None = Field(default=None, exclude_if=lambda fit: fit is None)
    is_normalised: bool = False
    weights_sha256: str = ""

    @model_validator(mode="after")
    def _makes_sense(self) -> "ProbeCard":
        task, traffic = self.task, self.training.traffic
        checks = {
            "task.labels": task.is_sound,
            "thresholds": task.has_thresholds(self.thresholds),
            "calibration": self.calibration.fits(task),
            "spans": self.spans is None or self.spans.fits(task),
            "judge_fit": self.judge_fit is None or (task.kind == "binary" and self.spans is None),
            "curves": not self.training.curves or tuple(self.training.curves) == task.flaggable,
            "traffic.background": traffic is None
            or not len(traffic.background)
            or traffic.background.logits.shape[1] == task.outputs,
            "backbone": self.backbone.layers > 0 and self.backbone.width > 0,
        }
        wrong = [name for name, holds in checks.items() if not holds]
        if wrong:
            raise ValueError(f"invalid values of {', '.join(wrong)}")
        return self

    @cached_property
    def version(self) -> str:
        """Twelve hexadecimal digits that identify the artifact; "" before it is saved."""
        if not self.weights_sha256:
            return ""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    @property
    def background(self) -> Conversations:
        """Background conversations of training, which later thresholds must also respect."""
        traffic = self.training.traffic
        if traffic is None or not len(traffic.background):
            return Conversations.none(self.task.outputs)
        return traffic.background

    @property
    def label_thresholds(self) -> dict[str, float]:
        """``thresholds`` by label; empty for a multi-class task."""
        return dict(zip(self.task.flaggable, self.thresholds, strict=True))

    def to_json(self) -> str:
        """The card as JSON."""
        return self.model_dump_json(indent=2) + "\n"

    def header(self) -> dict[str, str]:
        """The metadata in the header of the probe's file."""
        return {_ENTRY: self.to_json()}

    def changed(self, **fields: Any) -> "ProbeCard":
        """A copy of the card with these fields replaced, not yet saved."""
        known = {name: getattr(self, name) for name in ProbeCard.model_fields}
        return ProbeCard.model_construct(None, **{**known, "weights_sha256": "", **fields})


def read_card(directory: str | Path) -> ProbeCard:
    """The card of an artifact, without its weights.

    Raises:
        SidelightError: The folder has no artifact, or the artifact is damaged or has another
            format.
    """
    return read_artifact(directory, header_only=True)[0]


def read_artifact(directory: str | Path, *, header_only: bool = False) -> tuple[ProbeCard, bytes]:
    """The card of an artifact, and the bytes of its whole file or of its header.

    The file is read once and not memory-mapped, so that replacing or overwriting it later does not
    change a probe that is being served.

    Raises:
        SidelightError: As for ``read_card``.
    """
    path = Path(directory) / PROBE
    try:
        with path.open("rb") as file:
            size = min(int.from_bytes(file.read(8), "little"), _HEADER_BYTES)
            content = file.read(size)
            header = json.loads(content)
            if not header_only:
                file.seek(0)
                content = file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        why = f"{PROBE} is missing" if path.parent.is_dir() else "it is not a folder"
        raise _no_probe(path.parent, why) from error
    except (OSError, ValueError, RecursionError) as error:
        raise SidelightError(f"Cannot read {path}: {error}. Copy the artifact again.") from error
    try:
        text = header["__metadata__"][_ENTRY]
    except (KeyError, TypeError) as error:
        raise _no_probe(path.parent, f"{PROBE} was written by another program") from error
    return _parsed(text, path.parent), content


def _parsed(text: str, directory: Path) -> ProbeCard:
    try:
        version = json.loads(text)["format"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise damaged(directory, f"its card cannot be read: {error}") from error
    if version != FORMAT_VERSION:
        raise SidelightError(
            f"{directory / PROBE} has format {version!r}, but this Sidelight reads format "
            f"{FORMAT_VERSION}. Upgrade Sidelight, or train the probe again."
        )
    try:
        card = ProbeCard.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise damaged(directory, f"{f'{place}: ' if place else ''}{first['msg']}") from error
    require_name(card.name)
    return card


def _no_probe(directory: Path, why: str) -> SidelightError:
    return SidelightError(
        f"{directory} holds no probe ({why}). Name a folder written by `sidelight train --out`."
    )


def require_name(name: str) -> None:
    """Check the name of a probe, which appears in headers, paths, metrics and logs.

    Raises:
        SidelightError: It is not 1 to 64 of the characters A-Z, a-z, 0-9, ``.``, ``_`` and ``-``,
            or it consists only of dots.
    """
    if not _NAME.fullmatch(name):
        raise SidelightError(
            f"{name[:80]!r} is not a valid name for a probe. Use 1 to 64 of the characters A-Z, "
            "a-z, 0-9, '.', '_' and '-', not only dots (--name)."
        )


def require_distinct_names(names: Sequence[str]) -> None:
    """Check that probes that are served together have distinct names.

    Raises:
        SidelightError: Two probes have the same name.
    """
    if len(set(names)) < len(names):
        raise SidelightError(
            f"Probes served together need distinct names, got: {', '.join(names)}. Train one "
            "with another --name, or save it under another name (docs/card.md#change-a-card)."
        )


def damaged(directory: Path, what: str) -> SidelightError:
    return SidelightError(
        f"The artifact at {directory} is damaged ({' '.join(what.split())}). Copy it again, or "
        "retrain the probe."
    )


def holds_probe(directory: Path) -> bool:
    """Whether the folder contains a probe, even one that cannot be read."""
    return (directory / PROBE).exists()


def require_free(directory: Path, *, force: bool) -> None:
    """Check that a probe may be written to a folder.

    Raises:
        SidelightError: The folder contains a probe, and ``force`` is False.
    """
    if holds_probe(directory) and not force:
        raise SidelightError(
            f"{directory} already contains a probe. Name another folder, or replace the probe "
            "with --force."
        )


_CARD = """---
{library}
tags: [sidelight, probe, text-classification]
---

# {name}

A Sidelight probe, which classifies texts from the hidden
states of the frozen LLM `{backbone}`, in the same forward pass that generates the response.

{rows}

## Use

```python
import sidelight

clf = sidelight.load("path/to/this/folder")  # or "hf:OWNER/NAME@REVISION"
print(clf.predict(["some text"])[0])
```

This is version {version}. It works only on the backbone with the fingerprint above, and loading
it on another one is refused.
The metrics are from the texts that its threshold was chosen on, so expect slightly lower values
on new data. Measure the probe on your own data with `sidelight eval`.
"""


def summary(card: ProbeCard) -> dict[str, str]:
    """Human-readable description of a probe, one entry per fact."""
    training, backbone, reads = card.training, card.backbone, card.reads
    options = ", ".join(f"{k}={v}" for k, v in card.mechanism.options.items())
    lines = {
        "name": card.name,
        "task": f"{card.task.kind}: {', '.join(card.task.labels)}",
        "flags": card.task.flags,
        "mechanism": card.mechanism.name + (f" ({options})" if options else ""),
        "reads": f"{reads.side}, by {reads.scope.replace('_', ' ')}",
        "states": "divided by their root mean square"
        if card.is_normalised
        else "of any norm, so that one token can outweigh all others",
        "format": card.prompt_format,
        "backbone": f"{backbone.name}, {backbone.layers} layers x {backbone.width}, "
        f"{backbone.dtype}, fingerprint {backbone.digest}",
        "thresholds": ", ".join(f"{t:.3f}" for t in card.thresholds) or "the largest wins",
    }
    if training.curves:
        lines["flagging"] = _flagging(card)
    lines["calibration"] = card.calibration.kind
    if report := training.validation.report:
        values = {
            name: report.metrics[name].value for name in _SUMMARY_METRICS if name in report.metrics
        }
        metrics = ", ".join(f"{name} {v:.3f}" for name, v in values.items() if v is not None)
        folds, contexts = training.folds, sum(training.contexts.values())
        lines |= {
            "parameters": f"{training.parameters:,}",
            "trained on": f"{training.training.rows:,} texts"
            + (f", and in {contexts:,} contexts" if contexts else "")
            + f", seed {training.seed}",
            **_labelled_by(training.training),
            "validation": f"{metrics} on {training.validation.rows:,} texts"
            + (f", each of {folds} folds by a probe trained on the others" if folds else "")
            + (", before it was recalibrated" if training.recalibrations else ""),
        }
    for number, later in enumerate(training.recalibrations, 1):
        lines[f"recalibrated {number}"] = f"{later.date}: {later.what}"
    if (fit := card.judge_fit) is not None:
        lines["judge"] = (
            f"{fit.model} ({fit.judge}), fitted {fit.date} on {fit.texts.rows:,} texts at "
            f"defer.share = {fit.share:g}: recall at 1 % false positives {fit.recall}, of the "
            f"probe alone {fit.recall_of_probe}"
        )
    return {name: visible(value) for name, value in lines.items()}


def _labelled_by(texts: TrainingTexts) -> dict[str, str]:
    return {"labelled by": "; ".join(map(str, texts.annotators))} if texts.annotators else {}


def _flagging(card: ProbeCard) -> str:
    """What the thresholds flag among the texts that they were chosen on."""
    flagged: list[str] = []
    for label, threshold in card.label_thresholds.items():
        curve = card.training.curves[label]
        hits, alarms = curve.at(threshold)
        caught = f"{hits:,} of {curve.positives:,} '{label}'"
        flagged.append(f"{caught} and {alarms:,} of {curve.negatives:,} others")
    rule = card.training.threshold_rule
    return f"{'; '.join(flagged)}, in the texts used to choose the threshold (--threshold {rule})"


def model_card(card: ProbeCard) -> str:
    """The human-readable card, in Markdown."""
    rows = "\n".join(f"- **{name}**: {value}" for name, value in summary(card).items())
    names = {"name": card.name, "backbone": card.backbone.name}
    return _CARD.format(library=CARD_LIBRARY, **names, version=card.version, rows=rows)
