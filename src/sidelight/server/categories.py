"""Verdicts as moderation categories, the words that OpenAI's clients know."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from sidelight.engines.base import LoadedProbe
from sidelight.types import Verdict

# Names of a positive class that say nothing: the probe's own name says more.
_BARE_LABELS = frozenset({"1", "true", "yes"})


class Categories(BaseModel):
    """What one or more verdicts say, by category.

    Attributes:
        flagged: Whether any category is.
        categories: Whether each is flagged.
        category_scores: Its probability.
        category_applied_input_types: What was read for it: always text.
    """

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]


@dataclass(frozen=True)
class CategoryNames:
    """The category of each probe's labels: only what a loaded probe covers has one.

    Attributes:
        by_probe: For each probe, its categories by label; a binary probe's negative label has none.
    """

    by_probe: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, probes: Sequence[LoadedProbe]) -> "CategoryNames":
        """Bare names where they are unique, ``probe/name`` where probes share one."""
        bare = {probe.name: _bare_names(probe) for probe in probes}
        uses = Counter(name for names in bare.values() for name in names.values())
        return cls(
            {
                probe: {
                    label: name if uses[name] == 1 else f"{probe}/{name}"
                    for label, name in names.items()
                }
                for probe, names in bare.items()
            }
        )

    def report(self, verdicts: Sequence[Verdict]) -> Categories:
        """All categories of these verdicts.

        A multi-class verdict is never flagged, so neither are its categories: its label is in the
        scores and in the ``sidelight`` field.
        """
        scores: dict[str, float] = {}
        flags: dict[str, bool] = {}
        for verdict in verdicts:
            for label, category in self.by_probe[verdict.probe].items():
                scores[category] = verdict.probabilities[label]
                flags[category] = verdict.flagged and label in verdict.labels
        return Categories(
            flagged=any(verdict.flagged for verdict in verdicts),
            categories=flags,
            category_scores=scores,
            category_applied_input_types={category: ["text"] for category in scores},
        )


def _bare_names(probe: LoadedProbe) -> dict[str, str]:
    labels = probe.task.labels
    if probe.task.kind != "binary":
        return {label: label for label in labels}
    positive = labels[1]
    return {positive: probe.name if positive.lower() in _BARE_LABELS else positive}
