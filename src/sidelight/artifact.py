"""A probe as a folder: ``probe.safetensors`` and ``manifest.json``. Nothing is unpickled."""

import fcntl
import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sidelight.bank import gives_verdicts
from sidelight.errors import SidelightError
from sidelight.manifest import (
    CARD,
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS,
    Manifest,
    damaged,
    model_card,
    read_manifest,
    require_free,
    require_name,
)
from sidelight.mechanisms.base import Geometry, build_mechanism, mechanism_spec
from sidelight.probe import Probe
from sidelight.standardisation import Standardisation
from sidelight.storage import remove_stale, replacing, sync

_PREVIOUS_WEIGHTS = "probe.previous.safetensors"
_SCRATCH = ".saving-"
_PARAMETER = "mechanism."


def save_probe(probe: Probe, directory: Path) -> Path:
    """Writes the artifact; other files in ``directory`` stay.

    A save that is killed leaves the old artifact: the manifest, which names the hash of its
    weights, is replaced last, and until then the old weights stay beside the new ones.

    Raises:
        SidelightError: The folder cannot be written, or the name is no probe's.
    """
    require_name(probe.name)
    parameters = {
        f"{_PARAMETER}{key}": value.detach().cpu().contiguous()
        for key, value in probe.mechanism.state_dict().items()
    }
    scaling = probe.standardisation
    tensors = {**parameters, "mean": scaling.mean.cpu(), "scale": scaling.scale.cpu()}
    # Written as bytes: only its owner could read a file that the library writes itself.
    weights = save(tensors)
    manifest = Manifest(
        format=FORMAT_VERSION,
        name=probe.name,
        mechanism=probe.spec,
        task=probe.task,
        reads=probe.reads,
        is_normalised=scaling.is_normalised,
        prompt_format=probe.prompt_format,
        calibration=probe.calibration,
        thresholds=probe.thresholds,
        backbone=probe.fingerprint,
        record=probe.record,
        weights_sha256=_sha256(weights),
        spans=probe.spans,
    )
    return _write(manifest, weights, directory)


def copy_probe(source: Path, directory: Path, *, force: bool) -> None:
    """Copies an artifact, as ``save_probe`` writes it, once it has been checked; its version stays.

    Its card goes along if it names this version; otherwise one is written from the manifest.

    Raises:
        SidelightError: As for ``load_probe`` and ``save_probe``, or the folder holds a probe or a
            card that ``force`` does not replace; then nothing has changed.
    """
    manifest = read_manifest(source)
    weights = _read_weights(manifest, source)
    _checked(manifest, weights, source)
    card = source / CARD
    text = card.read_bytes() if card.exists() else b""
    is_current = manifest.version.encode() in text
    text = text if is_current else model_card(manifest).encode()
    _write(manifest, weights, directory, card=text, force=force)


def _write(
    manifest: Manifest,
    weights: bytes,
    directory: Path,
    *,
    card: bytes | None = None,
    force: bool = True,
) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_stale(directory, f"{_SCRATCH}*")
        with tempfile.TemporaryDirectory(dir=directory, prefix=_SCRATCH) as name:
            scratch = Path(name)
            _write_through(scratch / WEIGHTS, weights)
            _write_through(scratch / MANIFEST, manifest.to_json().encode())
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                # Of two at once, the files of one could stand beside those of the other. Some disks
                # have no locks.
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                if not force:
                    require_free(directory, force=False, with_card=card is not None)
                _replace(scratch, directory)
                if card is not None:
                    with replacing(directory / CARD) as partial:
                        partial.write_bytes(card)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise SidelightError(
            f"Cannot write the probe to {directory}: {error.strerror}. Name another folder."
        ) from error
    return directory


def _replace(scratch: Path, directory: Path) -> None:
    previous = directory / _PREVIOUS_WEIGHTS
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
    """Whether the manifest still names these weights: a save was killed before replacing it."""
    try:
        return _sha256(_read(previous)) == read_manifest(previous.parent).weights_sha256
    except SidelightError:
        return False


def _write_through(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)


def load_probe(directory: str | Path) -> Probe:
    """The probe stored in a folder.

    Raises:
        SidelightError: The folder holds no artifact, one of another format, or a damaged one, or a
            probe without verdicts (``gives_verdicts``).
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    return _checked(manifest, _read_weights(manifest, directory), directory)


def _checked(manifest: Manifest, weights: bytes, directory: Path) -> Probe:
    try:
        probe = _assemble(manifest, load(weights))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise damaged(directory, str(error)) from error
    if not gives_verdicts(probe):
        raise damaged(
            directory,
            "it gives no verdict: its weights are not finite, or they or the inverse of its scale "
            "are so large that sums overflow",
        )
    return probe


def _read_weights(manifest: Manifest, directory: Path) -> bytes:
    """The weights that the manifest was written with, read once.

    They are not mapped into memory: a file that is overwritten later must not change a probe that
    serves.
    """
    current, previous = directory / WEIGHTS, directory / _PREVIOUS_WEIGHTS
    for path in (current, previous) if previous.exists() else (current,):
        weights = _read(path)
        if _sha256(weights) == manifest.weights_sha256:
            return weights
    raise SidelightError(
        f"{current} is not the file that {MANIFEST} was written with. "
        "Copy the artifact again, or train it again."
    )


def _assemble(manifest: Manifest, tensors: dict[str, Tensor]) -> Probe:
    task, backbone = manifest.task, manifest.backbone
    spec = mechanism_spec(manifest.mechanism.name, manifest.mechanism.options)
    mechanism = build_mechanism(spec, Geometry(backbone.layers, backbone.width, task.outputs))
    standardisation = Standardisation(
        tensors.pop("mean"), tensors.pop("scale"), manifest.is_normalised
    )
    if {standardisation.mean.shape, standardisation.scale.shape} != {
        (backbone.layers, backbone.width)
    }:
        raise ValueError(f"mean or scale is not [{backbone.layers}, {backbone.width}]")
    mechanism.load_state_dict(
        {key.removeprefix(_PARAMETER): value for key, value in tensors.items()}
    )
    return Probe(
        name=manifest.name,
        task=task,
        reads=manifest.reads,
        prompt_format=manifest.prompt_format,
        spec=spec,
        mechanism=mechanism.eval().requires_grad_(False),
        standardisation=standardisation,
        calibration=manifest.calibration,
        thresholds=manifest.thresholds,
        fingerprint=backbone,
        record=manifest.record,
        version=manifest.version,
        spans=manifest.spans,
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SidelightError(
            f"Cannot read {path}: {error.strerror}. Copy the artifact again, or train it again."
        ) from error
