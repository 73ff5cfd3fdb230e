"""``sidelight anatomy``: what a probe uses and can do without; of spans, where it errs."""

from pathlib import Path
from typing import Any

import click

from sidelight.cli import options
from sidelight.cli.runtime import Runtime


@click.command(
    epilog=options.examples(
        "sidelight anatomy probes/toxicity --data held_out.jsonl --label toxicity --out anatomy",
        "sidelight anatomy probes/pii --data held_out.jsonl --spans pii --out anatomy/pii",
    )
)
@click.argument("probe", type=options.PATH)
@options.data
@options.out
@options.columns
@click.option("--spans", default="spans", help="Column with the spans, if the probe labels spans.")
@options.missing_label
@options.limit
@options.transformers
def anatomy(probe: Path, runtime: Runtime, out: Path, **options: Any) -> None:
    """Show which layers and tokens a probe uses, per class, and what it loses without them.

    Writes a picture, anatomy.json and report.md. For a probe that labels spans, writes
    thresholds.png (character-level precision, recall and F1 by threshold) and worst.html (the 50
    worst texts with hits, misses and errors). Use texts that the probe was not trained on.
    """
    from sidelight.data.examples import SpanExamples
    from sidelight.data.loading import load_examples
    from sidelight_lab.anatomy import examine, write_anatomy
    from sidelight_lab.spans_anatomy import examine_spans

    classifier = runtime.load_classifier(runtime.probe_folder(probe))
    columns = {name: options[name] for name in ("text", "response", "split")}
    columns |= (
        {"label": options["label"], "on_missing_label": options["missing_label"]}
        if classifier.probe.spans is None
        else {"spans": options["spans"]}
    )
    examples = load_examples(options["data"], task=classifier.probe.task, **columns)
    examples = examples.select(examples.draw(options["limit"] or len(examples), seed=0))
    if isinstance(examples, SpanExamples):
        paths = examine_spans(classifier, examples, out)
        click.echo(f"Written: {' and '.join(map(str, paths))}")
        return
    write_anatomy(examine(classifier, examples), out)
    click.echo((out / "report.md").read_text("utf-8"))
