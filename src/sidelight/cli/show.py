"""Figures of trainings and measurements, for a terminal."""

import sys
from collections.abc import Mapping

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sidelight.evaluation import Report, SpanReport
from sidelight.metrics import wilson
from sidelight.training.fit import Fit
from sidelight.training.judging import Assessment
from sidelight.training.traffic import Traffic, kept_rate
from sidelight.types import visible

_METRICS = ("auprc", "auroc", "f1", "accuracy", "macro_f1", "recall_at_1pct_fpr", "ece")
# Fewer conversations say no rate.
_FEWEST = 100
# The width of a table that is not shown in a terminal.
_WIDTH = 110


def console() -> Console:
    """A console for tables, as wide as the terminal or wide enough for a log."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def print_reports(title: str, reports: Mapping[str, Report]) -> None:
    """A line for each report, by its name."""
    table = Table(title=title, title_justify="left")
    table.add_column("probe")
    for metric in _METRICS:
        table.add_column(metric.replace("recall_at_1pct_fpr", "rec@1%fpr"), justify="right")
    for name, report in reports.items():
        table.add_row(name, *(_number(report.metrics[metric].value) for metric in _METRICS))
    console().print(table)


def print_fit(made: Fit) -> None:
    """The figures of a training on validation data and in ordinary traffic."""
    spec, folds = made.probe.spec, made.probe.history.folds
    if made.spans is not None:
        print_spans(made.spans)
        click.echo(f"Tokens that it looks ahead: {made.probe.mechanism.lookahead}.")
    else:
        title = f"All texts, each judged without it ({folds} folds)" if folds else "Validation data"
        baseline = {} if made.baseline is None else {"TF-IDF baseline": made.baseline}
        print_reports(title, {spec.name: made.report, **baseline})
    if sources := made.probe.history.validation.sources:
        print_sources(sources)
    if made.traffic is not None and made.traffic.conversations:
        click.echo(traffic_lines(made.traffic, abstains=made.probe.task.abstains))


def print_sources(sources: Mapping[str, Mapping[str, int]]) -> None:
    """The texts found and flagged of each source, among those that did not train the probe."""
    table = Table(title="By source", title_justify="left")
    table.add_column("source")
    for name in ("found", "falsely flagged"):
        table.add_column(name, justify="right")
    for source, counts in sources.items():
        pairs = (("found", "positives"), ("flagged", "others"))
        shown = [
            f"{counts[part]} of {counts[whole]}" if counts[whole] else "" for part, whole in pairs
        ]
        table.add_row(Text(visible(source)), *shown)
    console().print(table)


def print_assessment(assessment: Assessment) -> None:
    """The figures on labelled rows; of whole texts also what decides, and mistakes."""
    if assessment.spans is not None:
        print_spans(assessment.spans)
        print_report(assessment.report)
        return
    probe = assessment.probe
    click.echo(f"\n'{probe.name}', {probe.spec.name}")
    print_report(assessment.report)
    for label, threshold in probe.label_thresholds.items():
        click.echo(f"Threshold of '{label}': {threshold:.3f}")
    flagged, conversations = kept_rate(probe)
    if conversations:
        click.echo(rate_sentence(flagged, conversations, abstains=probe.task.abstains))
    elif probe.thresholds:
        click.echo(
            "The probe keeps no figures of ordinary traffic: it was trained without background."
        )
    if mistakes := assessment.mistakes:
        click.echo("Wrong decisions, the farthest from the threshold first:")
        for label, is_missed, probability, text in mistakes:
            click.echo(
                f"  {'missed' if is_missed else 'wrongly'} '{label}' {probability:.2f}  {text}"
            )


def print_report(report: Report) -> None:
    """The metrics, then the labels."""
    metrics = Table(title=f"{report.rows:,} rows, {report.task.kind}", title_justify="left")
    metrics.add_column("metric")
    metrics.add_column("value [95 % interval]")
    for name, estimate in report.metrics.items():
        metrics.add_row(name, str(estimate))
    labels = Table()
    labels.add_column("label")
    for name in ("precision", "recall", "f1", "auprc", "auroc", "rows"):
        labels.add_column(name, justify="right")
    for label, figures in report.per_class.items():
        *numbers, support = figures.values()
        labels.add_row(Text(label), *map(_number, numbers), f"{support:,}")
    console().print(metrics, labels)


def print_spans(report: SpanReport) -> None:
    """A line for all labels and for each."""
    table = Table(title=f"Spans in {report.texts:,} texts", title_justify="left")
    table.add_column("label")
    for name in (*report.metrics, "spans"):
        table.add_column(name.replace("_", " "), justify="right")
    is_several = len(report.spans) > 1
    lines = {"all": report.metrics, **report.per_label} if is_several else report.per_label
    for label, own in lines.items():
        count = report.spans.get(label, sum(report.spans.values()))
        table.add_row(Text(label), *map(str, own.values()), f"{count:,}")
    console().print(table)
    spans, whole, in_part = (
        sum(counts.values()) for counts in (report.spans, report.whole, report.in_part)
    )
    click.echo(
        f"Of {spans:,} labelled spans, {whole:,} were found whole, {in_part:,} in part and "
        f"{spans - whole - in_part:,} not at all."
    )


def traffic_lines(traffic: Traffic, *, abstains: bool) -> str:
    """The lines on what a probe flags of ordinary traffic, and finds inside it."""
    lines = [rate_sentence(traffic.flagged, traffic.conversations, abstains=abstains)]
    if traffic.conversations >= _FEWEST:
        counts = [
            f"{kind['name']} {kind['flagged'] / kind['conversations']:.1%} "
            f"of {kind['conversations']}"
            for kind in traffic.kinds
            if kind["conversations"]
        ]
        lines.append(f"By length and turns: {'; '.join(counts)}.")
    lines += [
        "Your positive texts inside up to {words} words of other text: {found} of {positives} "
        "found. Other text of that length: {flagged} of {ordinary} flagged.".format(**counts)
        for counts in traffic.surroundings
        if counts["positives"] and counts["ordinary"]
    ]
    if traffic.worst:
        lines.append("Ordinary conversations with the highest probabilities:")
        lines += [f"  {probability:.2f}  {text}" for probability, text in traffic.worst]
    return "\n".join(lines)


def rate_sentence(flagged: int, conversations: int, *, abstains: bool) -> str:
    """The sentence on ordinary conversations that are flagged, or given a class; no rate of few."""
    if conversations < _FEWEST:
        return (
            f"It was judged on {conversations} ordinary conversations, too few to say which share "
            "of them it flags. Train it with more: sidelight train --set context_tokens=N, and "
            "--data guard:NAME for a ready guard."
        )
    does = "it gives another class than 'none' to" if abstains else "it flags"
    lowest, highest = wilson(np.array([flagged / conversations]), np.array([conversations]))
    return (
        f"Of {conversations} ordinary conversations of sources that set neither the probe nor its "
        f"threshold, {does} {flagged / conversations:.1%} (95 % interval {lowest[0]:.1%} to "
        f"{highest[0]:.1%})."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
