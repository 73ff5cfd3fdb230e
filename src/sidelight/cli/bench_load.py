"""``sidelight bench load``: many chat clients at once against blocking policies."""

import tempfile
from pathlib import Path

import click

from sidelight.cli.options import examples_epilog, json_option
from sidelight.cli.outputs import checked_folder
from sidelight.errors import SidelightError


@click.command(
    "load",
    epilog=examples_epilog(
        "sidelight bench load --out load",
        "sidelight bench load --clients 8 --minutes 0.5 --round 5",
    ),
)
@click.option("--model", default="smollm2", show_default=True, help="As `sidelight serve` takes.")
@click.option("--clients", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=10.0,
              show_default=True, help="With probes, in all.")  # fmt: skip
@click.option("--round", "round_s", type=click.FloatRange(min=0, min_open=True), default=60.0,
              show_default=True, help="Seconds with probes, then without.")  # fmt: skip
@click.option("--plain-round", "plain_round_s", type=click.FloatRange(min=0, min_open=True),
              default=20.0, show_default=True, help="Seconds without.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=2), default=16, show_default=True,
              help="Of an answer.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=None, callback=checked_folder,
              help="Folder for load.json and load.md.")  # fmt: skip
@json_option
def bench_load(
    model: str,
    clients: int,
    minutes: float,
    round_s: float,
    plain_round_s: float,
    max_tokens: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Many chat clients at once, with blocking policies on the prompt and on the response.

    Each prompt holds what decides its verdicts, so that a verdict that is lost, comes twice or
    belongs to another request is found: the command then ends with an error. A second server
    without probes is asked in turn, for the times.
    """
    from sidelight.bench.load import Settings, run_load

    settings = Settings(model, clients, minutes * 60, round_s, plain_round_s, max_tokens)
    with tempfile.TemporaryDirectory() as scratch:
        record = run_load(settings, Path(scratch))
    if out is not None:
        record.save(out)
    click.echo(record.to_json() if as_json else record.to_markdown(), nl=False)
    if not record.is_sound:
        raise SidelightError("Some answers were at fault; the table says which.")
