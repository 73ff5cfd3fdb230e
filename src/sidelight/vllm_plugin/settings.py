"""Which probes vLLM serves, and the model that they were checked against.

``SIDELIGHT_PROBES`` names folders, with the system's path separator between them; so does
``additional_config={"sidelight": {"probes": [...]}}``. With neither, the plugin does nothing.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sidelight.artifact import load_probe
from sidelight.backbones import Fingerprint, TransformersBackbone
from sidelight.probe import Probe, common_format, require_distinct_names
from sidelight.vllm_plugin.panel import ColumnPanel

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
