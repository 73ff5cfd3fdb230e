"""``sidelight parity``: compares the verdicts of engines on the same texts."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.engines import engine_option_option, load_engine
from sidelight.cli.options import (
    PATH,
    backbone_options,
    data_option,
    examples_epilog,
    json_file_option,
    limit_option,
    option,
    text_option,
)
from sidelight.errors import SidelightError
from sidelight.storage import write_text

if TYPE_CHECKING:
    from sidelight.backbone import DtypeName
    from sidelight.engines.base import Engine


_ENGINES = ("transformers", "vllm")


@click.command(
    epilog=examples_epilog(
        "sidelight parity probes/toxicity --data test.jsonl",
        "sidelight parity probes/toxicity --data test.jsonl --engines vllm --dtype float32",
    )
)
@click.argument("probes", nargs=-1, required=True, type=PATH)
@data_option
@text_option
@limit_option
@option("--engines", default=",".join(_ENGINES), help="Engines to compare, with commas.")
@backbone_options
@engine_option_option
@json_file_option
def parity(
    probes: tuple[Path, ...],
    data: str,
    text: str,
    limit: int | None,
    engines: str,
    model: str | None,
    dtype: "DtypeName",
    device: str,
    engine_option: dict[str, Any],
    out: Path | None,
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
    how = {"model": model, "dtype": dtype, "device": device, "options": engine_option}
    makers: dict[str, Callable[[], Engine]] = {
        name: partial(load_engine, name, loaded, **how) for name in names
    }
    differences = compare_engines(makers, texts)
    if out is not None:
        rows = [difference.to_dict() for difference in differences]
        write_text(out, json.dumps(rows, indent=2) + "\n")
    for difference in differences:
        click.echo(
            f"{difference.probe:<20} {difference.between:<32} largest {difference.largest:.2e}, "
            f"median {difference.median:.2e}, {difference.flips} of {difference.texts} flipped"
        )
