"""``sidelight anatomy``: which layers and tokens a probe uses, and which it can do without."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from sidelight.cli import options
from sidelight_lab.cli.options import cache_option


@click.command(
    epilog=options.examples(
        "sidelight anatomy probes/toxicity --data held_out.jsonl --label toxicity --out anatomy",
        "sidelight anatomy probes/all --data held_out.jsonl --every-mechanism --out anatomy",
    )
)
@click.argument("probe", type=options.PATH)
@options.data
@options.out
@options.columns
@options.missing_label
@options.limit
@click.option(
    "--every-mechanism",
    is_flag=True,
    help="Examine the first run of every mechanism trained with the probe, not only the best run.",
)
@click.option(
    "--heat-maps",
    type=click.IntRange(min=0),
    default=2,
    help="Number of texts of each class to draw token by layer.",
)
@options.max_tokens
@cache_option("the user's cache; removed afterwards")
@options.backbone
def anatomy(probe: Path, runtime: options.Runtime, out: Path, **given: Any) -> None:
    """Show which layers and tokens a probe uses, per class, and what it loses without them.

    Writes pictures, token by layer heat maps, anatomy.json and report.md. Give texts that the probe
    was not trained on; nothing is trained.
    """
    from sidelight.data.loading import load_examples
    from sidelight.training.dataset import make_split
    from sidelight.training.runs import read_runs
    from sidelight.training.settings import FitOptions
    from sidelight_lab.anatomy.examine import examine
    from sidelight_lab.anatomy.report import write_anatomies

    runs, index = read_runs(probe)
    chosen = runs[index]
    columns = {name: given[name] for name in ("text", "label", "response", "split")}
    examples = load_examples(
        given["data"], task=chosen.task, on_missing_label=given["missing_label"], **columns
    )
    runtime = replace(runtime, model=runtime.model or chosen.fingerprint.name)
    backbone = runtime.load_backbone(prompt_format=chosen.prompt_format)
    chosen.fingerprint.require(backbone.fingerprint, probe=chosen.name)
    split = make_split(
        backbone,
        examples.select(examples.draw(given["limit"] or len(examples), seed=0)),
        FitOptions(
            reads=chosen.reads,
            max_tokens=given["max_tokens"],
            cache_root=given["cache"],
            keep_cache=given["cache"] is not None,
        ),
    )
    probes = [chosen]
    if given["every_mechanism"]:
        # The first run of every other mechanism.
        firsts = {probe.spec.name: probe for probe in reversed(runs)}
        probes = list((firsts | {chosen.spec.name: chosen}).values())
    examined = [
        examine(one, split, device=backbone.device, heat_maps=given["heat_maps"]) for one in probes
    ]
    if given["cache"] is None:
        split.states.remove()
    write_anatomies(examined, out, decode=lambda token: backbone.tokenizer.decode([token]))
    click.echo((out / "report.md").read_text("utf-8"))
