"""``sidelight inspect``: what an artifact is, without loading its weights or a backbone."""

import json
from pathlib import Path

import click

from sidelight.cli.options import examples_epilog, json_option


@click.command(epilog=examples_epilog("sidelight inspect probes/toxicity"))
@click.argument("probe", type=click.Path(path_type=Path))
@json_option
def inspect(probe: Path, as_json: bool) -> None:
    """Show what a probe decides, what it reads, its backbone, and how it did in training."""
    from sidelight.artifact import read_manifest
    from sidelight.cards import summary

    manifest = read_manifest(probe)
    if as_json:
        click.echo(json.dumps(manifest, indent=2, ensure_ascii=False))
        return
    for name, value in summary(manifest).items():
        click.echo(f"{name:<12} {value}")
