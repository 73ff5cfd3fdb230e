"""The manifest of a probe: everything but its numbers, checked field by field when it is read.

It stands in the header of the probe's file. Also what is said of a probe from its manifest alone:
its summary, and the model card.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError

from sidelight.data.spans import SpanRule
from sidelight.errors import SidelightError
from sidelight.models.conversation import PromptFormat, Reads
from sidelight.models.fingerprint import Fingerprint
from sidelight.statistics.calibration import Calibration
from sidelight.statistics.thresholds import OperatingCurve
from sidelight.types import MechanismSpec, Task, is_label, visible

FORMAT_VERSION = 2
PROBE = "probe.safetensors"
CARD = "README.md"
# The line of a card's front matter that tells it from another README.md.
CARD_LIBRARY = "library_name: sidelight"

# Of the header's metadata.
_ENTRY = "sidelight"
# The most that the library reads.
_HEADER_BYTES = 10**8
# Dots alone name another folder.
_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,64}")
_Count = Annotated[int, Field(ge=0)]


class Figure(BaseModel):
    """A metric of the report."""

    value: float | None = None


class Figures(BaseModel, extra="allow"):
    """The metrics that are shown of a probe; the rest of the report is for people."""

    auprc: Figure = Figure()
    f1: Figure = Figure()
    accuracy: Figure = Figure()


class Reference(BaseModel):
    """Texts that a probe was trained or calibrated on, and its figures on them.

    Attributes:
        given_sha256: Hash of the texts of training before some were held out.
        texts: As ``text_hashes`` gives them.
    """

    rows: _Count = 0
    sha256: str = ""
    given_sha256: str = ""
    texts: str = ""
    metrics: Figures | None = None
    sources: dict[str, dict[str, _Count]] = {}
    curves: dict[str, OperatingCurve] = {}


class Recalibration(Reference):
    """The texts of a recalibration; one by a rule alone has those of the one before."""

    date: str
    what: str


class KeptTraffic(BaseModel):
    """The figures that are kept of the ordinary conversations of a training."""

    logits: list[list[FiniteFloat]] = []
    parts: list[_Count] = []
    flagged: _Count = 0
    conversations: _Count = 0


class History(BaseModel):
    """A probe's record, as far as it is read; the rest is for people."""

    training: Reference = Reference()
    training_sha256: str = ""
    contexts: dict[str, _Count] = {}
    traffic: KeptTraffic = KeptTraffic()
    validation: Reference = Reference()
    recalibrations: list[Recalibration] = []
    threshold_rule: str = "f1"
    folds: _Count = 0
    seed: int = 0
    parameters: _Count = 0
    labelling: str = ""

    @property
    def reference(self) -> Reference:
        """The newest recalibration, or else the validation texts of training."""
        return self.recalibrations[-1] if self.recalibrations else self.validation

    @property
    def curves(self) -> dict[str, OperatingCurve]:
        """The curve of each label's threshold; none of several classes."""
        return self.reference.curves


@dataclass(frozen=True)
class Manifest:
    """Everything about a probe but its numbers; the fields are described at ``Probe``.

    Attributes:
        format: Version of this layout.
        weights_sha256: Hash of the tensors that it was written with.
        is_normalised: As in ``Standardisation``.
    """

    format: int
    name: str
    mechanism: MechanismSpec
    task: Task
    reads: Reads
    prompt_format: PromptFormat
    calibration: Calibration
    thresholds: tuple[float, ...]
    backbone: Fingerprint
    record: Mapping[str, Any]
    weights_sha256: str
    is_normalised: bool
    spans: SpanRule | None = None

    def to_json(self) -> str:
        """The text of the manifest."""
        return _ADAPTER.dump_json(self, indent=2).decode() + "\n"

    @property
    def metadata(self) -> dict[str, str]:
        """The header of the probe's file, beside its tensors."""
        return {_ENTRY: self.to_json()}

    @cached_property
    def history(self) -> History:
        """The record, as far as it is read."""
        return History.model_validate(self.record)

    @property
    def version(self) -> str:
        """Twelve hexadecimal digits that stand for the whole artifact, weights included."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]


_ADAPTER = TypeAdapter(Manifest)


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of an artifact, without its weights.

    Raises:
        SidelightError: The folder holds no artifact, one of another format, or a damaged one.
    """
    return read_artifact(directory, header_only=True)[0]


def read_artifact(directory: str | Path, *, header_only: bool = False) -> tuple[Manifest, bytes]:
    """The manifest of an artifact, with all bytes of its file or those of the header.

    The file is read once, and not mapped into memory: one that is replaced or overwritten later
    must not change a probe that serves.

    Raises:
        SidelightError: As for ``read_manifest``.
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
        why = f"{PROBE} is missing" if path.parent.is_dir() else "it is no folder"
        raise _no_probe(path.parent, why) from error
    except (OSError, ValueError, RecursionError) as error:
        raise SidelightError(f"Cannot read {path}: {error}. Copy the artifact again.") from error
    try:
        text = header["__metadata__"][_ENTRY]
    except (KeyError, TypeError) as error:
        raise _no_probe(path.parent, f"{PROBE} is another program's") from error
    return _parsed(text, path.parent), content


def _parsed(text: str, directory: Path) -> Manifest:
    try:
        version = json.loads(text)["format"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise damaged(directory, f"its manifest cannot be read: {error}") from error
    if version != FORMAT_VERSION:
        raise SidelightError(
            f"{directory / PROBE} has format {version!r}, but this Sidelight reads format "
            f"{FORMAT_VERSION}. Upgrade Sidelight, or train the probe again."
        )
    try:
        manifest = _ADAPTER.validate_json(text, strict=True)
        History.model_validate_json(json.dumps(manifest.record), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise damaged(directory, f"{place} in its manifest: {first['msg']}") from error
    _require_sense(directory, manifest)
    return manifest


def _no_probe(directory: Path, why: str) -> SidelightError:
    return SidelightError(
        f"{directory} holds no probe ({why}). Name the folder that 'sidelight train --out' wrote."
    )


def _require_sense(directory: Path, manifest: Manifest) -> None:
    require_name(manifest.name)
    labels, kind = manifest.task.labels, manifest.task.kind
    thresholds = {"binary": 1, "multiclass": 0, "multilabel": len(labels)}[kind]
    history, calibration = manifest.history, manifest.calibration
    checks = {
        "task.labels": len(set(labels)) == len(labels) >= 2
        and (kind != "binary" or len(labels) == 2)
        and all(map(is_label, labels)),
        "thresholds": len(manifest.thresholds) == thresholds
        and all(0 <= threshold <= 1 for threshold in manifest.thresholds),
        "calibration": calibration.task == kind and len(calibration.scale) == manifest.task.outputs,
        "spans": manifest.spans is None or manifest.spans.fits(manifest.task),
        "curves": not history.curves or tuple(history.curves) == labels[-thresholds:],
        "traffic.logits": all(len(row) == manifest.task.outputs for row in history.traffic.logits),
        "backbone": manifest.backbone.layers > 0 and manifest.backbone.width > 0,
    }
    wrong = [name for name, holds in checks.items() if not holds]
    if wrong:
        raise damaged(directory, f"impossible values of {', '.join(wrong)} in its manifest")


def require_name(name: str) -> None:
    """Checks the name of a probe, which stands in headers, paths, metrics and logs.

    Raises:
        SidelightError: It is not 1 to 64 of the characters A-Z, a-z, 0-9, ``.``, ``_`` and ``-``,
            or it is dots alone.
    """
    if not _NAME.fullmatch(name):
        raise SidelightError(
            f"A probe cannot be called {name[:80]!r}. Name it with 1 to 64 of A-Z, a-z, 0-9, '.', "
            "'_' and '-', not dots alone (--name)."
        )


def require_distinct_names(names: Sequence[str]) -> None:
    """Checks that the verdicts of probes that are served together can be told apart.

    Raises:
        SidelightError: Two have the same name.
    """
    if len(set(names)) < len(names):
        raise SidelightError(
            f"Probes served together need distinct names, got: {', '.join(names)}. Train one with "
            "another --name, or save it under one (docs/manifest.md#change-a-manifest)."
        )


def damaged(directory: Path, what: str) -> SidelightError:
    return SidelightError(
        f"The artifact at {directory} is damaged ({' '.join(what.split())}). "
        "Copy it again, or train it again."
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
            f"{directory} holds a probe. Name another folder, or replace it with --force."
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


def summary(manifest: Manifest) -> dict[str, str]:
    """The description of a probe for people, a line for each fact."""
    history, backbone, reads = manifest.history, manifest.backbone, manifest.reads
    options = ", ".join(f"{k}={v}" for k, v in manifest.mechanism.options.items())
    lines = {
        "name": manifest.name,
        "task": f"{manifest.task.kind}: {', '.join(manifest.task.labels)}",
        "flags": manifest.task.flags,
        "mechanism": manifest.mechanism.name + (f" ({options})" if options else ""),
        "reads": f"{reads.side}, by {reads.scope.replace('_', ' ')}",
        "states": "divided by their root mean square"
        if manifest.is_normalised
        else "of any norm, so that one token can outweigh all others",
        "format": manifest.prompt_format,
        "backbone": f"{backbone.name}, {backbone.layers} layers x {backbone.width}, "
        f"{backbone.dtype}, fingerprint {backbone.digest}",
        "thresholds": ", ".join(f"{t:.3f}" for t in manifest.thresholds) or "the largest wins",
    }
    if history.curves:
        lines["flagging"] = _flagging(manifest)
    lines["calibration"] = manifest.calibration.kind
    if metrics := history.validation.metrics:
        values = {name: getattr(metrics, name).value for name in Figures.model_fields}
        figures = ", ".join(f"{name} {v:.3f}" for name, v in values.items() if v is not None)
        folds, contexts = history.folds, sum(history.contexts.values())
        lines |= {
            "parameters": f"{history.parameters:,}",
            "trained on": f"{history.training.rows:,} texts"
            + (f", and in {contexts:,} contexts" if contexts else "")
            + f", seed {history.seed}",
            "validation": f"{figures} on {history.validation.rows:,} texts"
            + (f", each of {folds} folds by a probe trained on the others" if folds else "")
            + (", before it was recalibrated" if history.recalibrations else ""),
        }
    for number, later in enumerate(history.recalibrations, 1):
        lines[f"recalibrated {number}"] = f"{later.date}: {later.what}"
    return {name: visible(value) for name, value in lines.items()}


def _flagging(manifest: Manifest) -> str:
    """The texts that the thresholds flag, of those that they were chosen on."""
    history, flagged = manifest.history, list[str]()
    for (label, curve), threshold in zip(history.curves.items(), manifest.thresholds, strict=False):
        hits, alarms = curve.at(threshold)
        caught = f"{hits:,} of {curve.positives:,} '{label}'"
        flagged.append(f"{caught} and {alarms:,} of {curve.negatives:,} others")
    return f"{'; '.join(flagged)}, of left-out texts (--threshold {history.threshold_rule})"


def model_card(manifest: Manifest) -> str:
    """The model card, in Markdown."""
    rows = "\n".join(f"- **{name}**: {value}" for name, value in summary(manifest).items())
    names = {"name": manifest.name, "backbone": manifest.backbone.name}
    return _CARD.format(library=CARD_LIBRARY, **names, version=manifest.version, rows=rows)
