"""``sidelight guard``: ready guards for a model, with their figures and a policy that observes."""

import json
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli import options
from sidelight.cli.runtime import Runtime
from sidelight.errors import SidelightError
from sidelight.storage import check_folder, only_writer, write_json, write_text

if TYPE_CHECKING:
    from sidelight.backbone import Backbone
    from sidelight.data.examples import LabelledExamples
    from sidelight.data.guards import Card
    from sidelight.probe import Probe
    from sidelight.thresholds import ThresholdRule


@click.command(
    epilog=options.examples(
        "sidelight guard --list",
        "sidelight guard --model smollm2 --out probes",
        "sidelight guard --only injection --data mine.jsonl --out probes",
    )
)
@options.new_folder("--out", help="Folder for the probes, policy.toml and figures.json.")
@click.option("--only", metavar="NAMES", help="Guards to train, with commas. [default: all]")
@click.option(
    "--rows",
    type=click.IntRange(min=20),
    help="Use N packaged texts of each guard, of each source and label alike. [default: all; on a "
    "CPU as many as have 250,000 tokens]",
)
@click.option("--data", help="Rows of your own beside those of the guard that --only names.")
@options.threshold(default="f1")
@click.option("--force", is_flag=True, help="Replace what --out holds of other texts or options.")
@click.option("--list", "lists", is_flag=True, help="Print the cards, and train nothing.")
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

    Prints figures on left-out texts, and on public tests beside TF-IDF. After a kill, the same
    command goes on with what is left.
    """
    from sidelight.data.guards import draw_texts, find_guard, guard_names

    # Where there is none, the error says what to install.
    names = guard_names() or ["injection"]
    if only is not None:
        names = [*dict.fromkeys(name.strip() for name in only.split(","))]
    cards = {name: find_guard(name).card for name in names}
    if lists:
        _list_cards(cards)
        return
    if out is None:
        raise SidelightError("Name a folder for the guards with --out, or print them with --list.")
    if data is not None and (only is None or len(names) > 1):
        raise SidelightError(f"--data adapts one guard. Name it: --only {' or '.join(names)}.")
    from sidelight.manifest import require_name
    from sidelight.thresholds import ThresholdRule

    rule = ThresholdRule.parse(threshold)
    for name in names:
        require_name(name)
        if name.lower() in ("figures.json", "policy.toml"):
            raise SidelightError(
                f"A guard called '{name}' has no room in {out}, which has a file of that name. "
                f"Leave it out (--only), or train it by `sidelight train --data guard:{name}`."
            )
        check_folder(out / name)
    options.announce("Reading the texts")
    from sidelight.training import ready

    part = "" if data is None else f",{data}"
    texts = {name: ready.load_guard(name, part) for name in names}
    # What cannot be read must not cost the hours of training.
    tests = {
        name: {test: ready.load_guard(name, f":{test}", own.task) for test in cards[name].tests}
        for name, own in texts.items()
    }
    if rows is not None:
        texts = {name: draw_texts(own, rows) for name, own in texts.items()}
    sizes = {name: len(own) for name, own in texts.items()}
    options.announce("Loading the model")
    backbone = runtime.load_backbone()
    if rows is None:
        texts = {name: ready.affordable(backbone, own) for name, own in texts.items()}
    with only_writer(out):
        figures = _figures(out / "figures.json")
        # An earlier guard that cannot be read must not cost the hours of training either.
        _servable(out, figures.keys() - texts.keys(), backbone)
        _train(backbone, texts, out, rule, sizes=sizes, force=force)
        probes = _servable(out, dict.fromkeys([*figures, *texts]), backbone)
        _write_policy(out / "policy.toml", probes)
        words = ["--model", runtime.model] if runtime.model else []
        words += [word for probe in probes for word in ("--probe", str(out / probe.name))]
        command = shlex.join(["sidelight", "serve", *words, "--policy", str(out / "policy.toml")])
        click.echo(f"Ready to be served, while the tests run: {command}")
        _measure(backbone, texts, tests, out, figures)
    click.echo(f"Figures: {out / 'figures.json'}. Next: {command}")


def _list_cards(cards: "Mapping[str, Card]") -> None:
    for name, card in cards.items():
        facts = (f"Reads the {card.reads}.", card.noise, card.languages, *card.limits)
        click.echo("\n  ".join([f"{name}: {card.title}. {card.positive}", *facts]))
        click.echo(f"  Tests: {', '.join(card.tests)}\n")


def _train(
    backbone: "Backbone",
    texts: "Mapping[str, LabelledExamples]",
    out: Path,
    rule: "ThresholdRule",
    *,
    sizes: Mapping[str, int],
    force: bool,
) -> None:
    """Trains the guards that are not complete.

    Args:
        backbone: The frozen LLM.
        texts: The training texts of each guard.
        out: The folder.
        rule: What thresholds are chosen for.
        sizes: How many texts each guard has on a GPU.
        force: Whether what lies in the folder is replaced.
    """
    from sidelight.cli.show import print_fit
    from sidelight.data.guards import find_guard
    from sidelight.manifest import holds_probe
    from sidelight.smollm2 import cache_root
    from sidelight.training import ready
    from sidelight.training.background import Background, load_background
    from sidelight.training.fit import fit
    from sidelight.training.settings import FitOptions

    # One folder for all guards, in which a killed run finds what it has computed.
    states = cache_root() / f"guards-{sha256(str(out.resolve()).encode()).hexdigest()[:12]}"
    common = FitOptions(threshold=rule, cache_root=states, keep_cache=True)
    differing = {
        name: ready.differences(out / name, backbone, own, rule) for name, own in texts.items()
    }
    for name, others in differing.items():
        if others and holds_probe(out / name) and not force:
            raise SidelightError(
                f"{out / name} holds another probe: there are differences in {', '.join(others)}. "
                "Name another folder, or replace it with --force."
            )
    traffic = load_background("packaged")
    shared = ready.background_states(backbone, traffic)
    for number, (name, own) in enumerate(texts.items(), 1):
        card, count = find_guard(name).card, f"{len(own):,}"
        if len(own) < sizes[name]:
            count += f" of {sizes[name]:,} (--rows {sizes[name]} takes all)"
        click.echo(f"\n{name} ({number} of {len(texts)}): {count} texts")
        if not differing[name]:
            click.echo(f"{out / name} is complete, of these texts, options and model.")
        else:
            reads = replace(common.reads, side=card.reads)
            background = Background() if card.labels is None else traffic
            own_options = replace(common, reads=reads, background=background)
            options.warn(own.warnings)
            made = fit(backbone, own, None, name=name, options=own_options, out=out / name)
            options.warn(warning for warning in made.warnings if warning not in own.warnings)
            print_fit(made)
        for file in states.glob("*/*.safetensors"):
            if file.stem not in shared:
                file.unlink()
    shutil.rmtree(states, ignore_errors=True)


def _measure(
    backbone: "Backbone",
    texts: "Mapping[str, LabelledExamples]",
    tests: "Mapping[str, Mapping[str, LabelledExamples]]",
    out: Path,
    figures: dict[str, dict[str, Any]],
) -> None:
    """Writes and prints the figures of the guards, beside those that a folder has already."""
    from sidelight.artifact import load_probe
    from sidelight.training import ready
    from sidelight.training.classifier import Classifier
    from sidelight.training.traffic import kept_rate

    for name, own in texts.items():
        probe = load_probe(out / name)
        if figures.get(name, {}).get("version") != probe.version:
            figures[name] = {
                "version": probe.version,
                "left_out": probe.record["validation"]["metrics"],
                "sources": probe.history.validation.sources,
                "traffic": kept_rate(probe),
                "tests": {},
            }
            write_json(out / "figures.json", figures)
        done = figures[name]["tests"]
        left = {test: examples for test, examples in tests[name].items() if test not in done}
        for test, measured in ready.measure_tests(Classifier(backbone, probe), own, left):
            # A kill costs one test at most.
            done[test] = measured
            write_json(out / "figures.json", figures)
        click.echo(f"\n{name} on public tests")
        for test in done.values():
            click.echo(_line(test))


def _figures(path: Path) -> dict[str, dict[str, Any]]:
    """The figures of earlier runs, by guard; each can be printed."""
    if not path.exists():
        return {}
    try:
        figures = json.loads(path.read_bytes())
        for own in figures.values():
            for test in own["tests"].values():
                _line(test)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise SidelightError(
            f"Cannot read {path} as figures of guards ({type(error).__name__}: {error}). Remove "
            "it, and name all guards of the folder: they are measured again, and not trained."
        ) from error
    return figures


def _servable(out: Path, names: Iterable[str], backbone: "Backbone") -> "list[Probe]":
    """The probes in a folder, also those of earlier runs, that this model can serve."""
    from sidelight.artifact import load_probe
    from sidelight.manifest import holds_probe

    probes = [load_probe(out / name) for name in names if holds_probe(out / name)]
    return [probe for probe in probes if probe.fingerprint.digest == backbone.fingerprint.digest]


def _write_policy(path: Path, probes: "Sequence[Probe]") -> None:
    from sidelight.training.ready import observing_policy

    if path.exists():
        click.echo(f"{path} was there, and stays as it is.")
        options.warn(_policy_doubts(path, probes))
    else:
        write_text(path, observing_policy(probes))
        click.echo(
            f"{path} observes: nothing is blocked, and /metrics needs a key (--metrics-key)."
        )


def _policy_doubts(path: Path, probes: "Sequence[Probe]") -> list[str]:
    """Warnings of what a policy that was there does not say of the probes, or says of others."""
    from sidelight.policy.rules import read_policy, require_policy_applies, side_of

    try:
        policy = read_policy(path)
        require_policy_applies(policy, probes)
    except SidelightError as error:
        return [f"A server would refuse {path}: {error}"]
    others = [probe.name for probe in probes if probe.name not in policy.side(side_of(probe))]
    if not others:
        return []
    return [
        f"{path} has no rule for {', '.join(others)}: clients see their verdicts. Add a table for "
        'each, as [input.NAME] or, of answers, [output.NAME], with mode = "shadow".'
    ]


def _line(test: Mapping[str, Any]) -> str:
    """The figures of a test; TF-IDF finds so many at as many false alarms."""
    title, positives = f"{test['title']}, {test['rows']} texts", test.get("positives")
    if trained := test.get("trained"):
        title += f" ({trained} of them trained it, which flatters)"
    if positives is None:
        f1, exact = (test[name]["value"] for name in ("character_f1", "f1"))
        return f"{title}: character F1 {f1:.3f}, F1 of exact spans {exact:.3f}"
    parts: list[str] = []
    words = ["", ""]
    auroc, interval = test["auroc"]["value"], test["auroc"]["ci"]
    if auroc is not None:
        words = [f" (TF-IDF {test['tfidf_auroc']:.3f})", f" (TF-IDF {test['tfidf_found']})"]
        low, high = interval
        parts.append(f"AUROC {auroc:.3f} [{low:.3f}, {high:.3f}]{words[0]}")
    if positives:
        parts.append(f"found {test['found']} of {positives}{words[1]}")
    if others := test["rows"] - positives:
        parts.append(f"false alarms {test['false_alarms']} of {others}")
    return f"{title}: {', '.join(parts)}"
