"""``sidelight policy check``: the settings of a policy file that let known evasions pass."""

import sys
from pathlib import Path

import click

from sidelight.cli import options
from sidelight.guards import probe_folders


@click.group()
def policy() -> None:
    """Work on policy files."""


@policy.command(
    epilog=options.examples(
        "sidelight policy check policy.toml",
        "sidelight policy check policy.toml --probe probes/toxicity --probe probes/refusal",
    )
)
@click.argument("path", metavar="POLICY", type=options.PATH)
@click.option(
    "--probe", type=options.PATH, multiple=True, help="Folder of a probe; may be repeated."
)
@click.option(
    "--litellm", is_flag=True, help="Also name rules that block in LiteLLM's guardrail alone."
)
def check(path: Path, probe: tuple[Path, ...], litellm: bool) -> None:
    """Warn of settings in a policy file under which a known evasion passes, or every text counts.

    The exit code is 0 without warnings, 1 with some, and 2 if the file is wrong or does not fit the
    probes. Name all probes that will be served, or none: then only the file is read.
    """
    from sidelight.policy.rules import read_policy, require_policy_applies

    # Before imports that take seconds: a wrong file is refused at once.
    checked = read_policy(path)
    from sidelight.policy.weaknesses import weaknesses
    from sidelight.probes.artifact import load_probe
    from sidelight.probes.card import require_distinct_names
    from sidelight.probes.probe import common_format

    probes = [load_probe(folder) for folder in probe_folders(probe)]
    if probes:
        require_distinct_names([probe.name for probe in probes])
        common_format(probes)
        require_policy_applies(checked, probes)
    found = weaknesses(checked, probes, behind_litellm=litellm)
    for weakness in found:
        click.echo(f"Warning: {weakness}")
    if found:
        sys.exit(1)
    click.echo("No warnings. 'sidelight redteam' measures what gets through a probe.")
