"""``sidelight bench``: what extraction, training and serving cost on this machine."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.engines import engine_options, state_source
from sidelight.cli.options import (
    checked_folder,
    device_option,
    dtype_option,
    examples_epilog,
    json_option,
    label_option,
    model_option,
    text_option,
)
from sidelight_lab.cli.bench_serving import bench_load, bench_serve, bench_soak, bench_streaming

if TYPE_CHECKING:
    from sidelight.backbone import TransformersBackbone
    from sidelight_lab.bench.latency import Record
    from sidelight_lab.bench.latency_subjects import Load


@click.group(epilog=examples_epilog("sidelight bench extract --data train.jsonl --label toxicity"))
def bench() -> None:
    """Measure side by side in one run; no figure is compared across runs."""


bench.add_command(bench_serve)
bench.add_command(bench_streaming)
bench.add_command(bench_load)
bench.add_command(bench_soak)


def _with_data(command: Any) -> Any:
    options = [
        click.option("--data", required=True, help="A labelled file."),
        text_option,
        label_option,
        click.option(
            "--rows",
            type=click.IntRange(min=20),
            default=None,
            help="Use N rows, drawn at random, class by class.",
        ),
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
@engine_options
def bench_extract(as_json: bool, engine: str, **given: Any) -> None:
    """Extraction into the cache against a plain forward pass over the same batches.

    With --engine vllm, also against extraction through vLLM.
    """
    from sidelight_lab.bench.training import compare_extraction

    subject, repeats = _subject(given), given["repeats"]
    if engine == "transformers":
        _show(compare_extraction(**subject, repeats=repeats), as_json)
        return
    with state_source(engine, subject["backbone"], given) as rival:
        _show(compare_extraction(**subject, repeats=repeats, rival=rival), as_json)


@bench.command("train")
@_with_data
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
def bench_train(as_json: bool, seeds: int, **given: Any) -> None:
    """Training every mechanism with several seeds against one extraction."""
    from sidelight_lab.bench.training import compare_training

    _show(compare_training(**_subject(given), repeats=given["repeats"], seeds=seeds), as_json)


def _numbers(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, ...]:
    """Positive whole numbers with commas between them; none where nothing is given."""
    words = [word.strip() for word in value.split(",")] if value else []
    if not all(word.isdecimal() and int(word) for word in words):
        raise click.BadParameter(f"'{value}' is not like 16,64,256: whole numbers, 1 or more.")
    return tuple(map(int, words))


@bench.command(
    "long", epilog=examples_epilog("sidelight bench long probes/toxicity --data t.jsonl")
)
@click.argument("probes", nargs=-1, required=True, metavar="PROBE...")
@click.option("--data", required=True, help="Labelled texts that the probes were not trained on.")
@text_option
@label_option
@click.option("--lengths", callback=_numbers, default="500,1000,2000,4000", show_default=True,
              help="Tokens of negative text around one text.")  # fmt: skip
@click.option("--texts", type=click.IntRange(min=2), default=40, show_default=True,
              help="Positive and negative ones, each, at each length.")  # fmt: skip
@click.option("--window", type=click.IntRange(min=8), default=256, show_default=True,
              help="Tokens that get a logit of their own.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@dtype_option
@device_option
@json_option
def bench_long(probes: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Whether binary probes find one positive text in a long input, whole and by windows."""
    from sidelight_lab.bench.long_inputs import Comparison, compare_lengths

    comparison = Comparison((0, *given["lengths"]), given["texts"], given["window"], given["seed"])
    backbone, loaded, examples = _long_subject(probes, given)
    rows = compare_lengths(backbone, loaded, examples, comparison)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    _print_rows(rows)


def _long_subject(probes: tuple[str, ...], given: dict[str, Any]) -> tuple[Any, Any, Any]:
    from sidelight.artifact import load_probe
    from sidelight.backbone import load_backbone
    from sidelight.data.loading import load_examples

    # Seeds of one training have one name.
    loaded = [replace(load_probe(folder), name=folder) for folder in probes]
    first = loaded[0]
    examples = load_examples(
        given["data"], text=given["text"], label=given["label"], task=first.task
    )
    backbone = load_backbone(
        first.fingerprint.name,
        dtype=given["dtype"],
        device=given["device"],
        prompt_format=first.prompt_format,
    )
    for probe in loaded:
        probe.fingerprint.require(backbone.fingerprint, probe=probe.name)
    return backbone, loaded, examples


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from sidelight.training.runs import console

    table = Table(*rows[0])
    for row in rows:
        cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    console().print(table)


@bench.command(
    "latency",
    epilog=examples_epilog(
        "sidelight bench latency --quick",
        "sidelight bench latency --out latency --plots latency",
        "sidelight bench latency --data test.jsonl.gz --rows 100 --batch-sizes 1 --mechanisms gate",
    ),
)
@click.option("--data", default=None, help="Prompts of a file, instead of random token ids.")
@text_option
@click.option("--rows", type=click.IntRange(min=1), default=64, show_default=True,
              help="Prompts to use of --data.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True,
              help="Longer prompts of --data are cut.")  # fmt: skip
@click.option("--batch-sizes", callback=_numbers, default="", help="[default: 1,16]")
@click.option("--lengths", callback=_numbers, default="",
              help="Tokens of a random prompt. [default: 16,64,256,512,1024,2048]")  # fmt: skip
@click.option("--mechanisms", default=None, help="Names with commas. [default: all]")
@click.option("--cascades/--no-cascades", default=True, help="Two models in turn.  [default: yes]")
@click.option("--repeats", type=click.IntRange(min=1), default=None, help="[default: 5]")
@click.option("--quick", is_flag=True, help="Batch 1, lengths 16 and 256, 2 repeats.")
@click.option("--out", type=click.Path(path_type=Path), default=None, callback=checked_folder,
              help="Folder for latency.json and latency.md.")  # fmt: skip
@click.option("--plots", type=click.Path(path_type=Path), default=None, help="Folder for plots.")
@model_option
@dtype_option
@device_option
@json_option
def bench_latency(as_json: bool, out: Path | None, plots: Path | None, **given: Any) -> None:
    """One new token of the LLM, with and without probes, and what probes replace.

    The rows are the LLM alone, with each mechanism, with ten probes, with each mechanism reading
    kept hidden states, and behind a classifier or a guard of its own. Weights of probes and
    classifiers are random, which does not change their speed.
    """
    from sidelight.backbone import load_backbone
    from sidelight_lab.bench.latency import Record, compare_latency, conditions
    from sidelight_lab.bench.latency_subjects import default_subjects

    names = given["mechanisms"]
    repeats = given["repeats"] or (2 if given["quick"] else 5)
    backbone = load_backbone(
        given["model"] or "smollm2", dtype=given["dtype"], device=given["device"]
    )
    subjects = default_subjects(
        backbone,
        mechanisms=None if names is None else [name.strip() for name in names.split(",")],
        cascades=given["cascades"],
    )
    loads = _loads(backbone, given)
    where = conditions(backbone, repeats=repeats)
    rows = compare_latency(subjects, loads, repeats=repeats, device=backbone.device)
    _publish(Record(where, rows), as_json=as_json, out=out, plots=plots)


def _loads(backbone: "TransformersBackbone", given: dict[str, Any]) -> "list[Load]":
    from sidelight.data.loading import load_examples
    from sidelight_lab.bench.latency_subjects import prompt_load, synthetic_load

    sizes = given["batch_sizes"] or ((1,) if given["quick"] else (1, 16))
    if given["data"] is None:
        usual = (16, 256) if given["quick"] else (16, 64, 256, 512, 1024, 2048)
        fitting = [tokens for tokens in usual if tokens <= backbone.encoder.max_tokens]
        return [
            synthetic_load(backbone, batch_size=size, tokens=tokens)
            for size in sizes
            for tokens in given["lengths"] or fitting
        ]
    examples = load_examples(given["data"], text=given["text"], label=None)
    limit = min(given["max_tokens"], backbone.encoder.max_tokens)
    prompts = [
        backbone.encoder.encode_any_length(example.messages).shortened(limit)
        for example in examples.items[: given["rows"]]
    ]
    title = f"{len(prompts)} prompts of {Path(given['data']).name}"
    return [prompt_load(prompts, batch_size=size, title=title) for size in sizes]


def _publish(record: "Record", *, as_json: bool, out: Path | None, plots: Path | None) -> None:
    from sidelight.training.runs import console
    from sidelight_lab.bench.latency import grids, plot_latency

    if out is not None:
        record.save(out)
    if plots is not None:
        plot_latency(record.rows, plots)
    if as_json:
        click.echo(record.to_json(), nl=False)
        return
    for grid in grids(record.rows):
        console().print(grid.table())


def _subject(given: dict[str, Any]) -> dict[str, Any]:
    from sidelight.backbone import load_backbone
    from sidelight.data.loading import load_examples

    examples = load_examples(given["data"], text=given["text"], label=given["label"])
    if given["rows"]:
        examples = examples.select(examples.draw(given["rows"], seed=0))
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
