"""``sidelight eval``, ``predict`` and ``parity``: what trained probes say about texts."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli import options
from sidelight.errors import SidelightError
from sidelight.storage import replacing, write_json

if TYPE_CHECKING:
    from sidelight.data.examples import Example


@click.command(
    "eval",
    epilog=options.examples(
        "sidelight eval probes/toxicity --data test.jsonl.gz --label toxicity",
        "sidelight eval probes/toxicity --data test.jsonl.gz --label toxicity "
        "--subset human_annotation --plots plots",
    ),
)
@click.argument("probe", type=options.PATH)
@options.data
@options.columns
@options.missing_label
@click.option(
    "--subset", metavar="COLUMN", help="Also report on the rows where this column is true."
)
@click.option(
    "--plots",
    type=options.PATH,
    callback=options.checked_folder,
    help="Folder for precision-recall, reliability and confusion plots.",
)
@options.json_file
@options.backbone
@options.as_json
def evaluate(
    probe: Path,
    runtime: options.Runtime,
    plots: Path | None,
    out: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure a probe, and every run trained with it, on labelled data.

    One forward pass serves all of them. Each metric has a 95 % bootstrap interval; the table gives
    the mean and the standard deviation over seeds.
    """
    from sidelight.training.runs import assess, comparison_table, console, describe, plot

    if plots is not None:
        # If matplotlib is missing, say so before the backbone runs.
        import_module("sidelight.plots")
    assessments = assess(
        probe,
        on_missing_label=given.pop("missing_label"),
        model=runtime.model,
        dtype=runtime.dtype,
        device=runtime.device,
        **given,
    )
    for warning in assessments[0].warnings:
        click.echo(f"Warning: {warning}", err=True)
    described = describe(assessments)
    if out is not None:
        write_json(out, described)
    if plots is not None:
        plot(assessments, plots)
    if as_json:
        click.echo(json.dumps(described, indent=2))
        return
    terminal = console()
    for one in assessments:
        if sum(map(len, one.runs.values())) > 1:
            terminal.print(comparison_table(f"{one.title}: every run", one.runs))
        terminal.print(f"\n{one.title}: '{one.chosen.name}', {one.chosen.spec.name}")
        terminal.print(one.report.table())


@click.command(
    epilog=options.examples(
        "sidelight predict probes/toxicity 'How do I bake bread?'",
        "sidelight predict probes/toxicity --data texts.jsonl --out verdicts.jsonl",
        "sidelight predict probes/toxicity --data texts.jsonl --engine vllm --out verdicts.jsonl",
    )
)
@click.argument("probe", type=options.PATH)
@click.argument("texts", nargs=-1)
@options.optional_data
@options.text
@options.response
@options.split
@click.option(
    "--out",
    type=options.PATH,
    callback=options.checked_file,
    help="File for the verdicts. [default: standard output]",
)
@options.engine
@options.backbone
def predict(
    probe: Path,
    texts: tuple[str, ...],
    data: str | None,
    text: str,
    response: str | None,
    split: str | None,
    out: Path | None,
    runtime: options.Runtime,
) -> None:
    """Print one verdict per text, as JSON lines, in the order of the texts."""
    if bool(texts) == (data is not None):
        raise SidelightError("Give texts to judge, or a file of texts with --data, but not both.")
    items: Sequence[str | Example] = (
        list(texts) if data is None else _examples(data, text, response, split)
    )
    from sidelight.training.classifier import load

    classifier = load(
        probe, model=runtime.model, dtype=runtime.dtype, device=runtime.backbone_device
    )
    if runtime.engine == "vllm":
        from sidelight.vllm.offline import predict as predict_by_vllm

        verdicts = predict_by_vllm(classifier, items, options=runtime.engine_option)
    else:
        verdicts = classifier.predict(items)
    lines = (json.dumps(asdict(verdict), ensure_ascii=False) + "\n" for verdict in verdicts)
    if out is None:
        sys.stdout.writelines(lines)
        return
    with replacing(out) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def _examples(data: str, text: str, response: str | None, split: str | None) -> "Sequence[Example]":
    from sidelight.data.loading import load_examples

    examples = load_examples(data, text=text, label=None, response=response, split=split)
    if examples.skipped.empty_text:
        raise SidelightError(
            f"{examples.skipped.empty_text} texts or responses are empty, the first in "
            f"{examples.skipped.first_empty}, so the verdicts would not line up with the rows. "
            "Remove the empty rows first."
        )
    return examples.items


_ENGINES = ("transformers", "vllm")


@click.command(
    epilog=options.examples(
        "sidelight parity probes/toxicity --data test.jsonl",
        "sidelight parity probes/toxicity --data test.jsonl --engines vllm --dtype float32",
    )
)
@click.argument("probes", nargs=-1, required=True, type=options.PATH)
@options.data
@options.text
@options.limit
@click.option("--engines", default=",".join(_ENGINES), help="Engines to compare, with commas.")
@options.model
@options.dtype
@options.device
@options.engine_option
@options.json_file
def parity(
    probes: tuple[Path, ...],
    data: str,
    text: str,
    limit: int | None,
    engines: str,
    engine_option: dict[str, Any],
    out: Path | None,
    **model: Any,
) -> None:
    """Compare the verdicts of engines, and of each engine's batch sizes, on the same texts.

    Compare in float32 to see whether two engines compute the same, and in the dtype that you serve
    to see what users get.
    """
    from sidelight.artifact import load_probe
    from sidelight.data.loading import load_examples
    from sidelight.engines.parity import compare_engines

    names = [name.strip() for name in engines.split(",")]
    if not set(names) <= set(_ENGINES):
        raise SidelightError(
            f"Cannot compare '{engines}'. Choose from {', '.join(_ENGINES)} (--engines)."
        )
    loaded = [load_probe(probe) for probe in probes]
    examples = load_examples(data, text=text, label=None)
    drawn = examples.draw(limit or len(examples), seed=0)
    texts = [examples.items[row].messages for row in drawn]
    own = {"transformers": {}, "vllm": engine_option}
    runtimes = {
        name: options.Runtime(engine=name, engine_option=own[name], **model) for name in names
    }
    makers = {name: partial(one.load_engine, loaded) for name, one in runtimes.items()}
    differences = compare_engines(makers, texts)
    if out is not None:
        write_json(out, [asdict(difference) for difference in differences])
    for difference in differences:
        click.echo(
            f"{difference.probe:<20} {difference.between:<32} largest {difference.largest:.2e}, "
            f"median {difference.median:.2e}, {difference.flips} of {difference.texts} flipped"
        )
