"""A probe as a folder: ``probe.safetensors`` and ``manifest.json``. Nothing is unpickled."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sidelight.backbones.base import Fingerprint
from sidelight.calibration import Calibration
from sidelight.errors import SidelightError
from sidelight.mechanisms import Geometry, mechanism_spec
from sidelight.probe import Probe
from sidelight.prompts import Reads
from sidelight.standardisation import Standardisation
from sidelight.types import Task

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "probe.safetensors"
_PARAMETER = "mechanism."


def save_probe(probe: Probe, directory: Path) -> Path:
    """Writes the artifact; other files in ``directory`` stay.

    Each file is replaced whole. The manifest goes last and names the weights' hash, so a reader
    never pairs it with other weights.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
        weights, manifest = Path(scratch) / WEIGHTS, Path(scratch) / MANIFEST
        save_file(_tensors(probe), weights)
        described = {**_describe(probe), "weights_sha256": _sha256(weights)}
        manifest.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(weights, directory / WEIGHTS)
        os.replace(manifest, directory / MANIFEST)
    return directory


def load_probe(directory: str | Path) -> Probe:
    """The probe stored in a folder.

    Raises:
        SidelightError: Not an artifact, a newer format, or damaged.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if _sha256(directory / WEIGHTS) != manifest.get("weights_sha256"):
        raise SidelightError(
            f"{directory / WEIGHTS} is not the file that {MANIFEST} was written with. "
            "Copy the artifact again, or train it again."
        )
    try:
        return _assemble(manifest, load_file(directory / WEIGHTS))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise SidelightError(
            f"The artifact at {directory} is damaged: {error}. Copy it again, or train it again."
        ) from error


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of an artifact, without its weights.

    Raises:
        SidelightError: Not an artifact, or of a newer format.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise SidelightError(
            f"{directory} holds no probe ({MANIFEST} is missing). "
            "Name the folder that 'sidelight train --out' wrote."
        ) from error
    except (OSError, ValueError) as error:
        raise SidelightError(f"Cannot read {path}: {error}. Copy the artifact again.") from error
    version = manifest.get("format") if type(manifest) is dict else None
    if version != FORMAT_VERSION:
        raise SidelightError(
            f"{path} has format {version!r}; this Sidelight reads format {FORMAT_VERSION}. "
            "Upgrade Sidelight, or train the probe again."
        )
    return manifest


def _describe(probe: Probe) -> dict[str, Any]:
    return {
        "format": FORMAT_VERSION,
        "name": probe.name,
        "mechanism": asdict(probe.spec),
        "task": asdict(probe.task),
        "reads": asdict(probe.reads),
        "prompt_format": probe.prompt_format,
        "calibration": probe.calibration.to_dict(),
        "thresholds": list(probe.thresholds),
        "backbone": asdict(probe.fingerprint),
        "record": probe.record,
    }


def _tensors(probe: Probe) -> dict[str, Any]:
    parameters = {
        f"{_PARAMETER}{key}": value.detach().cpu().contiguous()
        for key, value in probe.mechanism.state_dict().items()
    }
    scaling = probe.standardisation
    return {**parameters, "mean": scaling.mean.cpu(), "scale": scaling.scale.cpu()}


def _assemble(manifest: Mapping[str, Any], tensors: dict[str, Any]) -> Probe:
    task = Task(manifest["task"]["kind"], tuple(manifest["task"]["labels"]))
    fingerprint = Fingerprint(**manifest["backbone"])
    spec = mechanism_spec(manifest["mechanism"]["name"], manifest["mechanism"]["options"])
    mechanism = spec.build(Geometry(fingerprint.layers, fingerprint.width, task.outputs))
    standardisation = Standardisation(tensors.pop("mean"), tensors.pop("scale"))
    mechanism.load_state_dict(
        {key.removeprefix(_PARAMETER): value for key, value in tensors.items()}
    )
    return Probe(
        name=manifest["name"],
        task=task,
        reads=Reads(**manifest["reads"]),
        prompt_format=manifest["prompt_format"],
        spec=spec,
        mechanism=mechanism.eval().requires_grad_(False),
        standardisation=standardisation,
        calibration=Calibration.from_dict(manifest["calibration"]),
        thresholds=tuple(manifest["thresholds"]),
        fingerprint=fingerprint,
        record=manifest["record"],
    )


def _sha256(path: Path) -> str:

    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SidelightError(
            f"Cannot read {path}: {error.strerror}. Copy the artifact again, or train it again."
        ) from error
