"""``sidelight redteam``: which attacks get through a probe."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli import options
from sidelight.errors import SidelightError
from sidelight.storage import check_folder, write_json
from sidelight_lab.cli.options import split_names

if TYPE_CHECKING:
    from sidelight.data.loading import OnMissingLabel
    from sidelight_lab.redteam.subjects import Target


def _split(_context: click.Context, _option: Any, value: str | None) -> list[str]:
    return split_names(value)


@click.command(
    epilog=options.examples(
        "sidelight redteam probes/injection --data held_out.jsonl",
        "sidelight redteam probes/injection --data held_out.jsonl --attacks places,disguises",
        "sidelight redteam probes/injection --data held_out.jsonl --json evasion.json --card",
        "sidelight redteam probes/injection --data held_out.jsonl --url http://127.0.0.1:8000",
    )
)
@click.argument("probe", type=options.PATH)
@options.data
@options.text
@options.label
@options.split
@options.missing_label
@click.option(
    "--attacks",
    callback=_split,
    metavar="NAME,...",
    help="Groups (control, template, places, padding, disguises, search) or single attacks, as "
    "the table names them. [default: all]",
)
@click.option(
    "--texts",
    type=options.AT_LEAST_ONE,
    default=50,
    help="Attack up to N positive texts, and as many benign ones.",
)
@click.option(
    "--budget",
    type=options.AT_LEAST_ONE,
    default=50,
    help="Texts that the search may have scored for each positive.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Draws texts and attacks.")
@click.option(
    "--flag",
    callback=_split,
    metavar="LABEL,...",
    help="Labels that flag a text. [default: the positive one, or all of a multi-label probe]",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="Probability from which they do. [default: the probe's]",
)
@click.option(
    "--json", "out", type=options.PATH, callback=options.checked_file, help="File for the JSON."
)
@click.option(
    "--url",
    help="Attack the policy of a live server, on each route that writes text; its key is "
    "SIDELIGHT_API_KEY. [default: the probe itself]",
)
@click.option("--card", is_flag=True, help="Add the table to the model card in the probe's folder.")
@options.backbone
def redteam(
    probe: Path,
    data: str,
    text: str,
    label: str,
    split: str | None,
    missing_label: "OnMissingLabel",
    attacks: list[str],
    texts: int,
    budget: int,
    seed: int,
    flag: list[str],
    threshold: float | None,
    out: Path | None,
    url: str | None,
    card: bool,
    runtime: options.Runtime,
) -> None:
    """Attack a probe of prompts as a client could, and count what gets through.

    Each attack is made on positive and on benign texts, since a probe that flags every disguise
    has found nothing. Use texts that training has not seen.
    """
    from sidelight.data.loading import load_examples
    from sidelight.manifest import read_manifest

    # Before imports that take seconds: a wrong file or column is refused at once.
    examples = load_examples(
        data,
        text=text,
        label=label,
        split=split,
        on_missing_label=missing_label,
        task=read_manifest(probe).task,
    )
    from sidelight.artifact import load_probe
    from sidelight.training.classifier import load
    from sidelight_lab.redteam.attacks import SEARCH, attack_names
    from sidelight_lab.redteam.live import Server
    from sidelight_lab.redteam.measure import measure
    from sidelight_lab.redteam.report import Evasion
    from sidelight_lab.redteam.subjects import ProbeTarget, flagging_thresholds

    names = attack_names(attacks)
    if url is not None:
        if card or attacks == [SEARCH]:
            raise SidelightError(
                "A live server says what passes, and no scores. Leave out --url, or --card and the "
                "attack 'search'."
            )
        names = [name for name in names if name != SEARCH]
    attacked = load_probe(probe)
    if card:
        check_folder(probe)
    thresholds = flagging_thresholds(attacked, labels=flag, threshold=threshold)
    for warning in examples.warnings:
        click.echo(f"Warning: {warning}", err=True)
    targets: dict[str, Target]
    if url is None:
        backbone = load(
            probe, model=runtime.model, dtype=runtime.dtype, device=runtime.device
        ).backbone
        targets = {"": ProbeTarget(backbone=backbone, thresholds=thresholds, probe=attacked)}
    else:
        targets = {**Server(url).targets(attacked, thresholds, runtime.model)}
    evasions: list[Evasion] = []
    for route, target in targets.items():
        outcomes = measure(target, examples, attacks=names, texts=texts, seed=seed, budget=budget)
        evasions.append(
            Evasion(
                *(attacked.name, attacked.version, thresholds, data, seed, budget),
                tuple(outcomes),
                route=route,
            )
        )
        click.echo(evasions[-1].markdown())
    if out is not None:
        found = [evasion.to_dict() for evasion in evasions]
        write_json(out, found[0] if url is None else {"url": url, "routes": found})
    if card:
        evasions[0].add_to_card(probe)
