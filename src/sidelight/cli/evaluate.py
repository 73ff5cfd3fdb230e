"""``sidelight eval``, on labelled data that training did not see, and ``sidelight predict``."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.engines import engine_options, require_own_device, require_own_options
from sidelight.cli.options import (
    PATH,
    backbone_options,
    checked_file,
    checked_folder,
    column_options,
    data_option,
    examples_epilog,
    json_file_option,
    json_option,
    missing_label_option,
    option,
    optional_data_option,
    response_option,
    split_option,
    text_option,
)
from sidelight.errors import SidelightError
from sidelight.storage import replacing, write_text

if TYPE_CHECKING:
    from sidelight.backbone import DtypeName
    from sidelight.data.examples import Example
    from sidelight.training.runs import Assessment


@click.command(
    "eval",
    epilog=examples_epilog(
        "sidelight eval probes/toxicity --data test.jsonl.gz --label toxicity",
        "sidelight eval probes/toxicity --data test.jsonl.gz --label toxicity "
        "--subset human_annotation --plots plots",
    ),
)
@click.argument("probe", type=PATH)
@data_option
@column_options
@missing_label_option
@option("--subset", metavar="COLUMN", help="Also report on the rows where this column is true.")
@option(
    "--plots",
    type=PATH,
    callback=checked_folder,
    help="Folder for precision-recall, reliability and confusion plots.",
)
@json_file_option
@backbone_options
@json_option
def evaluate(
    probe: Path, plots: Path | None, out: Path | None, as_json: bool, **given: Any
) -> None:
    """Measure a probe, and every run trained with it, on labelled data.

    One forward pass serves all of them. Each metric has a 95 % bootstrap interval; the table gives
    the mean and the standard deviation over seeds.
    """
    from sidelight.training.runs import assess, describe, plot

    if plots is not None:
        # If matplotlib is missing, say so before the backbone runs.
        import_module("sidelight.plots")
    assessments = assess(probe, on_missing_label=given.pop("missing_label"), **given)
    for warning in assessments[0].warnings:
        click.echo(f"Warning: {warning}", err=True)
    described = json.dumps(describe(assessments), indent=2)
    if out is not None:
        write_text(out, described + "\n")
    if plots is not None:
        plot(assessments, plots)
    if as_json:
        click.echo(described)
    else:
        _print(assessments)


def _print(assessments: "list[Assessment]") -> None:
    from sidelight.training.runs import comparison_table, console

    out = console()
    for one in assessments:
        if sum(map(len, one.runs.values())) > 1:
            out.print(comparison_table(f"{one.title}: every run", one.runs))
        out.print(f"\n{one.title}: '{one.chosen.name}', {one.chosen.spec.name}")
        out.print(one.report.table())


@click.command(
    epilog=examples_epilog(
        "sidelight predict probes/toxicity 'How do I bake bread?'",
        "sidelight predict probes/toxicity --data texts.jsonl --out verdicts.jsonl",
        "sidelight predict probes/toxicity --data texts.jsonl --engine vllm --out verdicts.jsonl",
    )
)
@click.argument("probe", type=PATH)
@click.argument("texts", nargs=-1)
@optional_data_option
@text_option
@response_option
@split_option
@option(
    "--out",
    type=PATH,
    callback=checked_file,
    help="File for the verdicts. [default: standard output]",
)
@engine_options
@backbone_options
def predict(
    probe: Path,
    texts: tuple[str, ...],
    data: str | None,
    text: str,
    response: str | None,
    split: str | None,
    out: Path | None,
    engine: str,
    engine_option: dict[str, Any],
    model: str | None,
    dtype: "DtypeName",
    device: str,
) -> None:
    """Print one verdict per text, as JSON lines, in the order of the texts."""
    if bool(texts) == (data is not None):
        raise SidelightError("Give texts to judge, or a file of texts with --data, but not both.")
    require_own_options(engine, engine_option)
    items: Sequence[str | Example] = (
        list(texts) if data is None else _examples(data, text, response, split)
    )
    from sidelight.training.classifier import load

    if engine == "vllm":
        from sidelight.vllm.offline import predict as predict_by_vllm

        require_own_device(device)
        classifier = load(probe, model=model, dtype=dtype, device="cpu")
        verdicts = predict_by_vllm(classifier, items, options=engine_option)
    else:
        verdicts = load(probe, model=model, dtype=dtype, device=device).predict(items)
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
