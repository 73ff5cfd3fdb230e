"""Quantised weights: which model vLLM then serves, and which probes of the original may judge it.

A probe belongs to the weights that it was trained on. ``sidelight parity --quantised`` measures how
its verdicts change on a quantised copy, and writes a report. Named by ``SIDELIGHT_QUANTISED``, it
admits this probe, on this copy. A probe that was trained on the copy needs none.
"""

# pyright: reportMissingImports=false

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sidelight.backbone import read_backbone
from sidelight.engines.parity import Difference
from sidelight.errors import FingerprintMismatchError, SidelightError
from sidelight.fingerprint import Fingerprint
from sidelight.probe import Probe, common_format
from sidelight.storage import write_text

ENVIRONMENT = "SIDELIGHT_QUANTISED"
REPORT = "quantised"
"""In ``additional_config["sidelight"]``: the report's file, instead of the environment variable."""
COPY = "quantised"
"""The copy's name among the engines of a report."""
OPTIONS = ("quantization", "quantization_config", "kv_cache_dtype")
"""vLLM's options that quantise what it loads, or the keys and values."""
_CACHES_OF_FLOATS = ("auto", "float", "bfloat")
# A copy has other weights, and its configuration says how they are written.
_MAY_DIFFER = {"config", "weights"}

# vLLM shows what is logged under its own name.
_log = logging.getLogger("vllm.sidelight")


@dataclass(frozen=True)
class ParityReport:
    """What was measured of probes on a quantised copy.

    Attributes:
        model: The copy.
        probes: The version of each probe, by name.
        differences: Between all engines; those that end in ``COPY`` are to the original.
    """

    model: Fingerprint
    probes: Mapping[str, str]
    differences: Sequence[Difference]

    @staticmethod
    def read(path: Path) -> "ParityReport":
        """Reads a file that ``write`` wrote.

        Raises:
            SidelightError: It cannot be read, or is another file.
        """
        remedy = "Name the file that 'sidelight parity --quantised MODEL --out FILE' wrote."
        try:
            return _ADAPTER.validate_json(path.read_bytes(), strict=True)
        except OSError as error:
            raise SidelightError(f"Cannot read {path}: {error.strerror}. {remedy}") from error
        except ValidationError as error:
            raise SidelightError(f"{path} is no report on a quantised model. {remedy}") from error

    def write(self, path: Path) -> None:
        write_text(path, _ADAPTER.dump_json(self, indent=2).decode() + "\n")

    def to_original(self, probe: str) -> list[Difference]:
        """How far a probe's verdicts on the copy are from those of each engine on the original."""
        return [d for d in self.differences if d.probe == probe and d.between.endswith(f"- {COPY}")]


_ADAPTER = TypeAdapter(ParityReport)


def served_fingerprint(files: Fingerprint, arguments: Any) -> Fingerprint:
    """The fingerprint of what vLLM serves: another one if it quantises what it loads.

    Args:
        files: That of the model's files.
        arguments: vLLM's ``EngineArgs``.
    """
    how = quantisation(arguments)
    return files.quantised(how) if how else files


def quantisation(arguments: Any) -> str:
    """The options by which vLLM quantises what it loads; "" without any."""
    given = {name: getattr(arguments, name) for name in OPTIONS}
    if str(given["kv_cache_dtype"]).startswith(_CACHES_OF_FLOATS):
        del given["kv_cache_dtype"]
    return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)


def copies_for(
    model: str, probes: Sequence[Probe], options: Mapping[str, Any]
) -> tuple[Fingerprint, list[Probe]]:
    """The fingerprint of a quantised copy, and the probes as if they belonged to it.

    Args:
        model: Folder or hub id of the copy; or of the original, which the options quantise.
        probes: Probes of the original.
        options: Fields of vLLM's ``EngineArgs``.

    Raises:
        FingerprintMismatchError: It is no copy: more than the weights differ.
        SidelightError: It is the model that the probes were trained on.
    """
    from vllm.engine.arg_utils import EngineArgs

    backbone = read_backbone(model, prompt_format=common_format(probes))
    own = {name: value for name, value in options.items() if name in OPTIONS}
    served = served_fingerprint(backbone.fingerprint, EngineArgs(model=backbone.path, **own))
    for probe in probes:
        apart = probe.fingerprint.differences(served)
        if not set(apart) <= _MAY_DIFFER:
            probe.fingerprint.require(served, probe=probe.name)
        if not apart:
            raise SidelightError(
                f"Probe '{probe.name}' was trained on {model}, so it needs no report to serve it. "
                "Name a quantised copy, or say how vLLM is to quantise it, such as "
                "--engine-option quantization=fp8."
            )
    return served, [replace(probe, fingerprint=served) for probe in probes]


def named_report(config: Mapping[str, Any]) -> Path | None:
    """The report that the engine's configuration or the environment names, if one does.

    Args:
        config: What ``additional_config`` has under ``sidelight``.
    """
    named = str(config.get(REPORT) or os.environ.get(ENVIRONMENT, ""))
    return Path(named) if named else None


def admitted(probes: Sequence[Probe], served: Fingerprint, report: Path | None) -> list[Probe]:
    """The probes, those of the original with the fingerprint of the quantised copy.

    Args:
        probes: Probes to serve.
        served: The fingerprint of what vLLM serves.
        report: The file that ``sidelight parity --quantised`` wrote.

    Raises:
        FingerprintMismatchError: One belongs to another model, and no report admits it.
        SidelightError: The report cannot be read.
    """
    return [
        probe if not probe.fingerprint.differences(served) else _admitted(probe, served, report)
        for probe in probes
    ]


def _admitted(probe: Probe, served: Fingerprint, path: Path | None) -> Probe:
    trained = probe.fingerprint
    if not set(trained.differences(served)) <= _MAY_DIFFER:
        trained.require(served, probe=probe.name)
    report = None if path is None else ParityReport.read(path)
    if report is None:
        lacks = "none is named"
    elif report.model.differences(served):
        lacks = f"{path} is about {report.model.name} ({report.model.digest})"
    elif not probe.version or report.probes.get(probe.name) != probe.version:
        known = ", ".join(f"'{name}' {version}" for name, version in report.probes.items())
        lacks = f"{path} is about {known}, and this is version {probe.version or 'unsaved'}"
    elif not report.to_original(probe.name):
        lacks = f"{path} has no figures of it"
    else:
        for found in report.to_original(probe.name):
            _log.warning(
                "Probe '%s' judges a quantised copy. By %s (%s), %d of %d verdicts changed; a "
                "probability moved by %.2g on average, and by %.2g at most.",
                probe.name, path, found.between, found.flips, found.texts, found.mean,
                found.largest,
            )  # fmt: skip
        return replace(probe, fingerprint=served)
    raise FingerprintMismatchError(
        f"Probe '{probe.name}' was trained on {trained.name} (fingerprint {trained.digest}), but "
        f"this is {served.name} ({served.digest}), whose weights differ. If they are quantised "
        f"from the same ones, a report admits the probe, but {lacks}. Write one with 'sidelight "
        f"parity PROBE --data FILE --quantised {served.name} --out parity.json', giving vLLM the "
        f"options that you serve with (--engine-option), and set {ENVIRONMENT}=parity.json. "
        "Otherwise train the probe on this model, or serve the other."
    )
