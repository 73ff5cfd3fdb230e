"""What attacks on a probe gave, as Markdown for a terminal or a model card, and as JSON."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from sidelight.manifest import CARD, model_card, read_manifest
from sidelight.storage import write_text
from sidelight_lab.redteam.measure import Outcome, Rate

_END = "<!-- end of measurement -->"
_MEASURED = re.compile(rf"\n<!-- measured on version \w+ -->\n.*?{_END}\n", re.DOTALL)
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
                    "recall_alone": outcome.recall_alone.to_dict(),
                    "recall": outcome.recall.to_dict(),
                    "false_alarms_alone": outcome.alarms_alone.to_dict(),
                    "false_alarms": outcome.alarms.to_dict(),
                    "recall_minus_false_alarms": outcome.separation,
                    "skipped": dict(outcome.skipped),
                    **({} if outcome.queries is None else {"queries": list(outcome.queries)}),
                }
                for outcome in self.outcomes
            ],
        }

    def markdown(self) -> str:
        """The table with its title and notes."""
        flags = ", ".join(f"{label} from {least:.3f}" for label, least in self.thresholds.items())
        where = f" on the route '{self.route}'" if self.route else ""
        rows = [_cells(outcome) for outcome in self.outcomes]
        align = ("left", *["right"] * (len(_HEAD) - 1))
        table = tabulate(rows, _HEAD, "pipe", disable_numparse=True, colalign=align)
        notes = "".join(f"- {note}\n" for note in self._notes())
        title = f"'{self.probe}' under attack{where}; it flags {flags}."
        return f"{title}\n\n{table}\n" + (f"\n{notes}" if notes else "")

    def add_to_card(self, directory: Path) -> None:
        """Puts the figures at the end of a probe's model card, in place of earlier ones.

        Args:
            directory: The artifact; a card that is there keeps what else it says.
        """
        path, manifest = directory / CARD, read_manifest(directory)
        card = path.read_text("utf-8") if path.exists() else model_card(manifest)
        begin = f"<!-- measured on version {manifest.version} -->"
        write_text(path, f"{_MEASURED.sub('', card)}\n{begin}\n{self.section()}{_END}\n")

    def section(self) -> str:
        """Of a model card."""
        return (
            f"## Evasion\n\nSeed {self.seed}; measured by `sidelight redteam` on "
            f"`{Path(self.data).name}`. Each cell says what is flagged alone → attacked, with "
            f"a 95 % interval; the difference is recall minus false alarms.\n\n{self.markdown()}"
        )

    def _notes(self) -> Iterator[str]:
        for outcome in self.outcomes:
            for reason, count in outcome.skipped.items():
                yield f"{outcome.attack}: left out {count} texts ({reason})."
            if outcome.queries:
                yield (
                    f"{outcome.attack}: {len(outcome.queries)} of {outcome.recall_alone.flagged} "
                    f"flagged texts passed after {min(outcome.queries)} to {max(outcome.queries)} "
                    f"scored texts each, {median(outcome.queries):g} in the median; the budget was "
                    f"{self.budget}."
                )
            elif outcome.queries is not None:
                yield f"{outcome.attack}: no flagged text passed; the budget was {self.budget}."


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
