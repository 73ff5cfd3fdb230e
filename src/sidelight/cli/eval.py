"""``sidelight eval``: how good trained probes are on data that training did not see."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.options import (
    backbone_options,
    column_options,
    examples_epilog,
    json_option,
    missing_label_option,
)
from sidelight.cli.outputs import checked_folder, json_file_option
from sidelight.storage import write_text

if TYPE_CHECKING:
    from sidelight.assessment import Assessment


@click.command(
    "eval",
    epilog=examples_epilog(
        "sidelight eval probes/toxicity --data test.jsonl.gz --label toxicity",
        "sidelight eval probes/toxicity --data test.jsonl.gz --label toxicity "
        "--subset human_annotation --plots plots",
    ),
)
@click.argument("probe", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="JSONL, JSON, CSV, TSV (or .gz), Parquet, or hub name.")
@column_options
@missing_label_option
@click.option(
    "--subset",
    default=None,
    metavar="COLUMN",
    help="Report the rows where this column is true as well.",
)
@click.option(
    "--plots",
    type=click.Path(path_type=Path),
    default=None,
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

    All of them read the same forward pass. Each metric has a 95 % bootstrap interval; the table
    gives mean and standard deviation over seeds.
    """
    from sidelight.assessment import Columns, assess, describe, plot

    assessments = assess(
        probe,
        given["data"],
        columns=Columns(given["text"], given["label"], given["response"]),
        split=given["split"],
        on_missing_label=given["missing_label"],
        subset=given["subset"],
        model=given["model"],
        dtype=given["dtype"],
        device=given["device"],
    )
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
    from sidelight.runs import comparison_table, console

    out = console()
    for one in assessments:
        if len(one.runs) > 1:
            out.print(comparison_table(f"{one.title}: every run", one.runs))
        out.print(f"\n{one.title}: '{one.chosen.name}', {one.chosen.spec.name}")
        out.print(one.report.table())
