"""``sidelight inspect``: what an artifact is, without loading its weights or a backbone."""

from pathlib import Path

import click

from sidelight.cli.options import examples_epilog, json_option


@click.command(epilog=examples_epilog("sidelight inspect probes/toxicity"))
@click.argument("probe", type=click.Path(path_type=Path))
@json_option
def inspect(probe: Path, as_json: bool) -> None:
    """Show what a probe decides, what it reads, its backbone, and how it did in training."""
    from sidelight.cards import summary
    from sidelight.manifest import read_manifest

    manifest = read_manifest(probe)
    if as_json:
        click.echo(manifest.to_json())
        return
    for name, value in summary(manifest).items():
        click.echo(f"{name:<12} {value}")
