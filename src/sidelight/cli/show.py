"""Figures of trainings and measurements, for a terminal."""

import sys
from collections.abc import Mapping

import click
from rich.console import Console
from rich.table import Table

from sidelight.evaluation import Report
from sidelight.training.fit import Fit

_METRICS = ("auprc", "auroc", "f1", "accuracy", "macro_f1", "recall_at_1pct_fpr", "ece")
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
        values = [report.metrics[metric].value for metric in _METRICS]
        table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
    console().print(table)


def print_fit(made: Fit) -> None:
    """The figures of a training on validation data and in ordinary traffic."""
    spec, folds = made.probe.spec, made.probe.record["folds"]
    if made.spans is not None:
        console().print(made.spans.table())
        click.echo(f"Tokens that it looks ahead: {spec.options['lookahead']}.")
    else:
        title = f"All texts, each judged without it ({folds} folds)" if folds else "Validation data"
        baseline = {} if made.baseline is None else {"TF-IDF baseline": made.baseline}
        print_reports(title, {spec.name: made.report, **baseline})
    if made.traffic is not None and made.traffic.conversations:
        click.echo(made.traffic)
