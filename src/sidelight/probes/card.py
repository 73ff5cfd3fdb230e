"""The card of a probe: everything but its numbers, checked field by field when it is read.

It stands in the header of the probe's file, and as README.md for people beside it.
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
# The line of a card's front matter that tells it from another README.md.
CARD_LIBRARY = "library_name: sidelight"

# Of the header's metadata.
_ENTRY = "sidelight"
# The most that the library reads.
_HEADER_BYTES = 10**8
# Dots alone name another folder.
# The metrics that are shown of a probe.
_SUMMARY_METRICS = ("auprc", "f1", "accuracy")
_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,64}")


class _Record(BaseModel):
    """Facts that are written once, and read as they were written."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Texts(_Record):
    """Labelled texts.

    Attributes:
        rows: How many there are.
        sha256: Hash of them all.
        classes: How many have each label.
    """

    rows: NonNegativeInt = 0
    sha256: str = ""
    classes: Mapping[str, NonNegativeInt] = {}


class TrainingTexts(Texts):
    """The texts that a probe was trained on.

    Attributes:
        input_sha256: Hash of the texts before some were held out.
        texts: A short hash of each, as ``text_hashes`` gives them.
        annotators: Who labelled them; empty unless a judge labelled some.
    """

    input_sha256: str = ""
    texts: str = ""
    # Left out where it is empty, so that the versions of other probes stay as they are.
    annotators: tuple[Annotator, ...] = Field(default=(), exclude_if=lambda value: not value)


class CalibrationTexts(Texts):
    """The texts that a probe was calibrated on, and its figures on them.

    Attributes:
        report: Its figures, each text calibrated without it.
        curves: The curve of each label that has a threshold.
        sources: What is found and flagged of each source.
    """

    report: Report | None = None
    curves: Mapping[str, OperatingCurve] = {}
    sources: Mapping[str, Detections] = {}


class Recalibration(_Record):
    """A recalibration.

    Attributes:
        date: When, as an ISO date.
        what: By what, as a clause.
        version: Of the probe before it.
        calibration: Before it.
        thresholds: Before it.
        before: The figures before it, on its texts.
        texts: What it was calibrated on; None: thresholds alone were chosen anew.
    """

    date: str
    what: str
    version: str = ""
    calibration: Calibration | None = None
    thresholds: tuple[float, ...] = ()
    before: Report | None = None
    texts: CalibrationTexts | None = None


class StatesRecord(_Record):
    """How the hidden states of a training were kept, and the bytes of a token's."""

    form: Literal["whole", "compressed"]
    streamed: bool
    token_bytes: NonNegativeInt


class Epochs(_Record):
    """The validation score after each epoch, and the one whose parameters were kept, from 1."""

    scores: tuple[float, ...] = ()
    best: NonNegativeInt = 0


class DepthTrial(_Record):
    """A depth that a training could read to, on held-out texts.

    Attributes:
        layers: How many hidden states of a token it reads, from the embedding up.
        loss: The mean log loss of a text.
        lost: How much larger the loss is than at full depth, in the mean over texts.
        lost_at_most: The upper end of the one-sided 95 % confidence interval of ``lost``.
        is_accepted: Whether that is within the tolerance.
    """

    layers: PositiveInt
    loss: float
    lost: float = 0.0
    lost_at_most: float = 0.0
    is_accepted: bool = True


class TrainingRecord(_Record):
    """How a probe was trained and recalibrated.

    Attributes:
        engine: What computed the hidden states.
        states: How they were kept.
        training: The texts that parameters were fitted to.
        training_sha256: Hash of everything that decides the probe.
        contexts: How many contexts of each kind the training texts were also shown in.
        validation: The held-out texts that calibrated.
        traffic: Figures on background traffic; None: trained without.
        recalibrations: The newest last.
        threshold_rule: What the thresholds were chosen for, as ``--threshold`` takes it.
        max_tokens: Longer training texts were cut to this.
        folds: Folds of cross-fitting; 0 for a validation part.
        seed: Of the training.
        settings: How it was optimised.
        epochs: How well.
        parameters: How many were trained.
        spans: How well spans of held-out texts were found.
        lookaheads: The character F1 of each lookahead that was tried.
        depths: The depths that were tried, the deepest first; the last accepted one is the
            probe's. None of them: the depth was given.
        labelling: The file of labels of a probe that ``sidelight label`` made.
        copy_of: The version of the probe that this one is a copy of, for a copy of its model.
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
    # An entry that an artifact lacks leaves its version as it is.
    depths: Annotated[tuple[DepthTrial, ...], Field(exclude_if=lambda depths: not depths)] = ()
    labelling: str = ""
    copy_of: str = ""

    @property
    def calibrated_on(self) -> CalibrationTexts:
        """The texts of the newest recalibration that had some, or else those of validation."""
        newest_first = (recalibration.texts for recalibration in reversed(self.recalibrations))
        return next((texts for texts in newest_first if texts is not None), self.validation)

    @property
    def curves(self) -> Mapping[str, OperatingCurve]:
        """The curve of each label's threshold; none of several classes."""
        return self.calibrated_on.curves

    @property
    def flagged(self) -> tuple[int, int]:
        """How many background conversations were flagged, and of how many; none of 0."""
        if self.traffic is None:
            return 0, 0
        return self.traffic.flagged, len(self.traffic.background)


class JudgeFit(_Record):
    """How a probe and a judge decide together about the texts that a rule defers.

    A text is flagged if ``weight * logit(probe) + (1 - weight) * logit(judge)`` reaches the
    threshold.

    Attributes:
        judge: ``JudgeSettings.digest`` of the judge that it holds for, and for no other.
        model: What that judge's server calls its model.
        weight: Of the probe, from 0 to 1.
        threshold: Of the weighted sum, in log-odds.
        threshold_rule: What it was chosen for, as ``--threshold`` takes it.
        share: The share of background traffic that was deferred.
        texts: The labelled texts.
        deferred: How many of them were deferred.
        recall: At 1 % false positives, out of fold.
        recall_of_probe: Of the probe alone, on the same texts.
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
    """Everything about a probe but its numbers.

    Attributes:
        format: Version of this layout.
        name: Its name in verdicts.
        mechanism: Name and options of the mechanism.
        task: The classes.
        reads: The tokens that it reads.
        prompt_format: How texts are rendered for it. A probe of ``both`` judges chats, and plain
            text as it is; on plain text, a probe of ``chat`` fails.
        calibration: From logits to probabilities.
        thresholds: The probability from which a label holds: one for a binary task, one per label
            for a multi-label task, none for a multi-class task.
        backbone: The fingerprint of the model that it belongs to.
        training: How it was trained.
        spans: How tokens are labelled; None for a probe of whole texts.
        judge_fit: How it decides together with a judge; None: a judge decides alone.
        is_normalised: As in ``Standardisation``; set on saving.
        weights_sha256: Hash of the tensors beside it; "" before it is saved.
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
    # Left out where there is none, so that the versions of other probes stay as they are.
    judge_fit: JudgeFit | None = Field(default=None, exclude_if=lambda fit: fit is None)
    is_normalised: bool = False
    weights_sha256: str = ""

    @model_validator(mode="after")
    def _makes_sense(self) -> "ProbeCard":
        task, traffic = self.task, self.training.traffic
        checks = {
            "task.labels": task.is_sound,
            "thresholds": len(self.thresholds) == len(task.flaggable)
            and all(0 <= threshold <= 1 for threshold in self.thresholds),
            "calibration": self.calibration.task == task.kind
            and len(self.calibration.scale) == task.outputs,
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
        """Twelve hexadecimal digits that stand for the whole artifact; "" before it is saved."""
        if not self.weights_sha256:
            return ""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    @property
    def background(self) -> Conversations:
        """The background conversations of training, which keep later thresholds above them."""
        traffic = self.training.traffic
        if traffic is None or not len(traffic.background):
            return Conversations.none(self.task.outputs)
        return traffic.background

    @property
    def label_thresholds(self) -> dict[str, float]:
        """``thresholds`` by label; empty for a multi-class task."""
        return dict(zip(self.task.flaggable, self.thresholds, strict=True))

    def to_json(self) -> str:
        """The text of the card."""
        return self.model_dump_json(indent=2) + "\n"

    def header(self) -> dict[str, str]:
        """The header of the probe's file, beside its tensors."""
        return {_ENTRY: self.to_json()}

    def changed(self, **fields: Any) -> "ProbeCard":
        """The card of another probe that differs in these fields; it has not been saved."""
        known = {name: getattr(self, name) for name in ProbeCard.model_fields}
        return ProbeCard.model_construct(None, **{**known, "weights_sha256": "", **fields})


def read_card(directory: str | Path) -> ProbeCard:
    """The card of an artifact, without its weights.

    Raises:
        SidelightError: The folder holds no artifact, one of another format, or a damaged one.
    """
    return read_artifact(directory, header_only=True)[0]


def read_artifact(directory: str | Path, *, header_only: bool = False) -> tuple[ProbeCard, bytes]:
    """The card of an artifact, with all bytes of its file or those of the header.

    The file is read once, and not mapped into memory: one that is replaced or overwritten later
    must not change a probe that serves.

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
    """Checks the name of a probe, which stands in headers, paths, metrics and logs.

    Raises:
        SidelightError: It is not 1 to 64 of the characters A-Z, a-z, 0-9, ``.``, ``_`` and ``-``,
            or it is dots alone.
    """
    if not _NAME.fullmatch(name):
        raise SidelightError(
            f"{name[:80]!r} is not a valid name for a probe. Use 1 to 64 of the characters A-Z, "
            "a-z, 0-9, '.', '_' and '-', not only dots (--name)."
        )


def require_distinct_names(names: Sequence[str]) -> None:
    """Checks that the verdicts of probes that are served together can be told apart.

    Raises:
        SidelightError: Two have the same name.
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
    """Whether there is a probe in the folder, also one that cannot be read."""
    return (directory / PROBE).exists()


def require_free(directory: Path, *, force: bool) -> None:
    """Checks that a probe may be written to a folder.

    Raises:
        SidelightError: It holds a probe that is not to be replaced.
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

A Sidelight probe: it classifies a text from the hidden
states that the frozen LLM `{backbone}` computes anyway, in the same forward pass that answers it.

{rows}

## Use

```python
import sidelight

clf = sidelight.load("path/to/this/folder")  # or "hf:OWNER/NAME@REVISION"
print(clf.predict(["some text"])[0])
```

This is version {version}. It fits one backbone (the fingerprint above); loading it on another is
refused.
The figures are from the texts that chose its threshold: expect a little less on new data,
and measure on your own with `sidelight eval`.
"""


def summary(card: ProbeCard) -> dict[str, str]:
    """The description of a probe for people, a line for each fact."""
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
    """The texts that the thresholds flag, of those that they were chosen on."""
    flagged: list[str] = []
    for label, threshold in card.label_thresholds.items():
        curve = card.training.curves[label]
        hits, alarms = curve.at(threshold)
        caught = f"{hits:,} of {curve.positives:,} '{label}'"
        flagged.append(f"{caught} and {alarms:,} of {curve.negatives:,} others")
    rule = card.training.threshold_rule
    return f"{'; '.join(flagged)}, of left-out texts (--threshold {rule})"


def model_card(card: ProbeCard) -> str:
    """The card for people, in Markdown."""
    rows = "\n".join(f"- **{name}**: {value}" for name, value in summary(card).items())
    names = {"name": card.name, "backbone": card.backbone.name}
    return _CARD.format(library=CARD_LIBRARY, **names, version=card.version, rows=rows)
