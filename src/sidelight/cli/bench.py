"""``sidelight bench``: what extraction and training cost on this machine."""

import json
from typing import Any

import click

from sidelight.cli.options import (
    device_option,
    dtype_option,
    examples_epilog,
    json_option,
    label_option,
    model_option,
    text_option,
)


@click.group(epilog=examples_epilog("sidelight bench extract --data train.jsonl --label toxicity"))
def bench() -> None:
    """Measure speed side by side in one run; no figure is compared across runs."""


def _with_data(command: Any) -> Any:
    options = [
        click.option("--data", required=True, help="A labelled file."),
        text_option,
        label_option,
        click.option("--rows", type=click.IntRange(min=20), default=None, help="Use N rows."),
        click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True),
        model_option,
        dtype_option,
        device_option,
        json_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@bench.command("extract")
@_with_data
def bench_extract(as_json: bool, **given: Any) -> None:
    """Extraction into the cache against a plain forward pass over the same batches."""
    from sidelight.bench.extraction import compare_extraction

    _show(compare_extraction(**_subject(given), repeats=given["repeats"]), as_json)


@bench.command("train")
@_with_data
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
def bench_train(as_json: bool, seeds: int, **given: Any) -> None:
    """Training every mechanism with several seeds against one extraction."""
    from sidelight.bench.training import compare_training

    _show(compare_training(**_subject(given), repeats=given["repeats"], seeds=seeds), as_json)


def _subject(given: dict[str, Any]) -> dict[str, Any]:
    from sidelight.backbones import load_backbone
    from sidelight.data import load_examples

    examples = load_examples(given["data"], text=given["text"], label=given["label"])
    if given["rows"]:
        examples = examples.select(range(min(given["rows"], len(examples))))
    backbone = load_backbone(
        given["model"] or "smollm2", dtype=given["dtype"], device=given["device"]
    )
    return {"backbone": backbone, "examples": examples}


def _show(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        click.echo(f"{name:<28} {value}")
