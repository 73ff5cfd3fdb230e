"""``sidelight push`` and ``pull``: probes to and from the Hugging Face hub or a shared folder."""

from pathlib import Path

import click

from sidelight.cli.options import examples_epilog


@click.command(
    epilog=examples_epilog(
        "sidelight push probes/toxicity me/toxicity-probe --private",
        "sidelight push probes/toxicity /mnt/shared/toxicity",
    )
)
@click.argument("probe", type=click.Path(path_type=Path))
@click.argument("repository")
@click.option("--private", is_flag=True, help="Of a hub repository that this creates.")
def push(probe: Path, repository: str, private: bool) -> None:
    """Share a probe, with a model card written from its manifest.

    REPOSITORY is owner/name on the hub, or a folder written as ./NAME, ../NAME, ~/NAME or /NAME.
    """
    from sidelight import hub

    click.echo(f"Shared: {hub.push(probe, _place(repository), private=private)}")


@click.command(
    epilog=examples_epilog(
        "sidelight pull me/toxicity-probe probes/toxicity",
        "sidelight pull me/toxicity-probe probes/toxicity --revision v1",
    )
)
@click.argument("repository")
@click.argument("probe", type=click.Path(path_type=Path))
@click.option("--revision", default=None, help="Branch, tag or commit. [default: main]")
def pull(repository: str, probe: Path, revision: str | None) -> None:
    """Get a probe that was shared, into the folder PROBE, and check it.

    REPOSITORY is owner/name on the hub, or a folder written as ./NAME, ../NAME, ~/NAME or /NAME.
    """
    from sidelight import hub

    hub.pull(_place(repository), probe, revision=revision)
    click.echo(f"Saved to {probe}")
    click.echo(f"Next: sidelight predict {probe} 'Some text.'")


def _place(repository: str) -> str | Path:
    is_folder = repository.startswith((".", "/", "~"))
    return Path(repository).expanduser() if is_folder else repository
