"""Settings of vLLM's processes: the probes to serve, and the policy.

``SIDELIGHT_PROBES`` names folders of probes, separated by the system's path separator, ready guards
(``guard:injection``) or probes on the hub (``hf:OWNER/NAME@REVISION``). So does
``additional_config={"sidelight": {"probes": [...]}}``. Without either, the plugin does nothing.
``SIDELIGHT_PROJECTIONS`` keeps room for larger probes.
``SIDELIGHT_QUANTISED`` accepts the probes of a model on a quantised copy.
``SIDELIGHT_POLICY`` and ``SIDELIGHT_AUDIT_LOG`` name the files of a server of vLLM's, and
``SIDELIGHT_TRACE_EVENTS=1`` adds events to its spans.
"""

# pyright: reportMissingImports=false

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from transformers import AutoTokenizer

from sidelight.engines.transformers.backbone import read_model
from sidelight.errors import SidelightError, did_you_mean
from sidelight.guards import named_sources, probe_folders
from sidelight.models.encode import PromptEncoder
from sidelight.models.fingerprint import Fingerprint
from sidelight.probes.artifact import load_probe
from sidelight.probes.card import require_distinct_names
from sidelight.probes.probe import Probe, common_format
from sidelight_vllm import ENVIRONMENT, POLICY

if TYPE_CHECKING:
    from sidelight.server.config import ServerConfig

PROJECTIONS = "SIDELIGHT_PROJECTIONS"
# Server options that vLLM's own server takes from the environment, in addition to the secrets.
_SERVER = {
    "policy": POLICY,
    "audit_log": "SIDELIGHT_AUDIT_LOG",
    "trace_events": "SIDELIGHT_TRACE_EVENTS",
}
ANNOTATED = "annotated"
"""Under ``KEY``: whether requests describe their tokens."""
STATES = "keeps_states"
"""Under ``KEY``: whether hidden states are written to files, instead of verdicts."""
CONNECTOR = "ProbeConnector"
SHARED_CONNECTOR = "SharedConnector"

# vLLM only shows log records under its own name.
log = logging.getLogger("vllm.sidelight")


@dataclass(frozen=True)
class ProbeSet:
    """Probes that all workers have, and the revision of their verdicts."""

    probes: tuple[Probe, ...]
    revision: str


@dataclass(frozen=True)
class Served:
    """The probes to serve, in the form that is sent to the scheduler and the workers.

    Attributes:
        folders: Folders of the probes.
        fingerprint: Fingerprint of the served model.
        is_annotated: Whether requests describe the roles of their tokens, as those of our own
            engines do. Otherwise clients may have written them, and roles are recognised from the
            tokens.
        projections: Number of projections per layer to keep room for; 0 means as many as these
            probes need.
        accepted: Digest of a model and its quantised copy on which its probes are served; "" for
            none.
        keeps_states: Whether hidden states are written to the files that requests name.
    """

    folders: tuple[str, ...]
    fingerprint: Fingerprint
    is_annotated: bool = False
    projections: int = 0
    accepted: str = ""
    keeps_states: bool = False

    @staticmethod
    def of(vllm_config: Any) -> "Served | None":
        """The served probes in vLLM's configuration; None if the plugin is not part of it."""
        transfer = vllm_config.kv_transfer_config
        if transfer is None or transfer.kv_connector not in (CONNECTOR, SHARED_CONNECTOR):
            return None
        ours = transfer.kv_connector_extra_config
        if transfer.kv_connector == SHARED_CONNECTOR:
            ours = ours["connectors"][0]["kv_connector_extra_config"]
        return _SERVED.validate_python(ours)

    def to_json(self) -> dict[str, Any]:
        """JSON values for vLLM's configuration; the inverse of ``of``."""
        return _SERVED.dump_python(self, mode="json")

    def load(self) -> ProbeSet:
        """Load the probes.

        Raises:
            SidelightError: A probe is damaged, two share a name, or one belongs to another model.
        """
        probes = [load_probe(folder) for folder in self.folders]
        for probe in probes:
            probe.card.backbone.require(self.fingerprint, probe=probe.name, accepted=self.accepted)
        require_distinct_names([probe.name for probe in probes])
        return ProbeSet(tuple(probes), revision_of(probe.version for probe in probes))


_SERVED = TypeAdapter(Served)


def revision_of(versions: Iterable[str]) -> str:
    """The id of a set of probes in reports, equal for the same artifacts in the same order."""
    return hashlib.blake2b(" ".join(versions).encode(), digest_size=8).hexdigest()


def named_folders(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The probes' folders; None if neither ``additional_config[KEY]`` nor the environment names
    any.
    """
    if "probes" in config:
        return tuple(map(str, config["probes"]))
    return tuple(named_sources(os.environ.get(ENVIRONMENT, ""))) or None


def reserved_projections() -> int:
    """Number of projections per layer to keep room for; 0 means as many as the first probes need.

    Raises:
        SidelightError: The environment variable is not a number.
    """
    value = os.environ.get(PROJECTIONS) or "0"
    if not value.isdecimal():
        raise SidelightError(
            f"{PROJECTIONS} is '{value}', but it must be a number of projections per layer, such "
            "as 64. Unset it to keep room only for the first probes."
        )
    return int(value)


def found_folders(model: str, sources: Sequence[str]) -> tuple[str, ...]:
    """The folders of probes, and of ready guards trained for a model."""
    folders = probe_folders(sources, model, lambda: read_model(model).fingerprint.digest)
    return tuple(map(str, folders))


def fingerprint_of(model: str, folders: Sequence[str]) -> Fingerprint:
    """The fingerprint of a model from its files, without loading it.

    Raises:
        SidelightError: A probe is damaged, some read chats and others raw texts, or the model's
            weights are not in safetensors files.
    """
    prompt_format = common_format(map(load_probe, folders))
    return read_model(model, prompt_format=prompt_format).fingerprint


# Configuration of ``sidelight serve`` in this process.
_served_config: "ServerConfig | None" = None


def serve_with(config: "ServerConfig") -> None:
    """Make vLLM's server in this process use this configuration instead of the environment."""
    global _served_config
    _served_config = config


def server_config(**options: Any) -> "ServerConfig":
    """The configuration of vLLM's server, by default from environment variables.

    Args:
        options: Fields that override the environment.

    Raises:
        SidelightError: A value is not valid.
    """
    if _served_config is not None:
        return _served_config
    # Only serving processes need it.
    from sidelight.server.config import read_config

    named = {name: os.environ.get(variable) for name, variable in _SERVER.items()}
    return read_config(**{name: value for name, value in named.items() if value}, **options)


def prompt_encoder(vllm_config: Any, probes: Sequence[Probe]) -> PromptEncoder:
    """The encoder for recognising conversations that were encoded elsewhere."""
    model = vllm_config.model_config
    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer, trust_remote_code=False)
    prompt_format = common_format(probes)
    return PromptEncoder(tokenizer, prompt_format=prompt_format, max_tokens=model.max_model_len)


# vLLM's options that Sidelight sets itself, with remedies for any command.
SET_HERE = {
    "model": "Give --model instead.",
    "dtype": "Give --dtype instead.",
    "additional_config": "Leave it out; it carries the plugin's settings.",
    "disable_log_stats": "Leave it out; the server reports its metrics at /metrics.",
}


def require_options(options: Mapping[str, Any], args_type: Any) -> None:
    """Check that these are valid vLLM options that Sidelight does not set.

    Raises:
        SidelightError: An option is unknown, or is set by Sidelight.
    """
    known = args_type.__dataclass_fields__
    for name in options:
        if name in SET_HERE:
            raise SidelightError(f"vLLM's option '{name}' is set by Sidelight. {SET_HERE[name]}")
        if name not in known:
            raise SidelightError(f"vLLM has no option '{name}'.{did_you_mean(name, known)}")


def require_vllm() -> None:
    """Check that vLLM can be imported.

    Raises:
        SidelightError: vLLM is not installed.
    """
    # Standard output is reserved for the command's output.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        import vllm.engine.arg_utils  # noqa: F401 # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise SidelightError(
            "vLLM is not installed in this environment. Install it as described in docs/vllm.md, "
            "or use --engine transformers."
        ) from error
