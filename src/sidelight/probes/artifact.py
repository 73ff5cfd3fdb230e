"""A probe as a file, with its card in the header. Nothing is unpickled.

Also checks that a loaded probe gives verdicts.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sidelight.errors import SidelightError, VerdictError
from sidelight.models.conversation import TokenRole
from sidelight.probes.bank import Bank
from sidelight.probes.card import (
    CARD_LIBRARY,
    PROBE,
    README,
    ProbeCard,
    damaged,
    model_card,
    read_artifact,
    require_name,
)
from sidelight.probes.mechanisms.base import (
    Geometry,
    build_mechanism,
    labels_tokens,
    mechanism_spec,
)
from sidelight.probes.probe import Probe
from sidelight.probes.standardisation import Standardisation
from sidelight.storage import replacing, sync

_PARAMETER = "mechanism."
# Segments of a synthetic text, and how many standard deviations its states are from the mean. An
# attention sink has a hundred times the norm of other tokens.
_TOKEN_ROLES = bytes([TokenRole.PROMPT, TokenRole.RESPONSE] * 4)
_DEVIATIONS = (0.0, 1.0, 100.0)
# States of a language model deviate by this much in some dimensions.
_USUAL_SCALE = 10.0


def save_probe(probe: Probe, directory: Path) -> Path:
    """Write the artifact and its model card; other files in ``directory`` are kept.

    The file is replaced atomically, so an interrupted save leaves the old artifact. A README.md
    that is not a probe's card is also kept.

    Raises:
        SidelightError: The folder cannot be written, or the probe's name is not valid.
    """
    require_name(probe.name)
    parameters = {
        f"{_PARAMETER}{key}": value.detach().cpu().contiguous()
        for key, value in probe.mechanism.state_dict().items()
    }
    scaling = probe.standardisation
    tensors = {**parameters, "mean": scaling.mean.cpu(), "scale": scaling.scale.cpu()}
    card = probe.card.changed(is_normalised=scaling.is_normalised, weights_sha256=_sha256(tensors))
    # As bytes: the library would write a file that only its owner can read.
    files = {PROBE: save(tensors, card.header())}
    try:
        readme = directory / README
        if not readme.exists() or CARD_LIBRARY.encode() in readme.read_bytes():
            files[README] = model_card(card).encode()
        for name, content in files.items():
            with replacing(directory / name) as partial:
                partial.write_bytes(content)
                sync(partial)
        sync(directory)
    except OSError as error:
        raise SidelightError(
            f"Cannot write the probe to {directory}: {error.strerror}. Name another folder."
        ) from error
    return directory


def load_probe(directory: str | Path) -> Probe:
    """The probe stored in a folder.

    Raises:
        SidelightError: The folder has no artifact, the artifact is damaged or has another format,
            or the probe fails ``gives_verdicts``.
    """
    return _checked(*read_artifact(directory), Path(directory))


def _checked(card: ProbeCard, content: bytes, directory: Path) -> Probe:
    try:
        tensors = load(content)
        if _sha256(tensors) != card.weights_sha256:
            raise ValueError("its weights do not match its card")
        probe = _assemble(card, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise damaged(directory, str(error)) from error
    if not gives_verdicts(probe):
        raise damaged(
            directory,
            "it gives no verdict: its weights are not finite, or the weights or the inverse of "
            "the scale are so large that sums overflow",
        )
    return probe


@torch.inference_mode()
def gives_verdicts(probe: Probe, *, device: torch.device | str = "cpu") -> bool:
    """Whether a probe can classify synthetic texts. It cannot if its weights are huge or not
    finite.

    Their hidden states are random, with the mean and the standard deviations of the training
    states, or typical deviations where those are smaller. They pass through the same steps as real
    ones: the folded projection in float32, the mechanism and the calibration.

    Args:
        probe: The probe to check.
        device: The device of the backbone's hidden states.
    """
    # The attention kernel may treat a NaN weight as zero.
    if not all(bool(weights.isfinite().all()) for weights in probe.mechanism.parameters()):
        return False
    bank, scaling = Bank([probe], device=device), probe.standardisation
    tap, generator = bank.tap(), torch.Generator().manual_seed(0)
    # The scale of a layer of weight 0 is infinite.
    scales = torch.where(scaling.scale.isfinite(), scaling.scale, 1).clamp(min=_USUAL_SCALE)
    for layer, (mean, scale) in enumerate(zip(scaling.mean, scales, strict=True)):
        noise = torch.randn(len(_DEVIATIONS), len(_TOKEN_ROLES), len(mean), generator=generator)
        deviations = torch.tensor(_DEVIATIONS)[:, None, None] * noise
        tap(layer, (mean.cpu() + scale.cpu() * deviations).to(device))
    token_roles = [_TOKEN_ROLES] * len(_DEVIATIONS)
    try:
        for text in bank.prompt_logits(tap.projected().flatten(0, 1), token_roles)[0]:
            numbers = [*probe.verdict(text.logits).probabilities.values()]
            numbers += [] if text.tokens is None else text.tokens.flatten().tolist()
            if not np.isfinite(numbers).all():
                return False
    except VerdictError:
        return False
    return True


def _assemble(card: ProbeCard, tensors: dict[str, Tensor]) -> Probe:
    task, backbone = card.task, card.backbone
    spec = mechanism_spec(card.mechanism.name, card.mechanism.options)
    if card.spans is not None and not labels_tokens(spec.name):
        raise ValueError(f"its mechanism '{spec.name}' labels no tokens, so it cannot label spans")
    geometry = Geometry(backbone.layers, backbone.width, task.outputs)
    # Sizes are compared before memory is taken: the card may claim any.
    shape = (geometry.layers, geometry.width)
    if any(tuple(tensors[name].shape) != shape for name in ("mean", "scale")):
        raise ValueError(f"the shape of mean or scale is not [{backbone.layers}, {backbone.width}]")
    standardisation = Standardisation(tensors.pop("mean"), tensors.pop("scale"), card.is_normalised)
    weights = {key.removeprefix(_PARAMETER): value for key, value in tensors.items()}
    with torch.device("meta"):
        claimed = build_mechanism(spec, geometry).state_dict()
    claims, stored = (
        {(name, tensor.shape) for name, tensor in x.items()} for x in (claimed, weights)
    )
    if wrong := sorted({name for name, _ in claims ^ stored}):
        raise ValueError(
            f"its weights {', '.join(wrong)} do not fit the mechanism '{spec.name}' with these "
            "sizes"
        )
    mechanism = build_mechanism(spec, geometry)
    mechanism.load_state_dict(weights)
    return Probe(card, mechanism.eval().requires_grad_(False), standardisation)


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
