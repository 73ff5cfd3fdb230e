"""The threads that a command may use. This is settled before torch is imported."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def limit_threads() -> None:
    """Sets OpenMP's wait policy, and its threads where there is a CPU quota; the user's word wins.

    By default OpenMP's threads spin while they wait: beside another busy process, two of them can
    be slower than one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    quota = cpu_quota(ROOT)
    if quota is not None and quota < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(quota))


def cpu_quota(root: Path) -> int | None:
    """The CPUs that Linux control groups allow this process, rounded up; None without a limit."""
    return min((math.ceil(cpus) for cpus in _limits(root)), default=None)


def _limits(root: Path) -> Iterator[float]:
    groups = root / "proc/self/cgroup"
    lines = groups.read_text().splitlines() if groups.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 has one hierarchy and no list of controllers.
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = mount / path.lstrip("/")
        for folder in (own, *own.parents):
            limit = _limit(folder, version=1 if controllers else 2)
            if limit is not None:
                yield limit
            if folder == mount:
                break


def _limit(folder: Path, *, version: int) -> float | None:
    """The CPUs that one group allows."""
    try:
        if version == 1:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text()
        else:
            quota, period = (folder / "cpu.max").read_text().split()
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
