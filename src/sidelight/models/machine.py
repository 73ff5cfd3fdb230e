"""Properties of the machine: devices, arithmetic and free memory."""

import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sidelight.errors import SidelightError, did_you_mean


def find_device(name: str) -> torch.device:
    """Return the device with this name.

    Args:
        name: Name of the device; ``auto`` means the first GPU, or the CPU without one.

    Raises:
        SidelightError: The device does not exist, cannot be read from, or lacks an operation that
            probes need.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    try:
        device = torch.device(name)
        # Apple's GPUs lack this operation, which probes need.
        one = torch.ones(1, dtype=torch.long, device=device)
        torch.segment_reduce(one.float(), "max", lengths=one).item()
    except NotImplementedError as error:
        raise SidelightError(
            f"Probes cannot run on '{name}': PyTorch lacks segment_reduce on this device. Use "
            "--device cpu."
        ) from error
    except (RuntimeError, AssertionError) as error:
        why = f" ({str(error).splitlines()[0]})" if name.startswith("cuda") else ""
        raise SidelightError(
            f"There is no device '{name}' on this "
            f"machine{why}.{did_you_mean(name, ['auto', 'cpu', *gpus])}"
        ) from error
    return torch.empty(0, device=device).device


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether this is an x86 CPU without bfloat16 arithmetic; others have not been measured."""
    # PyTorch has no public API for either.
    cpu: Any = torch.cpu
    has_bfloat16 = cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return device.type == "cpu" and is_x86 and not has_bfloat16


def keeps_shapes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matmuls keep memory for each shape that they have seen.

    For products in bfloat16 on a CPU, oneDNN keeps 0.6 MB for each number of rows, for up to 1,024
    of them.
    """
    return device.type == "cpu" and dtype == torch.bfloat16


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory available to this process in the system and its cgroup; None if unknown."""
    free: list[int] = []
    with suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        free.append(1024 * int(available.split()[1]))
    with suppress(OSError, ValueError):
        limits = root / "sys/fs/cgroup"
        used = int((limits / "memory.current").read_text())
        # File pages of the cgroup can be reclaimed.
        stat = dict(line.split() for line in (limits / "memory.stat").read_text().splitlines())
        used -= int(stat.get("file", 0))
        free.append(int((limits / "memory.max").read_text()) - used)
    return min(free, default=None)
