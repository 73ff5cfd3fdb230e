"""``sidelight bench load``: many chat clients at once against blocking policies.

``sidelight bench serve``: what probes cost inside vLLM.

``sidelight bench soak``: connections and requests of every kind against one server.

``sidelight bench streaming``: how soon a probe catches a response while it is written.
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.engines import engine_option_option
from sidelight.cli.options import (
    backbone_options,
    checked_folder,
    dtype_option,
    examples_epilog,
    json_file_option,
    json_option,
    model_option,
)
from sidelight.errors import SidelightError
from sidelight.storage import write_text

if TYPE_CHECKING:
    from sidelight.data.examples import Examples
    from sidelight_lab.bench.serving import Cost
    from sidelight_lab.bench.streaming import Record


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
    from sidelight_lab.bench.load import Settings, run_load

    settings = Settings(model, clients, minutes * 60, round_s, plain_round_s, max_tokens)
    with tempfile.TemporaryDirectory() as scratch:
        record = run_load(settings, Path(scratch))
    if out is not None:
        record.save(out)
    click.echo(record.to_json() if as_json else record.to_markdown(), nl=False)
    if not record.is_sound:
        raise SidelightError("Some answers were at fault; the table says which.")


@click.command(
    "serve",
    epilog=examples_epilog(
        "VLLM_CPU_KVCACHE_SPACE=1 sidelight bench serve --engine vllm --rounds 15",
        "sidelight bench serve --engine vllm --engine-option enforce_eager=true",
    ),
)
@click.option("--engine", type=click.Choice(["vllm"]), required=True, expose_value=False,
              help="The one that can exchange probes in a running worker.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=2), default=15, show_default=True)
@click.option("--tokens", type=click.IntRange(min=8), default=256, show_default=True,
              help="Tokens of a prompt, about.")  # fmt: skip
@click.option("--requests", type=click.IntRange(min=2), default=8, show_default=True,
              help="Requests that run together.")  # fmt: skip
@click.option("--written", type=click.IntRange(min=2), default=24, show_default=True,
              help="Tokens that each writes.")  # fmt: skip
@json_file_option
@model_option
@dtype_option
@engine_option_option
def bench_serve(rounds: int, out: Path | None, **given: Any) -> None:
    """The same work with and without probes in one running vLLM, in paired rounds.

    Random weights; 0, 1, 10 and 100 readout probes and one attention probe. What they add is a
    share of the value without probes, with a 95 % interval over rounds; memory stands beside it.
    """
    from sidelight_lab.bench.serving import Work

    work = Work(tokens=given["tokens"], requests=given["requests"], written=given["written"])
    costs, memory = asyncio.run(_measured(given, work, rounds))
    record = {"rounds": rounds, "memory": memory, "costs": [cost.to_dict() for cost in costs]}
    if out is not None:
        write_text(out, json.dumps(record, indent=2) + "\n")
    for name, share in memory.items():
        for cost in (cost for cost in costs if cost.probes == name):
            click.echo(
                f"{name:<14} {cost.measure:<20} {cost.without:9.2f} {cost.unit:<10} without  "
                f"{cost.added:+7.1%}  ({cost.low:+.1%} to {cost.high:+.1%})"
            )
        click.echo(f"{name:<14} {'memory':<20} {share:.2%} of the KV cache")


async def _measured(
    given: dict[str, Any], work: Any, rounds: int
) -> "tuple[list[Cost], dict[str, float]]":
    from sidelight.backbone import load_backbone
    from sidelight.vllm.engine import load_vllm_engine
    from sidelight_lab.bench.serving import measure, probe_sets

    model = given["model"] or "smollm2"
    sets = probe_sets(load_backbone(model, device="cpu"))
    # A prefix cache would answer the later rounds of the same prompts.
    options = {"enable_prefix_caching": False, **given["engine_options"]}
    engine = await asyncio.to_thread(
        load_vllm_engine, model, [], dtype=given["dtype"], options=options
    )
    await engine.start()
    try:
        costs = await measure(engine, sets, work=work, rounds=rounds)
        memory: dict[str, float] = {}
        for name, probes in sets.items():
            await engine.replace_probes(probes)
            memory[name] = await engine.memory_share()
    finally:
        await engine.close()
    return costs, memory


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
    from sidelight_lab.bench.soak import Settings, run_soak

    settings = Settings(model, connections, burst, requests, clients, max_tokens, growth)
    with tempfile.TemporaryDirectory() as scratch:
        record = run_soak(settings, Path(scratch))
    if out is not None:
        record.save(out)
    if plots is not None:
        from sidelight_lab.bench.soak import plot_soak

        plot_soak(record, plots)
    click.echo(record.to_json() if as_json else record.to_markdown(), nl=False)
    if record.faults:
        sys.exit(1)


_XSTEST = "xstest_completions/all.jsonl.gz"


@click.command(
    "streaming",
    epilog=examples_epilog(
        "sidelight bench streaming --out streaming --plots streaming",
        "sidelight bench streaming --data answers.jsonl --label kind --positive leak --name leak",
    ),
)
@click.option("--data", default=None,
              help=f"Responses with labels. [default: {_XSTEST} in $SIDELIGHT_DATA]")  # fmt: skip
@click.option("--text", default="prompt", show_default=True, help="Column of the prompt.")
@click.option("--response", default="response", show_default=True, help="Column of the response.")
@click.option("--label", default="final_label", show_default=True, help="Column of the label.")
@click.option("--positive", default="2_full_refusal,3_partial_refusal", show_default=True,
              help="Labels to be caught, with commas.")  # fmt: skip
@click.option("--name", default="refusal", show_default=True, help="Of what is caught.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True,
              help="Trainings of the probe.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=8), default=128, show_default=True,
              help="Of a training text with its prompt; tested ones are whole.")  # fmt: skip
@click.option(
    "--rows",
    type=click.IntRange(min=20),
    default=None,
    help="Use N rows, drawn at random, class by class.",
)
@click.option("--cache", type=click.Path(path_type=Path), default=None,
              help="Folder for activations. [default: the user's cache]")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=None, callback=checked_folder,
              help="Folder for streaming.json, streaming.md and one probe.")  # fmt: skip
@click.option("--plots", type=click.Path(path_type=Path), default=None, help="Folder for plots.")
@backbone_options
@json_option
def bench_streaming(as_json: bool, out: Path | None, plots: Path | None, **given: Any) -> None:
    """How soon and how surely a probe catches a response while it is written.

    Prompts are parted in three: probes are trained on the responses to the first, rules are chosen
    on the second, and the figures are those of the third. Beside the probe stand its verdict on
    the whole response, TF-IDF on the text so far, and a list of phrases.
    """
    from sidelight.artifact import save_probe
    from sidelight.backbone import load_backbone
    from sidelight_lab.bench.streaming import Settings, compare_streaming
    from sidelight_lab.bench.streaming_responses import with_positives

    backbone = load_backbone(
        given["model"] or "smollm2", dtype=given["dtype"], device=given["device"]
    )
    loaded = _load(given)
    positives = [label.strip() for label in given["positive"].split(",")]
    made = compare_streaming(
        backbone,
        with_positives(loaded, positives, name=given["name"]),
        label=_label_column(given["label"]),
        settings=Settings(
            given["name"], given["seeds"], given["max_tokens"], cache_root=given["cache"]
        ),
    )
    if out is not None:
        made.record.save(out)
        save_probe(made.probe, out / "probe")
    _show(made.record, plots, as_json=as_json)


def _load(given: dict[str, Any]) -> "Examples":
    from sidelight.data.loading import load_examples
    from sidelight_lab.datasets.loading import default_root

    data = given["data"] or default_root() / _XSTEST
    loaded = load_examples(
        data, text=given["text"], label=given["label"], response=given["response"]
    )
    if given["rows"]:
        loaded = loaded.select(loaded.draw(given["rows"], seed=0))
    return loaded


def _label_column(column: str) -> Any:
    def labels(examples: "Examples") -> Sequence[str]:
        return [str(cell) for cell in examples.column(column)]

    return labels


def _show(record: "Record", plots: Path | None, *, as_json: bool) -> None:
    if plots is not None:
        from sidelight_lab.bench.streaming import plot_streaming

        plot_streaming(record, plots)
    click.echo(record.to_json() if as_json else record.to_markdown(), nl=False)
