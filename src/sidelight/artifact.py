"""What an artifact's ``manifest.json`` holds, checked field by field when it is read.

A probe's manifest for people: a summary, and a model card for sharing.

A probe as a folder: ``probe.safetensors`` and ``manifest.json``. Nothing is unpickled.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sidelight.backbone import Fingerprint
from sidelight.calibration import Calibration
from sidelight.errors import SidelightError
from sidelight.mechanisms.base import Geometry, MechanismSpec, mechanism_spec
from sidelight.probe import Probe
from sidelight.prompts import PromptFormat, Reads
from sidelight.standardisation import Standardisation
from sidelight.storage import sync
from sidelight.types import Task

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """Everything of a probe but its numbers.

    Attributes:
        format: Version of this layout.
        name: Of the probe.
        mechanism: Its name and options.
        task: The classes.
        reads: The tokens that are read.
        prompt_format: How texts are rendered.
        calibration: As ``Calibration.to_dict`` gives it.
        thresholds: See ``Probe``.
        backbone: The backbone's fingerprint.
        record: See ``Probe``.
        weights_sha256: Of the weights file that belongs to it.
    """

    format: int
    name: str
    mechanism: MechanismSpec
    task: Task
    reads: Reads
    prompt_format: PromptFormat
    calibration: Mapping[str, Any]
    thresholds: tuple[float, ...]
    backbone: Fingerprint
    record: Mapping[str, Any]
    weights_sha256: str

    def to_json(self) -> str:
        """The file's text."""
        return _ADAPTER.dump_json(self, indent=2).decode() + "\n"

    @property
    def version(self) -> str:
        """Twelve hexadecimal digits that stand for the whole artifact, weights included."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]


_ADAPTER = TypeAdapter(Manifest)
_FORMAT = TypeAdapter(dict[str, Any], config=ConfigDict(strict=True))


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of an artifact, without its weights.

    Raises:
        SidelightError: Not an artifact, of another format, or damaged.
    """
    path = Path(directory) / MANIFEST
    try:
        text = path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SidelightError(
            f"{directory} holds no probe ({MANIFEST} is missing). "
            "Name the folder that 'sidelight train --out' wrote."
        ) from error
    except (OSError, ValueError) as error:
        raise SidelightError(f"Cannot read {path}: {error}. Copy the artifact again.") from error
    _require_format(path, text)
    try:
        manifest = _ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise damaged(Path(directory), f"{place} in {MANIFEST}: {first['msg']}") from error
    _require_sense(Path(directory), manifest)
    return manifest


def damaged(directory: Path, what: str) -> SidelightError:
    """The error for an artifact that contradicts itself."""
    return SidelightError(
        f"The artifact at {directory} is damaged ({' '.join(what.split())}). "
        "Copy it again, or train it again."
    )


def _require_format(path: Path, text: str) -> None:
    try:
        version = _FORMAT.validate_json(text).get("format")
    except ValidationError as error:
        version = None
        if error.errors()[0]["type"] == "json_invalid":
            raise SidelightError(
                f"Cannot read {path}: it is not JSON. Copy the artifact again."
            ) from error
    if version != FORMAT_VERSION or type(version) is not int:
        raise SidelightError(
            f"{path} has format {version!r}; this Sidelight reads format {FORMAT_VERSION}. "
            "Upgrade Sidelight, or train the probe again."
        )


def _require_sense(directory: Path, manifest: Manifest) -> None:
    labels = manifest.task.labels
    kind = manifest.task.kind
    wanted = {"binary": 1, "multiclass": 0, "multilabel": len(labels)}[kind]
    checks = {
        "task.labels": len(set(labels)) == len(labels)
        and len(labels) >= 2
        and (kind != "binary" or len(labels) == 2),
        "thresholds": len(manifest.thresholds) == wanted
        and all(0 <= threshold <= 1 for threshold in manifest.thresholds),
        "backbone": manifest.backbone.layers > 0 and manifest.backbone.width > 0,
    }
    wrong = [name for name, holds in checks.items() if not holds]
    if wrong:
        raise damaged(directory, f"{', '.join(wrong)} in {MANIFEST} cannot be")


_CARD = """---
library_name: sidelight
tags: [sidelight, probe, text-classification]
---

# {name}

A Sidelight probe: it classifies a text from the hidden
states that the frozen LLM `{backbone}` computes anyway, in the same forward pass that answers it.

{rows}

## Use

```python
import sidelight

clf = sidelight.load("path/to/this/folder")
print(clf.predict(["some text"])[0])
```

The probe fits one backbone (the fingerprint above); loading it on another is refused.
The figures are from the texts that chose its threshold: expect a little less on new data,
and measure on your own with `sidelight eval`.
"""


def summary(manifest: Manifest) -> dict[str, str]:
    """What the manifest says, a line each."""
    record, backbone = manifest.record, manifest.backbone
    options = ", ".join(f"{k}={v}" for k, v in manifest.mechanism.options.items())
    lines = {
        "name": manifest.name,
        "task": f"{manifest.task.kind}: {', '.join(manifest.task.labels)}",
        "mechanism": f"{manifest.mechanism.name} ({options})",
        "reads": manifest.reads.side,
        "format": manifest.prompt_format,
        "backbone": f"{backbone.name}, {backbone.layers} layers x {backbone.width}, "
        f"{backbone.dtype}, fingerprint {backbone.digest}",
        "thresholds": ", ".join(f"{t:.3f}" for t in manifest.thresholds) or "the largest wins",
        "calibration": str(manifest.calibration["kind"]),
    }
    if record:
        lines |= {
            "parameters": f"{record['parameters']:,}",
            "trained on": _taught(record),
            "validation": _figures(record["validation"]) + _folded(record.get("folds", 0)),
        }
    return lines


def model_card(manifest: Manifest) -> str:
    """The model card, in Markdown."""
    rows = "\n".join(f"- **{name}**: {value}" for name, value in summary(manifest).items())
    return _CARD.format(name=manifest.name, backbone=manifest.backbone.name, rows=rows)


def _taught(record: Mapping[str, Any]) -> str:
    is_long = record.get("settings", {}).get("long_inputs")
    among = ", also among others in long inputs" if is_long else ""
    return f"{record['training']['rows']:,} texts{among}, seed {record['seed']}"


def _folded(folds: int) -> str:
    return f", each fold of {folds} by a probe that the others taught" if folds else ""


def _figures(validation: Mapping[str, Any]) -> str:
    metrics = validation["metrics"]
    shown = [
        f"{name} {metrics[name]['value']:.3f}"
        for name in ("auprc", "f1", "accuracy")
        if metrics[name]["value"] is not None
    ]
    return f"{', '.join(shown)} on {validation['rows']:,} texts"


WEIGHTS = "probe.safetensors"
_PREVIOUS = "probe.previous.safetensors"
_PARAMETER = "mechanism."


def save_probe(probe: Probe, directory: Path) -> Path:
    """Writes the artifact; other files in ``directory`` stay.

    A save that is killed leaves the old artifact: the manifest is replaced last, names the hash of
    its weights, and until then the old weights are kept beside the new ones.

    Raises:
        SidelightError: The folder cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
            _replace(probe, Path(scratch), directory)
    except OSError as error:
        raise SidelightError(
            f"Cannot write the probe to {directory}: {error.strerror}. Name another folder."
        ) from error
    return directory


def load_probe(directory: str | Path) -> Probe:
    """The probe stored in a folder.

    Raises:
        SidelightError: Not an artifact, a newer format, or damaged.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    weights = _weights_of(manifest, directory)
    try:
        return _assemble(manifest, load_file(weights))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise damaged(directory, str(error)) from error


def _replace(probe: Probe, scratch: Path, directory: Path) -> None:
    # Written as bytes: the library's own file would be readable by its owner only.
    _write_through(scratch / WEIGHTS, save(_tensors(probe)))
    manifest = _describe(probe, weights_sha256=_sha256(scratch / WEIGHTS))
    _write_through(scratch / MANIFEST, manifest.to_json().encode())
    previous = directory / _PREVIOUS
    if not _is_needed(previous):
        previous.unlink(missing_ok=True)
        if (directory / WEIGHTS).exists():
            os.link(directory / WEIGHTS, previous)
    os.replace(scratch / WEIGHTS, directory / WEIGHTS)
    sync(directory)
    os.replace(scratch / MANIFEST, directory / MANIFEST)
    sync(directory)
    previous.unlink(missing_ok=True)


def _is_needed(previous: Path) -> bool:
    """Whether the manifest still names these weights: a save was killed before it replaced it."""
    try:
        return _sha256(previous) == read_manifest(previous.parent).weights_sha256
    except SidelightError:
        return False


def _write_through(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)


def _weights_of(manifest: Manifest, directory: Path) -> Path:
    """The weights that the manifest was written with."""
    found = [directory / WEIGHTS, directory / _PREVIOUS]
    for path in found:
        if (path == found[0] or path.exists()) and _sha256(path) == manifest.weights_sha256:
            return path
    raise SidelightError(
        f"{directory / WEIGHTS} is not the file that {MANIFEST} was written with. "
        "Copy the artifact again, or train it again."
    )


def _describe(probe: Probe, *, weights_sha256: str) -> Manifest:
    return Manifest(
        format=FORMAT_VERSION,
        name=probe.name,
        mechanism=probe.spec,
        task=probe.task,
        reads=probe.reads,
        prompt_format=probe.prompt_format,
        calibration=probe.calibration.to_dict(),
        thresholds=probe.thresholds,
        backbone=probe.fingerprint,
        record=probe.record,
        weights_sha256=weights_sha256,
    )


def _tensors(probe: Probe) -> dict[str, Tensor]:
    parameters = {
        f"{_PARAMETER}{key}": value.detach().cpu().contiguous()
        for key, value in probe.mechanism.state_dict().items()
    }
    scaling = probe.standardisation
    return {**parameters, "mean": scaling.mean.cpu(), "scale": scaling.scale.cpu()}


def _assemble(manifest: Manifest, tensors: dict[str, Tensor]) -> Probe:
    task, backbone = manifest.task, manifest.backbone
    spec = mechanism_spec(manifest.mechanism.name, manifest.mechanism.options)
    mechanism = spec.build(Geometry(backbone.layers, backbone.width, task.outputs))
    standardisation = Standardisation(tensors.pop("mean"), tensors.pop("scale"))
    if {standardisation.mean.shape, standardisation.scale.shape} != {
        (backbone.layers, backbone.width)
    }:
        raise ValueError(f"mean or scale is not [{backbone.layers}, {backbone.width}]")
    mechanism.load_state_dict(
        {key.removeprefix(_PARAMETER): value for key, value in tensors.items()}
    )
    calibration = Calibration.from_dict(manifest.calibration)
    if calibration.task != task.kind or len(calibration.scale) != task.outputs:
        raise ValueError("the calibration belongs to another task")
    return Probe(
        name=manifest.name,
        task=task,
        reads=manifest.reads,
        prompt_format=manifest.prompt_format,
        spec=spec,
        mechanism=mechanism.eval().requires_grad_(False),
        standardisation=standardisation,
        calibration=calibration,
        thresholds=manifest.thresholds,
        fingerprint=backbone,
        record=manifest.record,
        version=manifest.version,
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SidelightError(
            f"Cannot read {path}: {error.strerror}. Copy the artifact again, or train it again."
        ) from error
