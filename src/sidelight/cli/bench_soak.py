"""``sidelight bench soak``: connections and requests of every kind against one server."""

import sys
import tempfile
from pathlib import Path

import click

from sidelight.cli.options import examples_epilog, json_option


@click.command(
    "soak",
    epilog=examples_epilog(
        "sidelight bench soak --out soak --plots soak",
        "sidelight bench soak --connections 200 --burst 50 --requests 240",
    ),
)
@click.option("--model", default="smollm2", show_default=True, help="As `sidelight serve` takes.")
@click.option("--connections", type=click.IntRange(min=1), default=10_000, show_default=True)
@click.option("--burst", type=click.IntRange(1, 1000), default=500, show_default=True,
              help="Connections at once.")  # fmt: skip
@click.option("--requests", type=click.IntRange(min=60), default=5_000, show_default=True)
@click.option("--clients", type=click.IntRange(1, 64), default=32, show_default=True,
              help="Requests at once.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=3), default=4, show_default=True,
              help="Of an answer.")  # fmt: skip
@click.option("--growth", type=click.FloatRange(min=0), default=1.0, show_default=True,
              help="Allowed, in MB per 1,000 requests.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=None,
              help="Folder for soak.json and soak.md.")  # fmt: skip
@click.option("--plots", type=click.Path(path_type=Path), default=None, help="Folder for soak.png.")
@json_option
def bench_soak(
    model: str,
    connections: int,
    burst: int,
    requests: int,
    clients: int,
    max_tokens: int,
    growth: float,
    out: Path | None,
    plots: Path | None,
    as_json: bool,
) -> None:
    """Connections in bursts, most of them broken off, then requests of every kind.

    Requests are answered, streamed, blocked, cut, refused and left. Memory and open files of the
    server are looked at meanwhile (Linux). Exit code 1 if a visit did not end as it had to, if
    memory grew, or if files or requests were left over at the end.
    """
    from sidelight.bench.soak import Settings, run_soak

    settings = Settings(model, connections, burst, requests, clients, max_tokens, growth)
    with tempfile.TemporaryDirectory() as scratch:
        record = run_soak(settings, Path(scratch))
    if out is not None:
        record.save(out)
    if plots is not None:
        from sidelight.bench.soak.picture import plot_soak

        plot_soak(record, plots)
    click.echo(record.to_json() if as_json else record.to_markdown(), nl=False)
    if record.faults:
        sys.exit(1)
