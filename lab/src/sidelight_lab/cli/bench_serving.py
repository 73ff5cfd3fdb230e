"""``sidelight bench load``, ``serve`` and ``soak``: servers at work."""

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from sidelight.cli import options
from sidelight.errors import SidelightError
from sidelight.storage import write_json
from sidelight_lab.cli.options import AT_LEAST_TWO, POSITIVE, publish, record_options

_served_model_option = click.option(
    "--model", default="smollm2", help="As `sidelight serve` takes it."
)


@click.command(
    "load",
    epilog=options.examples(
        "sidelight bench load --out load",
        "sidelight bench load --clients 8 --minutes 0.5 --round 5",
    ),
)
@_served_model_option
@click.option("--clients", type=options.AT_LEAST_ONE, default=64, help="Clients at once.")
@click.option("--minutes", type=POSITIVE, default=10.0, help="Minutes with probes, in total.")
@click.option(
    "--round", "round_s", type=POSITIVE, default=60.0, help="Seconds with probes in a round."
)
@click.option(
    "--plain-round", "plain_round_s", type=POSITIVE, default=20.0, help="Seconds without them."
)
@click.option("--max-tokens", type=AT_LEAST_TWO, default=16, help="Tokens of an answer.")
@record_options("load.json and load.md", has_plots=False)
def bench_load(minutes: float, out: Path | None, as_json: bool, **given: Any) -> None:
    """Let many chat clients ask at once, with blocking policies on prompt and response.

    The right verdicts on each prompt are known beforehand, so a verdict that is lost, comes twice
    or belongs to another request is found: the command then ends with an error. A second server
    without probes is asked in turn, to compare times.
    """
    from sidelight_lab.bench.load import run_load

    with tempfile.TemporaryDirectory() as scratch:
        record = run_load(Path(scratch), seconds=60 * minutes, **given)
    publish(record, out, as_json=as_json)
    if not record.results["is_sound"]:
        raise SidelightError("Some answers were faulty: see the table of faults.")


@click.command(
    "soak",
    epilog=options.examples(
        "sidelight bench soak --out soak --plots soak",
        "sidelight bench soak --connections 200 --burst 50 --requests 240",
    ),
)
@_served_model_option
@click.option(
    "--connections",
    type=options.AT_LEAST_ONE,
    default=10_000,
    help="Connections, opened in bursts.",
)
@click.option("--burst", type=click.IntRange(1, 1000), default=500, help="Connections of a burst.")
@click.option(
    "--requests", type=click.IntRange(min=60), default=5_000, help="Sent after the bursts."
)
@click.option("--clients", type=click.IntRange(1, 64), default=32, help="Requests at once.")
@click.option("--max-tokens", type=click.IntRange(min=3), default=4, help="Tokens of an answer.")
@click.option(
    "--growth",
    "allowed_growth",
    type=click.FloatRange(min=0),
    default=1.0,
    help="How much memory may grow, in MB per 1,000 requests.",
)
@record_options("soak.json and soak.md")
def bench_soak(out: Path | None, plots: Path | None, as_json: bool, **given: Any) -> None:
    """Open connections in bursts, most of them broken off, then send requests of every kind.

    Requests are answered, streamed, blocked, cut, refused and given up. Memory and open files of
    the server are watched meanwhile. The exit code is 1 if a visit did not end as it had to, if
    memory grew, or if files or requests were left over at the end.
    """
    from sidelight_lab.bench.soak import run_soak

    with tempfile.TemporaryDirectory() as scratch:
        record = run_soak(Path(scratch), **given)
    publish(record, out, as_json=as_json, plots=plots)
    if record.results["faults"]:
        sys.exit(1)


@click.command(
    "serve",
    epilog=options.examples(
        "VLLM_CPU_KVCACHE_SPACE=1 sidelight bench serve --engine vllm --rounds 15",
        "sidelight bench serve --engine vllm --engine-option enforce_eager=true",
    ),
)
@click.option(
    "--engine",
    type=click.Choice(["vllm"]),
    required=True,
    expose_value=False,
    help="The engine that can exchange probes in a running worker.",
)
@click.option("--rounds", type=AT_LEAST_TWO, default=15, help="Paired rounds.")
@click.option(
    "--tokens", type=click.IntRange(min=8), default=256, help="Tokens of a prompt, roughly."
)
@click.option("--requests", type=AT_LEAST_TWO, default=8, help="Requests that run together.")
@click.option("--written", type=AT_LEAST_TWO, default=24, help="Tokens that each request writes.")
@options.json_file
@options.model
@options.dtype
@options.engine_option()
def bench_serve(
    rounds: int, out: Path | None, model: str | None, engine_option: dict[str, Any], **given: Any
) -> None:
    """Do the same work with and without probes in one running vLLM, in paired rounds.

    The probes have random weights: 0, 1, 10 and 100 readout probes, and one attention probe. What
    they add is a share of the value without probes, with a 95 % interval over rounds. Their share
    of the KV cache's memory is printed too.
    """
    from sidelight_lab.bench.serving import measure_costs

    costs, memory = asyncio.run(
        measure_costs(model or "smollm2", options=engine_option, rounds=rounds, **given)
    )
    if out is not None:
        write_json(out, {"rounds": rounds, "memory": memory, "costs": costs})
    for name, share in memory.items():
        for cost in (cost for cost in costs if cost["probes"] == name):
            click.echo(
                "{probes:<14} {measure:<20} {without:9.2f} {unit:<10} without  {added:+7.1%}  "
                "({low:+.1%} to {high:+.1%})".format(**cost)
            )
        click.echo(f"{name:<14} {'memory':<20} {share:.2%} of the KV cache")
