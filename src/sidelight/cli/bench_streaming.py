"""``sidelight bench streaming``: how soon a probe catches a response while it is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.options import backbone_options, examples_epilog, json_option
from sidelight.cli.outputs import checked_folder

if TYPE_CHECKING:
    from sidelight.bench.streaming import Record
    from sidelight.data import Examples

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
    from sidelight.backbones import load_backbone
    from sidelight.bench.streaming import Settings, compare_streaming, with_positives

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
    from sidelight.data import load_examples
    from sidelight.datasets.folders import default_root

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
        from sidelight.bench.streaming.picture import plot_streaming

        plot_streaming(record, plots)
    click.echo(record.to_json() if as_json else record.to_markdown(), nl=False)
