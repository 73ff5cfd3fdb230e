"""``sidelight eval``: how good trained probes are on data that training did not see.

``sidelight predict``: verdicts on texts or on a file of texts, as JSON lines.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.engines import engine_options, require_own_device, require_own_options
from sidelight.cli.options import (
    backbone_options,
    checked_file,
    checked_folder,
    column_options,
    examples_epilog,
    json_file_option,
    json_option,
    missing_label_option,
    response_option,
    split_option,
    text_option,
)
from sidelight.errors import SidelightError
from sidelight.storage import replacing, write_text

if TYPE_CHECKING:
    from sidelight.data.examples import Example
    from sidelight.training.runs import Assessment
    from sidelight.types import Verdict


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
    from sidelight.training.runs import Columns, assess, describe, plot

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
    from sidelight.training.runs import comparison_table, console

    out = console()
    for one in assessments:
        if len(one.runs) > 1:
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
@click.argument("probe", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1)
@click.option("--data", default=None, help="JSONL, JSON, CSV, TSV (or .gz), Parquet, or hub name.")
@text_option
@response_option
@split_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=checked_file,
    default=None,
    help="File for the verdicts. [default: standard output]",
)
@engine_options
@backbone_options
def predict(
    probe: Path, texts: tuple[str, ...], data: str | None, out: Path | None, **given: Any
) -> None:
    """Print one verdict per text, as JSON lines, in the order of the texts."""
    if bool(texts) == (data is not None):
        raise SidelightError("Give texts to judge, or a file of them with --data, and not both.")
    require_own_options(given["engine"], given)
    items: Sequence[str | Example] = list(texts) if data is None else _examples(data, given)
    judge = {"transformers": _by_transformers, "vllm": _by_vllm}[given["engine"]]
    lines = (json.dumps(asdict(v), ensure_ascii=False) for v in judge(probe, items, given))
    _write(lines, out)


def _by_transformers(
    probe: Path, items: "Sequence[str | Example]", given: dict[str, Any]
) -> "list[Verdict]":
    from sidelight.training.classifier import load

    classifier = load(probe, model=given["model"], dtype=given["dtype"], device=given["device"])
    return classifier.predict(items)


def _by_vllm(
    probe: Path, items: "Sequence[str | Example]", given: dict[str, Any]
) -> "list[Verdict]":
    from sidelight.training.classifier import load
    from sidelight.vllm.offline import predict as predict_by_vllm

    require_own_device(given)
    classifier = load(probe, model=given["model"], dtype=given["dtype"], device="cpu")
    return predict_by_vllm(classifier, items, options=given["engine_options"])


def _examples(data: str, given: dict[str, Any]) -> "list[Example]":
    from sidelight.data.loading import load_examples

    examples = load_examples(
        data, text=given["text"], label=None, response=given["response"], split=given["split"]
    )
    if examples.skipped.empty_text:
        raise SidelightError(
            f"{examples.skipped.empty_text} texts or responses are empty, first "
            f"{examples.skipped.first_empty}, so verdicts would not line up with rows. Remove the "
            "empty rows first."
        )
    return list(examples.items)


def _write(lines: Iterator[str], out: Path | None) -> None:
    if out is None:
        sys.stdout.writelines(f"{line}\n" for line in lines)
        return
    with replacing(out) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
