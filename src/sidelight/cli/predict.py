"""``sidelight predict``: verdicts on texts or on a file of texts, as JSON lines."""

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
    examples_epilog,
    response_option,
    split_option,
    text_option,
)
from sidelight.cli.outputs import checked_file
from sidelight.errors import SidelightError
from sidelight.storage import replacing

if TYPE_CHECKING:
    from sidelight.data import Example
    from sidelight.types import Verdict


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
    from sidelight.classifier import load

    classifier = load(probe, model=given["model"], dtype=given["dtype"], device=given["device"])
    return classifier.predict(items)


def _by_vllm(
    probe: Path, items: "Sequence[str | Example]", given: dict[str, Any]
) -> "list[Verdict]":
    from sidelight.classifier import load
    from sidelight.engines.vllm import predict as predict_by_vllm

    require_own_device(given)
    classifier = load(probe, model=given["model"], dtype=given["dtype"], device="cpu")
    return predict_by_vllm(classifier, items, options=given["engine_options"])


def _examples(data: str, given: dict[str, Any]) -> "list[Example]":
    from sidelight.data import load_examples

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
