"""``sidelight redteam``: which attacks get through a probe."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli import options
from sidelight.cli.runtime import Runtime
from sidelight.errors import SidelightError
from sidelight.storage import write_json
from sidelight_lab.cli.options import names

if TYPE_CHECKING:
    from sidelight.data.loading import OnMissingLabel
    from sidelight_lab.redteam.targets import Target


@click.command(
    epilog=options.examples(
        "sidelight redteam probes/injection --data held_out.jsonl",
        "sidelight redteam probes/injection --data held_out.jsonl --attacks places,disguises",
        "sidelight redteam probes/injection --data held_out.jsonl --out evasion.json",
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
    callback=names,
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
    help="Maximum number of texts that the search scores per positive text.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, help="Seed for sampling texts and attacks."
)
@click.option(
    "--flag",
    callback=names,
    metavar="LABEL,...",
    help="Labels that flag a text. [default: the positive one, or all of a multi-label probe]",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="Probability at which a label flags a text. [default: the probe's threshold]",
)
@options.json_file
@click.option(
    "--url",
    help="Attack the policy of a live server on each route that generates text; its key is "
    "SIDELIGHT_API_KEY. [default: the probe itself]",
)
@options.transformers
def redteam(
    probe: Path,
    data: str,
    text: str,
    label: str,
    split: str | None,
    missing_label: "OnMissingLabel",
    attacks: list[str] | None,
    texts: int,
    budget: int,
    seed: int,
    flag: list[str] | None,
    threshold: float | None,
    out: Path | None,
    url: str | None,
    runtime: Runtime,
) -> None:
    """Attack a probe of prompts as a client could, and count what gets through.

    Each attack is applied to positive and to benign texts, because a probe that flags every
    disguise detects nothing. Use texts that the probe was not trained on.
    """
    from sidelight.data.loading import load_examples
    from sidelight.probes.card import read_card

    # Before imports that take seconds: a wrong file or column is refused at once.
    probe = runtime.probe_folder(probe)
    examples = load_examples(
        data,
        text=text,
        label=label,
        split=split,
        on_missing_label=missing_label,
        task=read_card(probe).task,
    )
    from sidelight.probes.artifact import load_probe
    from sidelight_lab.redteam.attacks import SEARCH, attack_names
    from sidelight_lab.redteam.measure import evasion_table, measure
    from sidelight_lab.redteam.targets import (
        ProbeTarget,
        connect,
        flagging_thresholds,
        server_targets,
    )

    chosen = attack_names(attacks or ())
    if url is not None:
        if attacks == [SEARCH]:
            raise SidelightError(
                "The attack 'search' needs scores, but a live server reports only which messages "
                "pass. Leave out --url or the attack 'search'."
            )
        chosen = [name for name in chosen if name != SEARCH]
    attacked = load_probe(probe)
    thresholds = flagging_thresholds(attacked, labels=flag or (), threshold=threshold)
    flags = ", ".join(f"{label} from {least:.3f}" for label, least in thresholds.items())
    routes: list[dict[str, Any]] = []
    with ExitStack() as stack:
        targets: Mapping[str, Target]
        if url is None:
            backbone = runtime.load_classifier(probe).backbone
            targets = {"": ProbeTarget(backbone=backbone, thresholds=thresholds, probe=attacked)}
        else:
            client = stack.enter_context(connect(url))
            targets = server_targets(client, attacked, thresholds, runtime.model)
        for route, target in targets.items():
            results = measure(
                target, examples, attacks=chosen, texts=texts, seed=seed, budget=budget
            )
            where = f" on the route '{route}'" if route else ""
            title = f"'{attacked.name}' under attack{where}; it flags {flags}."
            click.echo(evasion_table(title, results))
            routes.append({"route": route, "attacks": [result.to_dict() for result in results]})
    if out is not None:
        told = {
            "probe": attacked.name,
            "version": attacked.version,
            "thresholds": dict(thresholds),
            "data": data,
            "seed": seed,
            "budget": budget,
        }
        live = {"url": url, "routes": routes}
        write_json(out, {**told, **(live if url else {"attacks": routes[0]["attacks"]})})
