"""What an artifact's ``manifest.json`` holds, checked field by field when it is read."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sidelight.backbones.base import Fingerprint
from sidelight.errors import SidelightError
from sidelight.mechanisms import MechanismSpec
from sidelight.prompts import PromptFormat, Reads
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
