"""``sidelight bench serve``: what probes cost inside vLLM."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.engines import engine_option_option
from sidelight.cli.options import dtype_option, examples_epilog, model_option
from sidelight.cli.outputs import json_file_option
from sidelight.storage import write_text

if TYPE_CHECKING:
    from sidelight.bench.serving import Cost


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
    from sidelight.bench.serving import Work

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
    from sidelight.backbones import load_backbone
    from sidelight.bench.serving import measure, probe_sets
    from sidelight.engines.vllm import load_vllm_engine

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
