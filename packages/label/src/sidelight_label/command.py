"""``sidelight label``: label texts in the browser, and train a probe at the same time."""

import secrets
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli import options
from sidelight.cli.runtime import Runtime
from sidelight.errors import SidelightError

if TYPE_CHECKING:
    from sidelight_label.queue import LabelQueue
    from sidelight_label.review import Review


@click.command(
    epilog=options.examples(
        "sidelight label texts.jsonl --labels fine,toxic",
        "sidelight label texts.jsonl --probe probes/toxicity",
        "sidelight label texts.jsonl --labels billing,refund,other --out labels/intent.jsonl",
        "sidelight label chats.jsonl --response answer --labels helped,refused",
        "sidelight label texts.jsonl --labels other,refund --criterion refund.md --judge it.toml",
    )
)
@click.argument("texts")
@click.option(
    "--probe",
    "probes",
    type=options.PATH,
    multiple=True,
    help="Probe folder; its labels are used and the texts that it is least certain about come "
    "first. May be repeated; texts on which the probes disagree then come early, too.",
)
@click.option(
    "--labels", help="Comma-separated labels. If there are two, the probe flags the second."
)
@click.option("--multilabel", is_flag=True, help="A text may have several labels, or none.")
@click.option(
    "--criterion",
    type=options.PATH,
    help="Markdown file with the labelling rule in English, for people and for --judge. The page "
    "shows it and lets you edit it.",
)
@click.option(
    "--judge",
    type=options.PATH,
    help="TOML file with a judge, in the keys of [judges.NAME] in a policy: an LLM that labels "
    "the texts by --criterion once a person has checked a sample. It decides whether a text "
    "has the second label.",
)
@click.option(
    "--judge-limit",
    type=options.AT_LEAST_ONE,
    help="Maximum number of texts that the judge labels. [default: all]",
)
@click.option(
    "--price",
    type=click.FloatRange(min=0),
    help="Judge's price per million input tokens, to show the cost.",
)
@options.text
@click.option("--label", default="label", help="Column for the label in --out.")
@options.response
@options.split
@options.new_file(
    "--out",
    help="File (.jsonl) to append labels to; existing rows count. [default: TEXTS-labels.jsonl]",
)
@options.new_folder(
    "--probe-out",
    help="Folder for the latest probe. [default: the name of --out without extension, followed by "
    "-probe]",
)
@options.limit
@click.option(
    "--memory",
    type=click.FloatRange(min=0.01),
    default=1.0,
    metavar="GIB",
    help="Maximum memory for hidden states, besides the model.",
)
@click.option("--cache", type=options.PATH, help="Folder for hidden states. [default: the user's]")
@options.free_port
@options.backbone
def label(
    texts: str,
    probes: tuple[Path, ...],
    labels: str | None,
    multilabel: bool,
    criterion: Path | None,
    judge: Path | None,
    judge_limit: int | None,
    price: float | None,
    text: str,
    label: str,
    response: str | None,
    split: str | None,
    out: Path | None,
    probe_out: Path | None,
    limit: int | None,
    memory: float,
    cache: Path | None,
    port: int,
    runtime: Runtime,
) -> None:
    """Label texts in the browser, and train a probe on the labels as you go.

    Texts on which the probe is least certain come first; without one, they come in random order
    until there are five of each label. Each label is appended to --out, which 'sidelight train'
    reads, before the next text is shown. To resume, run the same command again.

    With --judge, an LLM labels some texts first, and the page starts with a blind sample of them.
    If you agree with the judge on enough of this sample, it can label the rest.

    The page is reachable only from this machine, by anyone who has the printed address.
    """
    if bool(probes) == (labels is not None):
        raise SidelightError(
            "Name either the labels with --labels, such as --labels fine,toxic, or a probe with "
            "these labels with --probe."
        )
    if multilabel and labels is None:
        raise SidelightError(
            "--multilabel needs --labels; with --probe, the task comes from the probe. Leave "
            "--multilabel out."
        )
    if label in (text, response):
        raise SidelightError(
            f"The column '{label}' contains texts, which the labels would replace. Name another "
            "column with --label."
        )
    if judge is None and (judge_limit is not None or price is not None):
        raise SidelightError(
            "--judge-limit and --price need --judge. Add --judge, or leave them out."
        )
    # Before slow imports, so that a wrong file or column is refused immediately.
    from sidelight.data.annotators import LABELLED, JudgeLabel
    from sidelight.data.loading import load_examples
    from sidelight.judges.settings import read_judge
    from sidelight_label.file import Criterion, ReviewFile

    rule = Criterion(criterion) if criterion is not None else None
    settings = read_judge(judge, rule.text if rule else None) if judge is not None else None
    if settings is not None:
        # A missing key is reported immediately.
        settings.key()

    examples = load_examples(texts, text=text, label=None, response=response, split=split)
    if any(LABELLED in row and not JudgeLabel.has_cell(row) for row in examples.rows):
        raise SidelightError(
            f"The column name '{LABELLED}' in {texts} is reserved for describing judges' labels. "
            "Rename the column."
        )
    if limit is not None:
        examples = examples.select(examples.draw(limit, seed=0))
    import uvicorn

    from sidelight.models.conversation import Reads
    from sidelight.probes.artifact import load_probe
    from sidelight.probes.card import require_distinct_names
    from sidelight.probes.probe import common_format
    from sidelight.server.app import listen, server_settings
    from sidelight.server.config import read_config
    from sidelight.training.settings import FitOptions
    from sidelight.training.validation import require_side
    from sidelight_label.app import create_app
    from sidelight_label.file import LabelFile
    from sidelight_label.pool import Pool, merged
    from sidelight_label.queue import LabelQueue, require_replaceable, shuffled, task_of
    from sidelight_label.review import Review

    loaded = [load_probe(folder) for folder in runtime.probe_folders(probes)]
    require_distinct_names([probe.name for probe in loaded])
    for probe in loaded:
        require_side(probe.card, examples.items)
    names = [name.strip() for name in (labels or "").split(",") if name.strip()]
    task = loaded[0].task if loaded else task_of(names, is_multilabel=multilabel)
    if settings is not None and task.kind != "binary":
        raise SidelightError(
            "A judge answers yes or no, so it needs exactly two labels. Name two with --labels; "
            "the second is the label that meets the criterion."
        )
    reads = loaded[0].reads if loaded else Reads("response" if response else "prompt")
    stem = Path(Path(texts).name.removesuffix(".gz")).stem.replace(":", "-")
    path = out or Path(f"{stem}-labels.jsonl")
    folder = probe_out or path.with_name(f"{path.stem}-probe")
    # A browser keeps its connection open.
    config = read_config(port=port, log_level="warning", drain_s=1)
    with listen(config) as listener:
        positive = task.labels[-1]

        def is_classified(row: Mapping[str, Any]) -> bool:
            is_positive = row.get(label) == positive
            return JudgeLabel.of(row, is_positive=is_positive) is not None

        file = LabelFile(path, is_classified if settings is not None else None)
        require_replaceable(folder, file)
        labelled = None
        if path.stat().st_size:
            labelled = load_examples(path, text=text, label=label, response=response, task=task)
        pool_examples, decided = merged(examples, labelled)
        if settings is not None and labelled is not None:
            people = [n for n, row in enumerate(labelled.rows) if not is_classified(row)]
            decided = merged(pool_examples, labelled.select(people))[1]
        runtime = replace(runtime, model=runtime.model_of(loaded))
        fit_options = FitOptions(
            reads=replace(reads, scope="conversation"),
            cache_root=cache,
            memory_bytes=int(memory * 2**30),
        )
        backbone = runtime.load_backbone(common_format(loaded))
        pool = Pool(backbone, pool_examples, task, fit_options, loaded)
        review = None
        if settings is not None:
            answers = ReviewFile(path.with_name(f"{path.stem}-judge.jsonl"))
            review = Review(
                pool,
                settings,
                rule,
                answers,
                shuffled=shuffled(pool_examples),
                limit=judge_limit,
                price=price,
            )
        queue = LabelQueue(
            pool,
            file,
            column=label,
            labelled=decided,
            folder=folder,
            criterion=rule,
            review=review,
        )
        if review is not None and review.gate(queue.people) is None:
            _ask_first(queue, review)
        token = secrets.token_urlsafe(32)
        address = f"http://{config.host}:{listener.getsockname()[1]}/#{token}"
        click.echo(f"{len(decided)} of {len(pool_examples)} texts are labelled in {path}.")
        click.echo(f"Label at {address} (Ctrl-C stops)")
        # uvicorn raises a SIGINT again once it has stopped.
        with suppress(KeyboardInterrupt):
            uvicorn.Server(server_settings(create_app(queue, token), config)).run([listener])
    queue.publish()
    count = len(queue.decided)
    click.echo(f"{count} texts are labelled in {path} ({count - len(decided)} in this session).")
    if review is not None:
        click.echo(f"{len(review.accepted(queue.people))} more have the judge's label.")
    command = ["sidelight", "train", "--data", str(path), "--out", f"{folder}-trained"]
    for option, value, default in (
        ("--text", text, "text"),
        ("--label", label, "label"),
        ("--response", response, None),
        ("--positive", task.labels[1] if task.kind == "binary" else None, None),
        ("--model", runtime.model, "smollm2"),
        ("--tokenizer", runtime.tokenizer, None),
    ):
        command += [] if value == default else [option, str(value)]
    if count:
        click.echo(f"Next: {shlex.join(command)}")


def _ask_first(queue: "LabelQueue", review: "Review") -> None:
    """Print the cost, then have the judge label the first texts."""
    people = queue.people
    first = review.cost(review.first_questions(people))
    click.echo(f"Judge {review.settings.model} labels a first part: {first}.")
    every = review.cost(review.rest())
    click.echo(f"All texts that it may label once you have checked a sample: {every}.")
    queue.ask()
