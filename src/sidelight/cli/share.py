"""``sidelight push`` and ``pull`` share probes; ``inspect`` shows one."""

import shlex
from functools import partial
from pathlib import Path

import click

from sidelight.cli import options
from sidelight.guards import probe_folder

_force = partial(click.option, "--force", is_flag=True)


@click.command(
    epilog=options.examples(
        "sidelight push probes/toxicity me/toxicity-probe --private",
        "sidelight push probes/toxicity /mnt/shared/toxicity",
    )
)
@click.argument("probe", type=options.PATH)
@click.argument("repository")
@click.option(
    "--private", is_flag=True, help="Make the repository private, if this creates it on the hub."
)
@_force(help="Replace the probe and the card of a folder.")
def push(probe: Path, repository: str, private: bool, force: bool) -> None:
    """Share a probe, with a model card written from its manifest.

    REPOSITORY is owner/name on the hub, or a folder written as ./NAME, ../NAME, ~/NAME or /NAME.
    """
    from sidelight.probes import hub

    probe = probe_folder(probe)
    click.echo(f"Shared: {hub.push(probe, _place(repository), private=private, force=force)}")


@click.command(
    epilog=options.examples(
        "sidelight pull me/toxicity-probe probes/toxicity",
        "sidelight pull me/toxicity-probe probes/toxicity --revision v1",
    )
)
@click.argument("repository")
@click.argument("probe", type=options.PATH, callback=options.checked_folder)
@click.option("--revision", help="Branch, tag or commit. [default: main]")
@_force(help="Replace the probe and the card that PROBE holds.")
def pull(repository: str, probe: Path, revision: str | None, force: bool) -> None:
    """Get a probe that was shared, into the folder PROBE, and check it.

    REPOSITORY is owner/name on the hub, or a folder written as ./NAME, ../NAME, ~/NAME or /NAME.
    """
    from sidelight.probes import hub

    hub.pull(_place(repository), probe, revision=revision, force=force)
    click.echo(f"Saved to {probe}")
    command = shlex.join(["sidelight", "predict", str(probe), "Some text."])
    click.echo(f"Next: {command}")


def _place(repository: str) -> str | Path:
    is_folder = repository.startswith((".", "/", "~"))
    return Path(repository).expanduser() if is_folder else repository


@click.command(epilog=options.examples("sidelight inspect probes/toxicity"))
@click.argument("probe", type=options.PATH)
@options.as_json
def inspect(probe: Path, as_json: bool) -> None:
    """Show what a probe decides and reads, its backbone, and its figures from training."""
    from sidelight.probes.manifest import read_manifest, summary

    probe = probe_folder(probe)
    manifest = read_manifest(probe)
    # Before imports that take seconds: a folder without a probe is refused at once.
    from sidelight.probes.artifact import load_probe

    load_probe(probe)
    if as_json:
        click.echo(manifest.to_json())
        return
    for name, value in summary(manifest).items():
        click.echo(f"{name:<12} {value}")
