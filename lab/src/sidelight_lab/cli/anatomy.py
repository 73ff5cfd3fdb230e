"""``sidelight anatomy``: which layers and tokens a probe uses, and which it can do without."""

from pathlib import Path
from typing import Any

import click

from sidelight.cli import options


@click.command(
    epilog=options.examples(
        "sidelight anatomy probes/toxicity --data held_out.jsonl --label toxicity --out anatomy",
        "sidelight anatomy probes/gate --data held_out.jsonl --out anatomy/gate",
    )
)
@click.argument("probe", type=options.PATH)
@options.data
@options.out
@options.columns
@options.missing_label
@options.limit
@options.backbone
def anatomy(probe: Path, runtime: options.Runtime, out: Path, **given: Any) -> None:
    """Show which layers and tokens a probe uses, per class, and what it loses without them.

    Writes a picture, anatomy.json and report.md. Give texts that the probe was not trained on.
    """
    from sidelight.data.loading import load_examples
    from sidelight.training.classifier import load
    from sidelight_lab.anatomy import examine, write_anatomy

    classifier = load(probe, model=runtime.model, dtype=runtime.dtype, device=runtime.device)
    columns = {name: given[name] for name in ("text", "label", "response", "split")}
    examples = load_examples(
        given["data"],
        task=classifier.probe.task,
        on_missing_label=given["missing_label"],
        **columns,
    )
    examples = examples.select(examples.draw(given["limit"] or len(examples), seed=0))
    write_anatomy(examine(classifier, examples), out)
    click.echo((out / "report.md").read_text("utf-8"))
