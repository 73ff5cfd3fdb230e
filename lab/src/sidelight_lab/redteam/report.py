"""What attacks on a probe gave: a table for a terminal or a model card, JSON, and a plot."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from sidelight_lab.redteam.measure import Outcome, Rate

if TYPE_CHECKING:
    from rich.console import Group

_HEAD = ("attack", "texts", "recall", "false alarms", "difference")


@dataclass(frozen=True)
class Evasion:
    """How a probe held out against attacks.

    Attributes:
        probe: Its name.
        version: Of its artifact.
        thresholds: The probability from which each label flags a text.
        data: Where the texts are from.
        seed: What drew them.
        budget: Texts that the search could have scored for each positive.
        outcomes: One for each attack.
        route: Of a live server, that of ``ROUTES``; blank: the probe itself was attacked.
    """

    probe: str
    version: str
    thresholds: Mapping[str, float]
    data: str
    seed: int
    budget: int
    outcomes: Sequence[Outcome]
    route: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            **({"route": self.route} if self.route else {}),
            "probe": self.probe,
            "version": self.version,
            "thresholds": dict(self.thresholds),
            "data": self.data,
            "seed": self.seed,
            "budget": self.budget,
            "attacks": [
                {
                    "attack": outcome.attack,
                    "recall_alone": _as_json(outcome.recall_alone),
                    "recall": _as_json(outcome.recall),
                    "false_alarms_alone": _as_json(outcome.alarms_alone),
                    "false_alarms": _as_json(outcome.alarms),
                    "recall_minus_false_alarms": outcome.separation,
                    "skipped": dict(outcome.skipped),
                    **({} if outcome.queries is None else {"queries": list(outcome.queries)}),
                }
                for outcome in self.outcomes
            ],
        }

    def table(self) -> "Group":
        """For a terminal: print it with `rich.print`."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self._title(), title_justify="left")
        for column in _HEAD:
            table.add_column(column, justify="left" if column == "attack" else "right")
        for outcome in self.outcomes:
            table.add_row(*_cells(outcome))
        return Group(table, *map(Text, self._notes()))

    def markdown(self) -> str:
        """The table with its notes."""
        rows = [_HEAD, ("---",) * len(_HEAD), *map(_cells, self.outcomes)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self._notes())]).rstrip() + "\n"

    def section(self) -> str:
        """Of a model card."""
        return (
            f"## Evasion\n\n{self._title()}. Seed {self.seed}; measured by `sidelight redteam` on "
            f"`{Path(self.data).name}`. Each cell says what is flagged alone → attacked, with "
            f"a 95 % interval; the difference is recall minus false alarms.\n\n{self.markdown()}"
        )

    def plot(self, path: Path) -> None:
        """Writes a PNG."""
        from sidelight.plots import plot_rates

        rates = {
            "recall": [(o.recall_alone, o.recall) for o in self.outcomes],
            "false alarms": [(o.alarms_alone, o.alarms) for o in self.outcomes],
        }
        plot_rates(
            [outcome.attack for outcome in self.outcomes],
            {
                name: [(alone.share, rate.share, rate.interval) for alone, rate in pairs]
                for name, pairs in rates.items()
            },
            path,
            title=self._title(),
        )

    def _title(self) -> str:
        flags = ", ".join(f"{label} from {least:.3f}" for label, least in self.thresholds.items())
        where = f" on the route '{self.route}'" if self.route else ""
        return f"'{self.probe}' under attack{where}; it flags {flags}"

    def _notes(self) -> Iterator[str]:
        for outcome in self.outcomes:
            for reason, count in outcome.skipped.items():
                yield f"{outcome.attack}: left out {count} texts ({reason})."
            if outcome.queries is not None:
                least, most = min(outcome.queries, default=0), max(outcome.queries, default=0)
                yield (
                    f"{outcome.attack}: {len(outcome.queries)} of {outcome.recall_alone.flagged} "
                    "flagged texts passed"
                    + (
                        f" after {least} to {most} scored texts each, "
                        f"{median(outcome.queries):g} in the median"
                        if outcome.queries
                        else ""
                    )
                    + f"; the budget was {self.budget}."
                )


def _as_json(rate: Rate) -> dict[str, Any]:
    interval = None if rate.interval is None else list(rate.interval)
    return {"value": rate.share, "ci": interval, "flagged": rate.flagged, "texts": rate.texts}


def _cells(outcome: Outcome) -> tuple[str, ...]:
    separation = outcome.separation
    return (
        outcome.attack,
        f"{outcome.recall.texts} + {outcome.alarms.texts}",
        _change(outcome.recall_alone, outcome.recall),
        _change(outcome.alarms_alone, outcome.alarms),
        "-" if separation is None else f"{separation:.2f}",
    )


def _change(alone: Rate, attacked: Rate) -> str:
    if alone.share is None or attacked.share is None or attacked.interval is None:
        return "-"
    low, high = attacked.interval
    return f"{alone.share:.2f} → {attacked.share:.2f} [{low:.2f}, {high:.2f}]"
