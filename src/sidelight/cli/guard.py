"""``sidelight guard``: train ready guards for a model, measure them, and write a policy."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli import options
from sidelight.cli.runtime import Runtime
from sidelight.errors import SidelightError, warn
from sidelight.guards import local_name, trained_guards
from sidelight.storage import check_folder, only_writer, write_json, write_text

if TYPE_CHECKING:
    from sidelight.data.examples import LabelledExamples
    from sidelight.data.guards import Card
    from sidelight.states.reader import Backbone
    from sidelight.statistics.thresholds import ThresholdRule

_RESULTS, _POLICY = "figures.json", "policy.toml"


@click.command(
    epilog=options.examples(
        "sidelight guard --list",
        "sidelight guard --model Qwen/Qwen3-0.6B",
        "sidelight guard --only injection --data mine.jsonl --out probes",
    )
)
@options.new_folder(
    "--out",
    help="Folder for the probes and policy.toml. [default: the folder that guard:NAME uses]",
)
@click.option("--only", metavar="NAMES", help="Comma-separated guards to train. [default: all]")
@click.option(
    "--rows",
    type=click.IntRange(min=20),
    help="Use N packaged texts of each guard, balanced by source and label. [default: all; on a "
    "CPU as many as have 250,000 tokens]",
)
@click.option("--data", help="Your rows, added to those of the guard that --only names.")
@options.threshold(default="f1")
@click.option("--force", is_flag=True, help="Replace guards trained with other options.")
@click.option("--list", "lists", is_flag=True, help="Print the cards without training.")
@options.backbone
def guard(
    out: Path | None,
    only: str | None,
    rows: int | None,
    data: str | None,
    threshold: str,
    force: bool,
    lists: bool,
    runtime: Runtime,
) -> None:
    """Train ready guards: injection, harmful requests, toxicity, refusals, personal data.

    The guards of the embedded model are packaged: 'sidelight serve --probe guard:all' needs no
    training. For any other model, this command trains each guard and measures it on held-out texts
    and on public tests, next to TF-IDF. Run the same command again to resume an interrupted run.
    """
    from sidelight.data.guards import find_guard

    names = _names(only)
    cards = {name: find_guard(name).card for name in names}
    if lists:
        _list_cards(cards)
        return
    if data is not None and (only is None or len(names) > 1):
        raise SidelightError(
            f"--data adapts a single guard. Name it with --only: {' or '.join(names)}."
        )
    if out is None and (data, rows, threshold) != (None, None, "f1"):
        raise SidelightError(
            "With --data, --rows or --threshold, the trained guards differ from guard:NAME. Name "
            "a folder for them with --out."
        )
    from sidelight.policy.rules import read_policy
    from sidelight.probes.card import require_name
    from sidelight.statistics.thresholds import ThresholdRule

    rule = ThresholdRule.parse(threshold)
    for name in names:
        require_name(name)
        if name.lower() == _POLICY:
            raise SidelightError(
                f"The guard '{name}' would need a folder with the name of the policy file. Leave "
                f"it out with --only, or train it with `sidelight train --data guard:{name}`."
            )
        if out is not None:
            check_folder(out / name)
    options.announce("Reading the texts")
    # Unreadable data must be found before hours of training.
    texts, tests = _read(cards, data, rows)
    options.announce("Loading the model")
    backbone = runtime.load_backbone()
    home = trained_guards(backbone.fingerprint.digest) if out is None else out
    folders: list[Path] = []
    with only_writer(home):
        # So must an invalid policy.
        if (home / _POLICY).exists():
            read_policy(home / _POLICY)
        for number, (name, dataset) in enumerate(texts.items(), 1):
            folder = home / (local_name(find_guard(name)) if out is None else name)
            folders.append(folder)
            click.echo(f"\n{name} ({number} of {len(texts)})")
            dataset = _train(
                backbone, name, dataset, folder, rule, takes_all=bool(rows), force=force
            )
            _measure(backbone, dataset, tests[name], folder)
        _write_policy(home / _POLICY, home)
    _say_next(runtime.model, names if out is None else folders, home)


def _names(only: str | None) -> list[str]:
    from sidelight.data.guards import guard_names

    if only is None:
        # If no guard is installed, the error says what to install.
        return guard_names() or ["injection"]
    return [*dict.fromkeys(name.strip() for name in only.split(","))]


def _list_cards(cards: "Mapping[str, Card]") -> None:
    for name, card in cards.items():
        facts = (f"Reads the {card.reads}.", card.noise, card.languages, *card.limits)
        click.echo("\n  ".join([f"{name}: {card.title}. {card.positive}", *facts]))
        click.echo(f"  Tests: {', '.join(card.tests)}\n")


def _read(
    cards: "Mapping[str, Card]", data: str | None, rows: int | None
) -> "tuple[dict[str, LabelledExamples], dict[str, dict[str, LabelledExamples]]]":
    """The training texts and the tests of each guard."""
    from sidelight.data.guards import draw_texts
    from sidelight.training import ready

    suffix = "" if data is None else f",{data}"
    texts = {name: ready.load_guard(name, suffix) for name in cards}
    tests = {
        name: {test: ready.load_guard(name, f":{test}", dataset.task) for test in cards[name].tests}
        for name, dataset in texts.items()
    }
    if rows is not None:
        texts = {name: draw_texts(dataset, rows) for name, dataset in texts.items()}
    return texts, tests


def _train(
    backbone: "Backbone",
    name: str,
    texts: "LabelledExamples",
    folder: Path,
    rule: "ThresholdRule",
    *,
    takes_all: bool,
    force: bool,
) -> "LabelledExamples":
    """Train a guard unless it is complete, and return its training texts."""
    from sidelight.cli.show import print_fit
    from sidelight.probes.card import holds_probe, read_card, require_free
    from sidelight.training import ready
    from sidelight.training.fit import fit

    available = len(texts)
    if not takes_all:
        texts = ready.affordable(texts, backbone.encoder, backbone.device)
    fit_options = ready.guard_options(name, texts, backbone, rule)
    training_sha256 = fit_options.training_sha256(
        texts, None, name=name, model=backbone.fingerprint, engine=backbone.engine
    )
    if holds_probe(folder) and not force:
        if read_card(folder).training.training_sha256 == training_sha256:
            click.echo(f"{folder} is complete for these texts, options and model.")
            return texts
        require_free(folder, force=False)
    some = f" of {available:,} (--rows {available} takes all)" if len(texts) < available else ""
    click.echo(f"{len(texts):,} texts{some}")
    result = fit(backbone, texts, None, name=name, options=fit_options, out=folder)
    print_fit(result)
    return texts


def _measure(
    backbone: "Backbone",
    texts: "LabelledExamples",
    tests: "dict[str, LabelledExamples]",
    folder: Path,
) -> None:
    """Write and print the metrics on tests; an interruption loses at most one test."""
    from sidelight.probes.artifact import load_probe
    from sidelight.progress import say
    from sidelight.scoring import GuardTests

    probe = load_probe(folder)
    measured, results = GuardTests(texts, tests), _read_results(folder / _RESULTS)
    for number, (test, examples) in enumerate(tests.items(), 1):
        known = results.get(test, {})
        wanted = (probe.version, examples.content_hash)
        if (known.get("probe"), known.get("texts_sha256")) != wanted:
            say(f"Test {number} of {len(tests)}: {test}, {len(examples)} texts")
            results[test] = measured.measure(backbone, probe, test)
            write_json(folder / _RESULTS, results)
        click.echo(_line(results[test]))


def _read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The metrics of an earlier run; empty if unreadable, because they can be measured again."""
    try:
        results = json.loads(path.read_bytes())
        for test in results.values():
            _line(test)
    except (OSError, AttributeError, LookupError, TypeError, ValueError, RecursionError):
        return {}
    return results


def _line(test: Mapping[str, Any]) -> str:
    """The metrics of a test, next to TF-IDF at the same number of false positives."""
    title, positives = f"{test['title']}, {test['rows']} texts", test.get("positives")
    if trained := test.get("trained"):
        title += f" ({trained} of them were used in training, so the result is too optimistic)"
    if positives is None:
        f1, exact = (test[name]["value"] for name in ("character_f1", "f1"))
        return f"{title}: character F1 {f1:.3f}, F1 of exact spans {exact:.3f}"
    phrases: list[str] = []
    words = ["", ""]
    auroc, interval = test["auroc"]["value"], test["auroc"]["ci"]
    if auroc is not None:
        words = [f" (TF-IDF {test['tfidf_auroc']:.3f})", f" (TF-IDF {test['tfidf_found']})"]
        low, high = interval
        phrases.append(f"AUROC {auroc:.3f} [{low:.3f}, {high:.3f}]{words[0]}")
    if positives:
        phrases.append(f"found {test['found']} of {positives}{words[1]}")
    if negatives := test["rows"] - positives:
        phrases.append(f"false positives {test['false_positives']} of {negatives}")
    return f"{title}: {', '.join(phrases)}"


def _write_policy(path: Path, home: Path) -> None:
    """Write a policy for all guards of a folder unless one exists; warn if that lacks a guard."""
    from sidelight.policy.rules import read_policy, side_of
    from sidelight.probes.card import PROBE, read_card
    from sidelight.training.ready import shadow_policy

    cards = [read_card(probe.parent) for probe in sorted(home.glob(f"*/{PROBE}"))]
    # All versions of a guard share a name.
    cards = [*{each.name: each for each in cards}.values()]
    if not path.exists():
        write_text(path, shadow_policy(cards))
        click.echo(f"\n{path} is in shadow mode: nothing is blocked.")
        return
    policy = read_policy(path)
    lacking = [each.name for each in cards if each.name not in policy.side(side_of(each))]
    click.echo(f"\n{path} exists and was left unchanged.")
    if lacking:
        warn(
            f"{path} has no rule for {', '.join(lacking)}, so clients see the verdicts. Add a "
            'table for each guard with mode = "shadow": [input.NAME], or [output.NAME] for '
            "guards of responses."
        )


def _say_next(model: str | None, probes: "Sequence[str | Path]", home: Path) -> None:
    words = ["--model", model] if model else []
    if isinstance(probes[0], str):
        words += ["--probe", f"guard:{','.join(map(str, probes))}"]
    else:
        words += [word for probe in probes for word in ("--probe", str(probe))]
    command = shlex.join(["sidelight", "serve", *words, "--policy", str(home / _POLICY)])
    click.echo(f"Next: {command}")
