"""Which probes vLLM serves, and the model that they were checked against.

``SIDELIGHT_PROBES`` names folders, with the system's path separator between them; so does
``additional_config={"sidelight": {"probes": [...]}}``. With neither, the plugin does nothing.

What a request says of its tokens, and what comes back: both as vLLM's ``kv_transfer_params``.
"""

import hashlib
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby, repeat
from typing import Any

import torch

from sidelight.artifact import load_probe
from sidelight.backbone import Fingerprint, TransformersBackbone
from sidelight.errors import SidelightError
from sidelight.probe import Probe, common_format, require_distinct_names
from sidelight.prompts import EncodedPrompt, Part
from sidelight.vllm.panel import ColumnPanel

ENVIRONMENT = "SIDELIGHT_PROBES"
KEY = "sidelight"
CAPTURE = "capture"
"""Under ``KEY``: a ``Captured``, where hidden states are kept and no probe is served."""


@dataclass(frozen=True)
class Served:
    """What travels to the scheduler and the workers, as JSON.

    Attributes:
        folders: Of the probes.
        fingerprint: Of the served model.
    """

    folders: tuple[str, ...]
    fingerprint: Fingerprint

    def to_json(self) -> dict[str, Any]:
        """For a configuration of vLLM's."""
        return {"folders": list(self.folders), "fingerprint": asdict(self.fingerprint)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Served":
        """The inverse of ``to_json``."""
        return Served(tuple(data["folders"]), Fingerprint(**data["fingerprint"]))

    def panel(self, *, device: torch.device | str = "cpu") -> ColumnPanel:
        """The probes, loaded.

        Raises:
            SidelightError: One of them is damaged or belongs to another model.
        """
        return ColumnPanel.of(load_checked(self.folders, self.fingerprint), device=device)


@dataclass(frozen=True)
class Captured:
    """In place of ``Served`` where hidden states are kept for training.

    Attributes:
        layers: Hidden states of a token, the embedding's included.
        width: Size of a hidden state.
    """

    layers: int
    width: int

    def to_json(self) -> dict[str, Any]:
        """For a configuration of vLLM's."""
        return asdict(self)


def named_folders(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Folders that the engine's configuration or the environment names; None: nothing is named.

    Args:
        config: What stands under ``sidelight`` in ``additional_config``.
    """
    if "probes" in config:
        return tuple(map(str, config["probes"]))
    named = os.environ.get(ENVIRONMENT, "")
    return tuple(filter(None, named.split(os.pathsep))) or None


def load_checked(folders: Sequence[str], fingerprint: Fingerprint) -> list[Probe]:
    """The probes of these folders, all of them trained on the same model.

    Raises:
        SidelightError: One is damaged, two share a name, or one belongs to another model.
    """
    probes = [load_probe(folder) for folder in folders]
    for probe in probes:
        probe.fingerprint.require(fingerprint, probe=probe.name)
    require_distinct_names(probes)
    return probes


def fingerprint_of(model: str, folders: Sequence[str]) -> Fingerprint:
    """The fingerprint of the model that vLLM is about to serve.

    It is loaded once with ``transformers`` on the CPU for this, and dropped.

    Args:
        model: Folder or hub id.
        folders: Of the probes: they say how texts are rendered.

    Raises:
        SidelightError: A probe is damaged, or some read chats and others raw texts.
    """
    prompt_format = common_format(map(load_probe, folders))
    backbone = TransformersBackbone.load(
        model, name=model, device="cpu", prompt_format=prompt_format
    )
    return backbone.fingerprint


def request_params(prompt: EncodedPrompt) -> dict[str, Any]:
    """For ``SamplingParams(extra_args={"kv_transfer_params": ...})`` or a request's field.

    Args:
        prompt: The tokens that the request carries.
    """
    runs = [[int(part), len(list(same))] for part, same in groupby(prompt.parts)]
    return {KEY: {"parts": runs, "tokens": token_hash(prompt.token_ids)}}


def parts_of(params: Mapping[str, Any] | None, token_ids: Sequence[int] | None) -> bytes:
    """One ``Part`` per token of a request's prompt.

    Args:
        params: The request's ``kv_transfer_params``.
        token_ids: The tokens that the engine runs.

    Raises:
        SidelightError: The request does not say, or it speaks of other tokens.
    """
    given = (params or {}).get(KEY)
    if given is None or token_ids is None:
        raise SidelightError(
            "The request does not say what its tokens belong to. Send it through Sidelight's "
            f"server or endpoint, or give kv_transfer_params['{KEY}'] (see docs/vllm.md)."
        )
    try:
        parts = bytes(chain.from_iterable(repeat(Part(p), int(n)) for p, n in given["parts"]))
        matches = given["tokens"] == token_hash(token_ids) and len(parts) == len(token_ids)
    except (KeyError, TypeError, ValueError) as error:
        raise SidelightError(f"kv_transfer_params['{KEY}'] is malformed.") from error
    if not matches:
        raise SidelightError(
            f"kv_transfer_params['{KEY}'] describes other tokens than the engine reads. Encode the "
            "messages with the served model's tokenizer and chat template."
        )
    return parts


def token_hash(token_ids: Sequence[int]) -> str:
    """Names a list of token ids."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=8).hexdigest()
