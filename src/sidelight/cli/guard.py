"""``sidelight guard``: ready guards for a model, with their figures and a policy that observes."""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli import options
from sidelight.errors import SidelightError, checked
from sidelight.storage import check_folder, only_writer, write_json, write_text

if TYPE_CHECKING:
    from sidelight.probe import Probe


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
    runtime: options.Runtime,
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
        for name, card in cards.items():
            said = (f"Reads the {card.reads}.", card.noise, card.languages, *card.limits)
            click.echo("\n  ".join([f"{name}: {card.title}. {card.positive}", *said]))
            click.echo(f"  Tests: {', '.join(card.tests)}\n")
        return
    if out is None:
        raise SidelightError("Name a folder for the guards with --out, or print them with --list.")
    if data is not None and (only is None or len(names) > 1):
        raise SidelightError(f"--data adapts one guard. Name it: --only {' or '.join(names)}.")
    from pydantic import Json

    from sidelight.manifest import holds_probe, require_free, require_name
    from sidelight.thresholds import ThresholdRule

    rule = ThresholdRule.parse(threshold)
    for name in names:
        require_name(name)
        check_folder(out / name)
    options.announce("Reading the texts")
    from sidelight.training import ready

    part = "" if data is None else f",{data}"
    texts = {name: ready.load_guard(name, part) for name in names}
    if rows is not None:
        texts = {name: draw_texts(whole, rows) for name, whole in texts.items()}
    options.announce("Loading the model")
    from sidelight.artifact import load_probe
    from sidelight.cli.show import print_fit
    from sidelight.smollm2 import cache_root
    from sidelight.training.background import Background, load_background
    from sidelight.training.classifier import Classifier
    from sidelight.training.fit import fit
    from sidelight.training.settings import FitOptions
    from sidelight.training.traffic import kept_rate

    backbone = runtime.load_backbone()
    click.get_current_context().with_resource(only_writer(out))
    figures = dict[str, dict[str, Any]]()
    if (path := out / "figures.json").exists():
        kind = Json[dict[str, dict[str, Any]]]
        figures = checked(kind, path.read_text("utf-8"), f"Cannot read {path}")
    whole = {name: len(own) for name, own in texts.items()}
    if rows is None:
        texts = {name: ready.affordable(backbone, own) for name, own in texts.items()}
    # One folder for all guards, in which a killed run finds what it has computed.
    states = cache_root() / f"guards-{sha256(str(out.resolve()).encode()).hexdigest()[:12]}"
    common = FitOptions(threshold=rule, cache_root=states, keep_cache=True)
    done = {name: ready.is_trained(out / name, backbone, texts[name], rule) for name in names}
    for name in names:
        require_free(out / name, force=force or done[name])
    traffic = load_background("packaged")
    shared = ready.background_states(backbone, traffic)
    for number, (name, card) in enumerate(cards.items(), 1):
        count = f"{len(texts[name]):,}"
        if rows is None and len(texts[name]) < whole[name]:
            count += f" of {whole[name]:,} (--rows {whole[name]} takes all)"
        click.echo(f"\n{name} ({number} of {len(names)}): {count} texts")
        if done[name]:
            click.echo(f"{out / name} is complete, of these texts, options and model.")
        else:
            fit_options = replace(
                common,
                reads=replace(common.reads, side=card.reads),
                background=Background() if card.labels is None else traffic,
            )
            made = fit(backbone, texts[name], None, name=name, options=fit_options, out=out / name)
            options.warn(dict.fromkeys((*texts[name].warnings, *made.warnings)))
            print_fit(made)
        for file in states.glob("*/*.safetensors"):
            if file.stem not in shared:
                file.unlink()
        probe = load_probe(out / name)
        if figures.get(name, {}).get("version") != probe.version:
            figures[name] = {
                "version": probe.version,
                "left_out": probe.record["validation"]["metrics"],
                "sources": probe.history.validation.sources,
                "traffic": kept_rate(probe),
                "tests": ready.measure_tests(Classifier(backbone, probe), name, texts[name]),
            }
            write_json(path, figures)
        for test in figures[name]["tests"].values():
            click.echo(_line(test))
    shutil.rmtree(states, ignore_errors=True)
    # Also those of earlier runs, if this model can serve them.
    probes = [load_probe(out / name) for name in figures if holds_probe(out / name)]
    digest = backbone.fingerprint.digest
    probes = [probe for probe in probes if probe.fingerprint.digest == digest]
    if (policy := out / "policy.toml").exists():
        click.echo(f"{policy} was there, and stays as it is.")
        options.warn(_policy_doubts(policy, probes))
    else:
        write_text(policy, ready.observing_policy(probes))
    words = ["--model", runtime.model] if runtime.model else []
    words += [word for probe in probes for word in ("--probe", str(out / probe.name))]
    command = shlex.join(["sidelight", "serve", *words, "--policy", str(policy)])
    click.echo(f"Figures: {path}. Next: {command}")


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
