"""Peak memory of a piece of work, beyond what was held before it."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

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
