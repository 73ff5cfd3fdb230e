"""``sidelight policy check``: the settings of a policy file that let known evasions pass."""

import sys
from pathlib import Path

import click

from sidelight.cli import options
from sidelight.guards import probe_folders


@click.group()
def policy() -> None:
    """Check policy files."""


@policy.command(
    epilog=options.examples(
        "sidelight policy check policy.toml",
        "sidelight policy check policy.toml --probe probes/toxicity --probe probes/refusal",
    )
)
@click.argument("path", metavar="POLICY", type=options.PATH)
@click.option("--probe", type=options.PATH, multiple=True, help="Probe folder; may be repeated.")
@click.option(
    "--litellm", is_flag=True, help="Also list rules that block only in LiteLLM's guardrail."
)
def check(path: Path, probe: tuple[Path, ...], litellm: bool) -> None:
    """Warn about settings in a policy file that let a known evasion pass or match every text.

    The exit code is 0 without warnings, 1 with warnings, and 2 if the file is invalid or does not
    fit the probes. Name all probes that you will serve; without any, only the file is checked.
    """
    from sidelight.policy.rules import read_policy, require_policy_applies

    # Before slow imports, so that an invalid file is refused immediately.
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
