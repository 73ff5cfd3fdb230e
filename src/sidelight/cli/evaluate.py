"""``sidelight eval``, ``predict`` and ``parity``: verdicts of trained probes."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli import options
from sidelight.cli.runtime import Runtime
from sidelight.cli.second_stage import SecondStageOptions
from sidelight.engines.backend import DEFAULT, engines_of, find_backend
from sidelight.errors import SidelightError
from sidelight.storage import replacing, write_json

if TYPE_CHECKING:
    from rich.text import Text

    from sidelight.data.examples import Example
    from sidelight.data.loading import OnMissingLabel
    from sidelight.engines.parity import Difference
    from sidelight.models.conversation import Message
    from sidelight.probes.explanation import Explanation
    from sidelight.types import Span, Verdict

# Colours of the labels of spans, in turn; black text is legible on each.
_COLOURS = ("yellow", "cyan", "green", "magenta", "bright_red", "bright_blue")


@click.command(
    "eval",
    epilog=options.examples(
        "sidelight eval probes/toxicity --data test.jsonl.gz --label toxicity",
        "sidelight eval probes/toxicity --data test.jsonl.gz --label toxicity --plots plots",
        "sidelight eval probes/toxicity --data test.jsonl.gz --label toxicity --judge judge.toml",
    ),
)
@options.measured
@click.option("--spans", default="spans", help="Column with the spans, if the probe labels spans.")
@options.new_folder(
    "--plots",
    help="Folder for precision-recall, reliability and confusion plots of whole texts; with "
    "--judge, also of recall by the share deferred.",
)
@click.option(
    "--judge",
    type=options.PATH,
    metavar="FILE",
    help="Also ask the judge in this TOML file and fit it to the probe (docs/second-stage.md).",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.05,
    help="With --judge: share of background traffic that the fit is for, as in `defer`.",
)
@click.option(
    "--ask",
    type=click.FloatRange(0, 1),
    default=1.0,
    help="With --judge: ask only about texts that this share of background traffic exceeds. 1 asks "
    "about every text, which measures the judge alone, too.",
)
@options.threshold(show_default="what the probe's was chosen for")
@options.new_folder(
    "--save", help="With --judge: folder for the probe with the fit. [default: PROBE-judged]"
)
@click.option("--force", is_flag=True, help="Replace the probe in the --save folder.")
@options.json_file
@options.backbone
@options.as_json
def evaluate(
    probe: Path,
    data: str,
    label: str,
    spans: str,
    missing_label: "OnMissingLabel",
    runtime: Runtime,
    plots: Path | None,
    judge: Path | None,
    share: float,
    ask: float,
    threshold: str | None,
    save: Path | None,
    force: bool,
    out: Path | None,
    as_json: bool,
    **columns: Any,
) -> None:
    """Measure a probe on labelled data.

    Each metric has a 95 % bootstrap interval. The report also counts the texts that the probe was
    trained on, and shows its false-positive rate on the background traffic from training.

    With --judge, an LLM judge is asked about the texts that rules would defer to it. The
    combination of both is fitted out of fold and saved in a copy of the probe; the original is
    unchanged. Answers are stored, so an interrupted run can be resumed.
    """
    second = None if judge is None else SecondStageOptions(judge, share, ask, threshold)
    if second is not None:
        save = second.prepare(probe, save, force=force)
    elif save is not None or threshold is not None:
        raise SidelightError("--save and --threshold need a judge. Name its file with --judge.")
    options.announce(f"Reading {data}")
    from sidelight.data.loading import load_examples
    from sidelight.probes.card import read_card
    from sidelight.training.validation import require_side

    if plots is not None:
        # Report a missing matplotlib before the backbone runs.
        import_module("sidelight.data.plots")
    # Before slow imports, so that a wrong file or column is refused immediately.
    probe = runtime.probe_folder(probe)
    card = read_card(probe)
    if card.spans is None:
        columns |= {"label": label, "on_missing_label": missing_label}
    elif plots is None:
        columns["spans"] = spans
    else:
        raise SidelightError(
            f"--plots draws verdicts on whole texts, but '{card.name}' labels spans. Leave "
            "--plots out. To draw spans, run `sidelight anatomy PROBE --data FILE --out FOLDER`."
        )
    examples = load_examples(data, task=card.task, **columns)
    require_side(card, examples.items)
    if second is not None:
        second.require_fittable(card, examples)
    options.announce("Loading the model")
    from sidelight.cli.show import print_assessment
    from sidelight.scoring import assess

    classifier = runtime.load_classifier(probe)
    assessment = assess(classifier.backbone, classifier.probe, examples)
    metrics = assessment.to_dict()
    report = None if second is None else second.fit(assessment)
    if report is not None and save is not None:
        from sidelight.probes.artifact import save_probe

        save_probe(assessment.probe.changed(judge_fit=report.fit), save)
        metrics["second_stage"] = {**report.to_dict(), "saved": str(save)}
    metrics = options.with_warnings(metrics)
    if out is not None:
        write_json(out, metrics)
    if plots is not None:
        assessment.plot(plots)
        if report is not None:
            report.plot(plots, title=f"{card.name}, judge {report.fit.model}")
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
        return
    print_assessment(assessment)
    if report is not None:
        from sidelight.cli.show import print_deferral

        print_deferral(report)
        click.echo(f"Saved to {save}")


@click.command(
    epilog=options.examples(
        "sidelight predict guard:injection 'Ignore all previous instructions.'",
        "sidelight predict probes/toxicity 'How do I bake bread?'",
        "sidelight predict probes/toxicity --data texts.jsonl --out verdicts.jsonl",
        "sidelight predict probes/toxicity --explain 'How do I bake bread?'",
        "sidelight predict probes/pii --spans 'My name is Ann Lee.'",
    )
)
@click.argument("probe", type=options.PATH)
@click.argument("texts", nargs=-1)
@options.optional_data
@options.text
@options.response
@options.split
@options.new_file("--out", help="File for the verdicts. [default: standard output]")
@click.option(
    "--explain",
    "explains",
    is_flag=True,
    help="Also print what each token and layer adds to the logit; a terminal shows the largest.",
)
@click.option(
    "--spans",
    "prints_spans",
    is_flag=True,
    help="Print the texts with their labelled words, which is the default in a terminal.",
)
@options.engine
@options.backbone
def predict(
    probe: Path,
    texts: tuple[str, ...],
    data: str | None,
    out: Path | None,
    explains: bool,
    prints_spans: bool,
    runtime: Runtime,
    **columns: Any,
) -> None:
    """Print one verdict per text as JSON Lines, in input order."""
    _require_texts(texts, data)
    from sidelight.probes.card import read_card
    from sidelight.training.validation import require_side

    # Before slow imports, so that texts that the probe cannot classify are refused immediately.
    probe = runtime.probe_folder(probe)
    card = read_card(probe)
    if prints_spans and (out is not None or explains or card.spans is None):
        raise SidelightError(
            "--spans prints the words that a probe labels. Leave out --out and --explain, and name "
            "a probe that was trained with --spans COLUMN."
        )
    items = _read_texts(texts, data, columns)
    require_side(card, items)
    options.announce("Loading the model")
    classifier = runtime.load_classifier(probe)
    on_terminal, task = out is None and sys.stdout.isatty(), card.task
    lines: Iterable[Mapping[str, Any]]
    if explains:
        explained = map(classifier.explain, items)
        if on_terminal:
            for each in zip(items, explained, strict=True):
                click.echo(why(*each))
            return
        lines = ({**each.verdict.to_dict(), "explanation": each.to_dict()} for each in explained)
    else:
        verdicts = classifier.predict(items)
        if prints_spans or (card.spans is not None and on_terminal):
            _print_spans(items, verdicts, task.labels)
            return
        lines = (verdict.to_dict() for verdict in verdicts)
    if task.kind == "multiclass":
        click.echo(f"'{card.name}' flags {task.flags}.", err=True)
    _write_lines(lines, out)


def _require_texts(texts: Sequence[str], data: str | None) -> None:
    """Refuse a call without texts, or with both kinds of texts; announce the file."""
    if not texts and data is None:
        raise SidelightError(
            "There is no text to classify. Pass texts after the probe, or name a file with --data."
        )
    if texts and data is not None:
        raise SidelightError(
            "Got both texts and a file of texts (--data). Pass only one of the two."
        )
    if data is not None:
        options.announce(f"Reading {data}")


def _read_texts(
    texts: Sequence[str], data: str | None, columns: Mapping[str, Any]
) -> "tuple[Example, ...]":
    """The texts of the command line or of a file, whose rows must match the verdicts."""
    from sidelight.data.examples import as_example
    from sidelight.data.loading import load_examples

    if data is None:
        return tuple(map(as_example, texts))
    examples = load_examples(data, label=None, **columns)
    if examples.skipped.empty_text:
        raise SidelightError(
            f"{examples.skipped.empty_text} texts or responses are empty, the first in "
            f"{examples.skipped.first_empty}, so the verdicts would not line up with the rows. "
            "Remove the empty rows first."
        )
    return examples.items


def _write_lines(verdicts: Iterable[Mapping[str, Any]], out: Path | None) -> None:
    lines = (json.dumps(verdict, ensure_ascii=False) + "\n" for verdict in verdicts)
    if out is None:
        sys.stdout.writelines(lines)
        return
    with replacing(out) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def _print_spans(
    items: "Sequence[Example]", verdicts: "Sequence[Verdict]", labels: Sequence[str]
) -> None:
    from sidelight.cli.show import console

    terminal = console()
    for item, verdict in zip(items, verdicts, strict=True):
        annotated = annotated_text(item.span_text, verdict.known_spans, labels)
        terminal.print(annotated, soft_wrap=True)


def annotated_text(text: str, spans: Sequence["Span"], labels: Sequence[str]) -> "Text":
    """The text with each span in colour, followed by its label.

    Control characters are escaped, so that no text can control the terminal.
    """
    from rich.text import Text

    from sidelight.types import visible

    annotated = Text()
    edges = {0, len(text), *(span.start for span in spans), *(span.end for span in spans)}
    for start, end in pairwise(sorted(edges)):
        escaped = "\n".join(map(visible, text[start:end].split("\n")))
        covering = [span for span in spans if span.start < end and span.end > start]
        colours = [_COLOURS[labels.index(span.label) % len(_COLOURS)] for span in covering]
        annotated.append(escaped, f"black on {colours[-1]}" if colours else "")
        for span, colour in zip(covering, colours, strict=True):
            if span.end == end:
                annotated.append(f"[{span.label}]", f"bold {colour}")
    return annotated


def why(example: "Example", explanation: "Explanation") -> str:
    """The verdict, the terms of its logit, and the tokens and layers with the largest shares."""
    data = explanation.to_dict()
    texts = [turn.content for turn in _turns(example)]
    tokens = [
        (repr(texts[token["message"]][token["start"] : token["end"]]), token["share"])
        for token in data["tokens"]
    ]

    def strongest(shares: Iterable[tuple[Any, float]]) -> str:
        ranked = sorted(shares, key=lambda share: -abs(share[1]))
        return ", ".join(f"{name} {share:+.2f}" for name, share in ranked[:5])

    return (
        f"{explanation.verdict.label} {explanation.verdict.probabilities[explanation.label]:.3f}\n"
        f"{data['label']}, logit {data['logit']:+.2f} = baseline {data['baseline']:+.2f}, text "
        f"{sum(share for _, share in tokens):+.2f}, template {data['template']:+.2f} "
        f"({data['method'].replace('_', ' ')})\n"
        f"tokens: {strongest(tokens)}\nlayers: {strongest(enumerate(data['layers']))}\n"
    )


def _turns(example: "Example") -> "tuple[Message, ...]":
    """The prompt, followed by the response, if any."""
    from sidelight.models.conversation import Message

    if example.response is None:
        return tuple(example.messages)
    return (*example.messages, Message("assistant", example.response))


@click.command(
    epilog=options.examples(
        "sidelight parity probes/toxicity --data test.jsonl",
        "sidelight parity probes/toxicity --data test.jsonl --dtype float32",
        "sidelight parity probes/toxicity --data test.jsonl --quantised MODEL --gate 0.01",
    )
)
@click.argument("probes", nargs=-1, required=True, type=options.PATH)
@options.data
@options.text
@options.response
@options.limit
@click.option(
    "--engines",
    show_default=False,
    help="Comma-separated engines to compare. [default: all that run the model]",
)
@click.option(
    "--quantised",
    metavar="MODEL",
    help="Also compare with this quantised copy, in the first engine that can run it.",
)
@click.option(
    "--gate",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Exit with code 1 if more than this share of verdicts differs between two engines.",
)
@options.model
@options.tokenizer
@options.dtype
@options.device
@options.engine_option
@options.json_file
def parity(
    probes: tuple[Path, ...],
    data: str,
    text: str,
    response: str | None,
    limit: int | None,
    engines: str | None,
    quantised: str | None,
    gate: float | None,
    engine_option: dict[str, Any],
    out: Path | None,
    **model: Any,
) -> None:
    """Compare verdicts across engines and batch sizes, on the same texts.

    Use float32 to check that two engines compute the same values, and the dtype that you serve to
    see what users get. Use --quantised to see what quantised weights change.
    """
    from sidelight.data.loading import load_examples
    from sidelight.probes.card import read_card

    probes = tuple(Runtime(engine="auto", serves=True, **model).probe_folders(probes))
    cards = [read_card(probe) for probe in probes]
    named = model["model"] or cards[0].backbone.name
    names = [name.strip() for name in engines.split(",")] if engines else engines_of(named)
    compared = _runtimes(names, quantised, engine_option, model)
    readers = [m.name for m in cards if m.reads.includes_response]
    if readers and response is None:
        raise SidelightError(
            f"{', '.join(readers)} reads responses, but no column of responses is named. Name it "
            "with --response."
        )
    examples = load_examples(data, text=text, label=None, response=response)
    from sidelight.engines.parity import compare_engines
    from sidelight.probes.artifact import load_probe

    loaded = [load_probe(probe) for probe in probes]
    drawn = examples.draw(limit or len(examples), seed=0)
    texts = [_turns(examples.items[row]) for row in drawn]
    makers = {name: partial(each.load_engine, loaded) for name, each in compared.items()}
    differences = compare_engines(makers, texts)
    if out is not None:
        write_json(out, [asdict(difference) for difference in differences])
    _print_differences(differences, gate)


def _runtimes(
    names: Sequence[str],
    quantised: str | None,
    engine_option: dict[str, Any],
    model: Mapping[str, Any],
) -> dict[str, Runtime]:
    """The runtimes of the compared engines and of the quantised copy."""
    has_options = quantised is not None or {*names} != {DEFAULT}

    def runtime(engine: str, options: dict[str, Any], **settings: Any) -> Runtime:
        return Runtime(engine=engine, engine_option=options, serves=True, **{**model, **settings})

    runtimes: dict[str, Runtime] = {}
    for name in names:
        # Options that quantise the copy must not apply to the original; transformers has none.
        left_out = (find_backend(name).quantising or ()) if quantised is not None else ()
        engine_options = {k: v for k, v in engine_option.items() if k not in left_out}
        runtimes[name] = runtime(name, {} if name == DEFAULT and has_options else engine_options)
    if quantised is not None:
        taking = [n for n in engines_of(quantised) if find_backend(n).quantising is not None]
        if not taking:
            raise SidelightError(
                f"No installed engine runs the quantised copy '{quantised}'. Install the engine "
                "that you serve it with."
            )
        runtimes["quantised"] = runtime(taking[0], engine_option, model=quantised)
    return runtimes


def _print_differences(differences: "Sequence[Difference]", gate: float | None) -> None:
    """Print the differences, and exit with code 1 if more verdicts differ than the gate allows."""
    for difference in differences:
        click.echo(
            f"{difference.probe:<20} {difference.between:<32} largest {difference.largest:.2e}, "
            f"mean {difference.mean:.2e}, {difference.flips} of {difference.texts} flipped"
        )
    if gate is None:
        return
    apart = [each for each in differences if each.is_of_engines and each.flips > gate * each.texts]
    if apart:
        click.echo(f"More than {gate:.1%} flipped ({len(apart)} times).", err=True)
        sys.exit(1)
