"""Terminal output of training and evaluation results.

The results of training and evaluation end with a one-sentence ``summary``.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import singledispatch

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sidelight.data.evaluation import Report, SpanReport
from sidelight.judges.fitting import DeferralPoint, DeferralReport
from sidelight.probes.card import DepthTrial
from sidelight.scoring import Assessment, SpanAssessment
from sidelight.statistics.background import Detections, Traffic
from sidelight.statistics.metrics import wilson
from sidelight.training.fit import Fit
from sidelight.types import NONE, Task, visible

_METRICS = ("auprc", "auroc", "f1", "accuracy", "macro_f1", "recall_at_1pct_fpr", "ece")
# With fewer conversations, no false-positive rate is given.
_FEWEST = 100
# Ways to decide on deferred texts, by their names in JSON.
_DECIDED_BY = {
    "probe": "Probe alone",
    "fit": "With the fit",
    "without a fit": "Judge alone on deferred texts",
}
# Width of a table outside a terminal.
_WIDTH = 110


def console() -> Console:
    """A console for tables, as wide as the terminal or wide enough for a log."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def print_reports(title: str, reports: Mapping[str, Report]) -> None:
    """Print a line for each report, with its name."""
    table = Table(title=title, title_justify="left")
    table.add_column("probe")
    for metric in _METRICS:
        table.add_column(metric.replace("recall_at_1pct_fpr", "rec@1%fpr"), justify="right")
    for name, report in reports.items():
        table.add_row(name, *(_number(report.metrics[metric].value) for metric in _METRICS))
    console().print(table)


def print_fit(result: Fit) -> None:
    """Print the metrics of training on held-out texts and background traffic."""
    spec, folds = result.probe.card.mechanism, result.probe.card.training.folds
    headline = result.report
    if result.spans is not None:
        headline = result.spans
        print_report(headline)
        click.echo(f"Lookahead: {result.probe.mechanism.lookahead} tokens")
    else:
        title = f"All texts, out of fold ({folds} folds)" if folds else "Validation data"
        baseline = {} if result.baseline is None else {"TF-IDF baseline": result.baseline}
        print_reports(title, {spec.name: result.report, **baseline})
    if depths := result.probe.card.training.depths:
        click.echo(depth_sentence(depths))
    if sources := result.probe.card.training.validation.sources:
        print_sources(sources)
    if result.traffic is not None and len(result.traffic.background):
        click.echo(traffic_lines(result.traffic, result.probe.task))
    click.echo(summary(headline, result.probe.card.training.flagged))


def depth_sentence(trials: Sequence[DepthTrial]) -> str:
    """A sentence on the depth of a probe and its effect on the loss."""
    deepest = trials[0]
    chosen = [trial for trial in trials if trial.is_accepted][-1]
    read = f"Depth: {chosen.layers} of {deepest.layers} hidden states"
    if chosen is deepest:
        tried = trials[-1]
        return (
            f"{read}. With {tried.layers}, log loss might rise by {tried.lost_at_most:.3f} from "
            f"{deepest.loss:.3f}."
        )
    return (
        f"{read}, where checks stop. Log loss {chosen.loss:.3f}, at full depth {deepest.loss:.3f} "
        f"(higher by {max(0.0, chosen.lost_at_most):.3f} at most, with 95 % confidence)."
    )


def print_sources(sources: Mapping[str, Detections]) -> None:
    """Print true and false positives by source, out of fold."""
    table = Table(title="By source", title_justify="left")
    table.add_column("source")
    for name in ("found", "false positives"):
        table.add_column(name, justify="right")
    for source, counts in sources.items():
        pairs = ((counts.found, counts.positives), (counts.flagged, counts.negatives))
        cells = [f"{count} of {total}" if total else "" for count, total in pairs]
        table.add_row(Text(visible(source)), *cells)
    console().print(table)


@singledispatch
def print_assessment(assessment: Assessment) -> None:
    """Print the metrics on labelled rows; for whole texts, also thresholds and the worst errors."""
    probe = assessment.probe
    click.echo(f"\n'{probe.name}', {probe.card.mechanism.name}")
    print_report(assessment.report)
    for label, threshold in probe.card.label_thresholds.items():
        click.echo(f"Threshold for '{label}': {threshold:.3f}")
    print_operating_points(assessment)
    flagged, conversations = probe.card.training.flagged
    if conversations:
        click.echo(rate_sentence(flagged, conversations, probe.task))
    elif probe.thresholds:
        click.echo(
            "False positives: unknown, because the probe was trained without background traffic."
        )
    if mistakes := assessment.mistakes:
        click.echo("Most confident errors:")
        for label, is_missed, probability, text in mistakes:
            error = "missed" if is_missed else "falsely"
            click.echo(f"  {error} '{label}' {probability:.2f}  {text}")
    click.echo(summary(assessment.headline, (flagged, conversations)))


@print_assessment.register
def _(assessment: SpanAssessment) -> None:
    print_report(assessment.headline)
    print_report(assessment.report)
    click.echo(summary(assessment.headline, assessment.probe.card.training.flagged))


def print_operating_points(assessment: Assessment) -> None:
    """Print alternative thresholds with their true and false positives on these rows."""
    if not (points := assessment.operating_points):
        return
    table = Table(title="Other thresholds on these rows", title_justify="left")
    for name in ("threshold", "found", "false positives"):
        table.add_column(name, justify="right")
    positives = int(assessment.examples.labels.sum())
    negatives = len(assessment.examples) - positives
    for point in points:
        found, flagged = f"{point.found} of {positives}", f"{point.flagged} of {negatives}"
        table.add_row(f"{point.threshold:.3f}", found, flagged)
    console().print(table)


def print_deferral(report: DeferralReport) -> None:
    """Print recall by the share of texts deferred to a judge, and the effect of the fit."""
    unanswered = f", excluding {report.unanswered} without an answer" if report.unanswered else ""
    title = f"Deferred to {report.fit.model}: {report.rows:,} texts{unanswered}, out of fold"
    table = Table(title=title, title_justify="left")
    table.add_column("share of background")
    for name in ("texts deferred", "recall at 1 % fpr [95 % interval]", "auprc"):
        table.add_column(name, justify="right")

    def add(name: str, point: DeferralPoint) -> None:
        deferred = f"{point.deferred:,} ({_percent(point.deferred / report.rows)})"
        table.add_row(name, deferred, str(point.recall_at_1pct_fpr), str(point.auprc))

    add("probe alone", report.probe)
    for point in report.points:
        if point.share is not None:
            fitted = ", saved" if point.share == report.fit.share else ""
            add("every text" if point.share == 1 else f"{point.share:g}{fitted}", point)
    if report.judge is not None:
        add("judge alone", report.judge)
    console().print(table)
    positives, negatives = report.positives, report.rows - report.positives
    for name, row in report.decisions.items():
        click.echo(
            f"{_DECIDED_BY[name]}: finds {row.found:,} of {positives:,}, flags {row.flagged:,} of "
            f"{negatives:,} others"
        )
    fit = report.fit
    click.echo(
        f"Fit: {fit.weight:.2f} * logit(probe) + {1 - fit.weight:.2f} * logit(judge) >= "
        f"{fit.threshold:.2f}, for defer.share = {fit.share:g} (--threshold {fit.threshold_rule})"
    )
    for finding in report.findings:
        click.echo(finding)


@singledispatch
def print_report(report: Report) -> None:
    """Print a table of the metrics, then one of the labels; for spans, a row for each label."""
    metrics = Table(title=f"{report.rows:,} rows, {report.task.kind}", title_justify="left")
    metrics.add_column("metric")
    metrics.add_column("value [95 % interval]")
    for name, estimate in report.metrics.items():
        metrics.add_row(name, str(estimate))
    labels = Table()
    labels.add_column("label")
    for name in ("precision", "recall", "f1", "auprc", "auroc", "rows"):
        labels.add_column(name, justify="right")
    for label, values in report.per_class.items():
        *numbers, support = values.values()
        labels.add_row(Text(label), *map(_number, numbers), f"{support:,}")
    console().print(metrics, labels)


@print_report.register
def _(report: SpanReport) -> None:
    table = Table(title=f"Spans in {report.texts:,} texts", title_justify="left")
    table.add_column("label")
    for name in (*report.metrics, "spans"):
        table.add_column(name.replace("_", " "), justify="right")
    lines = report.per_label
    if len(lines) > 1:
        lines = {"all": report.metrics, **lines}
    for label, values in lines.items():
        count = report.spans.get(label, sum(report.spans.values()))
        table.add_row(Text(label), *map(str, values.values()), f"{count:,}")
    console().print(table)


@singledispatch
def summary(report: Report, background: tuple[int, int]) -> str:
    """One sentence on true and false positives of a probe.

    Args:
        report: Metrics on texts that the probe was not trained on.
        background: Number of flagged background conversations, and their total; (0, 0) if unknown.
    """
    task, counts, rows = report.task, report.confusion_matrix, report.rows
    traffic = _background_share(*background)
    match task.kind:
        case "multiclass":
            named = f"; assigns a class other than '{NONE}' to {traffic}" if traffic else ""
            return f"Classifies {np.trace(counts):,} of {rows:,} texts correctly{named}."
        case "multilabel":
            ((_, false), (missed, found)) = counts.sum(0).tolist()
            flagged = f"; flags {traffic}" if traffic else ""
            return (
                f"Finds {found:,} of {found + missed:,} labels in {rows:,} texts and assigns "
                f"{false:,} wrongly{flagged}."
            )
        case "binary":
            ((passed, false), (missed, found)) = counts.tolist()
            # A test may have texts of only one label.
            positives, negatives = found + missed, passed + false
            finds = f"finds {found:,} of {positives:,} '{task.labels[1]}' texts"
            flags = [f"{false:,} of {negatives:,} other texts"] if negatives else []
            flags += [traffic] if traffic else []
            clauses = [finds] if positives else []
            clauses += [f"flags {' and '.join(flags)}"] if flags else []
            sentence = "; ".join(clauses)
            return f"{sentence[0].upper()}{sentence[1:]}."


@summary.register
def _(report: SpanReport, background: tuple[int, int]) -> str:
    del background
    spans, complete, partial = (
        sum(counts.values()) for counts in (report.spans, report.complete, report.partial)
    )
    precision = report.metrics["precision"].value
    exact = "" if precision is None else f"; {_percent(precision)} of the spans found are exact"
    return f"Finds {complete:,} of {spans:,} labelled spans whole and {partial:,} in part{exact}."


def _background_share(flagged: int, conversations: int) -> str:
    """A rate, or counts if there are too few conversations; "" without any."""
    if not conversations:
        return ""
    if conversations < _FEWEST:
        return f"{flagged} of {conversations} background conversations"
    return f"{_percent(flagged / conversations)} of background traffic"


def traffic_lines(traffic: Traffic, task: Task) -> str:
    """Lines on the false positives in background traffic and the embedded positives found."""
    conversations = len(traffic.background)
    lines = [rate_sentence(traffic.flagged, conversations, task)]
    if conversations >= _FEWEST:
        counts = [
            f"{kind} {_percent(counts.flagged / counts.negatives)} of {counts.negatives}"
            for kind, counts in traffic.kinds.items()
            if counts.negatives
        ]
        lines.append(f"By length and turns: {'; '.join(counts)}")
    lines += [
        f"Positives embedded in up to {words} words of other text: {counts.found} of "
        f"{counts.positives} found, {counts.flagged} of {counts.negatives} false positives"
        for words, counts in traffic.surroundings.items()
        if counts.positives and counts.negatives
    ]
    if traffic.worst:
        lines.append("Highest-scoring background conversations:")
        lines += [f"  {probability:.2f}  {text}" for probability, text in traffic.worst]
    return "\n".join(lines)


def rate_sentence(flagged: int, conversations: int, task: Task) -> str:
    """The false-positive rate on background traffic, or with few conversations, how to get one."""
    if conversations < _FEWEST:
        return (
            f"False positives: unknown, because {conversations} background conversations are too "
            "few to estimate a rate. Train with more of them: sidelight train --set "
            "context_tokens=N, with --data guard:NAME for a ready guard."
        )
    share = flagged / conversations
    ((low,), (high,)) = wilson(np.array([share]), np.array([conversations])).tolist()
    return (
        f"{task.background_errors}: {_percent(share)} of {conversations} conversations from "
        f"held-out sources (95 % CI {100 * low:.1f} to {_percent(high)})"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
