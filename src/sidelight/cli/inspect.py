"""``sidelight inspect`` shows a probe."""

from pathlib import Path

import click

from sidelight.cli import options
from sidelight.guards import probe_folder


@click.command(epilog=options.examples("sidelight inspect probes/toxicity"))
@click.argument("probe", type=options.PATH)
@options.as_json
def inspect(probe: Path, as_json: bool) -> None:
    """Show a probe's labels and inputs, its backbone, and its training metrics."""
    from sidelight.probes.card import read_card, summary

    probe = probe_folder(probe)
    card = read_card(probe)
    # Before slow imports, so that a folder without a probe is refused immediately.
    from sidelight.probes.artifact import load_probe

    load_probe(probe)
    if as_json:
        click.echo(card.to_json())
        return
    for name, value in summary(card).items():
        click.echo(f"{name:<12} {value}")
