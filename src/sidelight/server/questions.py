"""Questions that a client puts to the probes by name, answered or refused; never guessed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sidelight.engines.base import LoadedProbe
from sidelight.server.categories import CategoryNames
from sidelight.types import Verdict

Value = str | bool


@dataclass(frozen=True)
class Choice:
    """An answer to a question with given choices.

    Attributes:
        value: What the probe chose.
        confidence: Its probability.
        probabilities: Of each value, in the order of the question.
    """

    value: Value
    confidence: float
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Findings:
    """What the probes say of one text, by the names that questions use.

    Attributes:
        probes: The loaded probes.
        names: Their categories.
        verdicts: On the text; a probe without one cannot answer.
    """

    probes: Mapping[str, LoadedProbe]
    names: CategoryNames
    verdicts: Mapping[str, Verdict]

    @classmethod
    def of(
        cls, probes: Iterable[LoadedProbe], names: CategoryNames, verdicts: Iterable[Verdict]
    ) -> "Findings":
        """By name."""
        by_name = {probe.name: probe for probe in probes}
        return cls(by_name, names, {verdict.probe: verdict for verdict in verdicts})

    def probability(self, name: str | None) -> float | None:
        """Of the class that ``name`` means: a binary probe, or a category of any probe."""
        meant = self._meant(name)
        if meant is None or meant[0] not in self.verdicts:
            return None
        probe, label = meant
        return self.verdicts[probe].probabilities[label]

    def choice(self, name: str | None, values: Sequence[Value]) -> Choice | None:
        """Of probe ``name`` among ``values``, which have to be exactly its labels.

        A binary probe also takes ``true`` for its positive label and ``false`` for the other.
        """
        verdict = self.verdicts.get(name or "")
        if verdict is None or self.probes[verdict.probe].task.kind == "multilabel":
            return None
        labels = [self._label(verdict.probe, value) for value in values]
        if sorted(labels) != sorted(verdict.probabilities):
            return None
        return Choice(
            value=values[labels.index(verdict.label)],
            confidence=verdict.probabilities[verdict.label],
            probabilities=tuple(verdict.probabilities[label] for label in labels),
        )

    def asked(self, names: Iterable[str | None]) -> list[str]:
        """The loaded probes that these names mean."""
        meant = [self._meant(name) for name in names]
        found = [name for name in names if name in self.probes]
        return list(dict.fromkeys([*(m[0] for m in meant if m), *(n for n in found if n)]))

    def _meant(self, name: str | None) -> tuple[str, str] | None:
        """The probe and the label whose probability ``name`` asks for."""
        probe = self.probes.get(name or "")
        if probe is not None and probe.task.kind == "binary":
            return probe.name, probe.task.labels[1]
        for by_probe, categories in self.names.by_probe.items():
            for label, category in categories.items():
                if category == name:
                    return by_probe, label
        return None

    def _label(self, probe: str, value: Value) -> str:
        labels = self.probes[probe].task.labels
        if isinstance(value, str):
            return value
        return labels[int(value)] if self.probes[probe].task.kind == "binary" else ""
