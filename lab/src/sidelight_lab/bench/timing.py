"""Times of things measured in turn, so that the machine's drift hits all of them.

Peak memory of a piece of work, beyond what was held before it.

Probes of random weights: a benchmark needs their sizes, not their judgement.
"""

import ctypes
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from sidelight.backbone import Backbone
from sidelight.calibration import Calibration
from sidelight.mechanisms import DEFAULT_MECHANISM
from sidelight.mechanisms.base import Geometry, MechanismSpec, mechanism_spec
from sidelight.probe import Probe
from sidelight.prompts import Reads
from sidelight.standardisation import Standardisation
from sidelight.types import Task


def interleaved(
    actions: Mapping[str, Callable[[], object]], *, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each repeat of each action, taken in turn: A B, A B, ...

    Args:
        actions: What to time, by name.
        repeats: Timed rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            start = perf_counter()
            action()
            seconds[name].append(perf_counter() - start)
    return seconds


def spread(values: list[float], *, digits: int = 3) -> str:
    """Median, and smallest to largest."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


_PROCESS = Path("/proc/self")


def peak_bytes(work: Callable[[], object], *, device: torch.device) -> int | None:
    """How far memory rose while the work ran.

    On a GPU: bytes of tensors. On a CPU: resident pages of this process, as Linux counts them.
    Run the work once before, so that what is only made the first time does not count.

    Args:
        work: What to run.
        device: Where it runs.

    Returns:
        Bytes, or None where the system does not tell.
    """
    gc.collect()
    return _cuda_peak(work, device) if device.type == "cuda" else _resident_peak(work)


def _cuda_peak(work: Callable[[], object], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def _resident_peak(work: Callable[[], object]) -> int | None:
    _return_free_memory()
    try:
        # Sets the peak to what is resident now (proc(5), clear_refs).
        (_PROCESS / "clear_refs").write_text("5")
        before = _status("VmRSS")
    except OSError:
        return None
    work()
    return max(0, _status("VmHWM") - before)


def _return_free_memory() -> None:
    """Hands freed pages back to the system; otherwise the work could use them unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    """A field of the process's status, in bytes."""
    for line in (_PROCESS / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


_TASK = Task("binary", ("no", "yes"))


def untrained_probe(
    backbone: Backbone,
    name: str,
    *,
    spec: MechanismSpec | None = None,
    reads: Reads | None = None,
    seed: int = 0,
) -> Probe:
    """A binary probe that costs what a trained one costs.

    Args:
        backbone: What it fits.
        name: Of the probe.
        spec: Its mechanism; None: the default one.
        reads: What it reads; None: the prompt.
        seed: Of its weights.
    """
    who = backbone.fingerprint
    geometry = Geometry(layers=who.layers, width=who.width, outputs=_TASK.outputs)
    spec = spec or mechanism_spec(DEFAULT_MECHANISM)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mechanism = spec.build(geometry).eval().requires_grad_(False)
        for parameter in mechanism.parameters():
            # Some parameters start at zero, which would hide a wrong verdict.
            parameter.normal_(std=who.width**-0.5)
    return Probe(
        name=name,
        task=_TASK,
        reads=reads or Reads(),
        prompt_format=backbone.encoder.prompt_format,
        spec=spec,
        mechanism=mechanism,
        standardisation=Standardisation.identity(geometry),
        calibration=Calibration("none", _TASK.kind, (1.0,), (0.0,)),
        thresholds=(0.5,),
        fingerprint=who,
    )
