"""Annotators of texts: people, and judges whose labels a person has checked.

``sidelight label --judge`` writes a cell next to each label of a judge. If a person has changed the
label since, it counts as the person's.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sidelight.data.examples import LabelledExamples
from sidelight.statistics.agreement import Agreement

# Column of this cell.
LABELLED = "labelled"
PEOPLE = "people"
# Probability from which a judge's answer means yes.
JUDGE_SAYS_YES = 0.5


@dataclass(frozen=True)
class JudgeLabel:
    """A judge's label of a text, and how reliable it is.

    Attributes:
        judge: Model of the judge, followed by ``JudgeSettings.digest``.
        probability: Probability of the positive label.
        agreement: Balanced agreement of the judge with a person, on a blind sample.
    """

    judge: str
    probability: float
    agreement: Agreement

    @property
    def is_positive(self) -> bool:
        return self.probability >= JUDGE_SAYS_YES

    def cell(self) -> dict[str, Any]:
        """The cell next to the label, as JSON-ready values."""
        return _LABEL.dump_python(self, mode="json")

    @staticmethod
    def of(row: Mapping[str, Any], *, is_positive: bool) -> "JudgeLabel | None":
        """The judge's label in a row; None for a label that a person gave or changed.

        Args:
            row: Cells of the row, as read.
            is_positive: Whether the row currently has the positive label.
        """
        label = _read(row)
        return label if label is not None and label.is_positive == is_positive else None

    @staticmethod
    def has_cell(row: Mapping[str, Any]) -> bool:
        """Whether a row has the cell, even if a person has changed the label."""
        return _read(row) is not None


def _read(row: Mapping[str, Any]) -> JudgeLabel | None:
    try:
        return _LABEL.validate_python(row.get(LABELLED))
    except ValidationError:
        return None


_LABEL = TypeAdapter(JudgeLabel)


@dataclass(frozen=True)
class Annotator:
    """An annotator of some texts.

    Attributes:
        name: ``people``, or the judge as in ``JudgeLabel``.
        texts: Number of texts with this annotator's labels.
        agreement: Balanced agreement of a judge with a person; None for people.
    """

    name: str
    texts: int
    agreement: Agreement | None = None

    def __str__(self) -> str:
        """For example ``qwen3:4b 0123456789ab (812 texts, balanced agreement ...)``."""
        checked = ""
        if self.agreement is not None:
            checked = (
                f", balanced agreement with people {self.agreement} on "
                f"{self.agreement.texts:,} texts"
            )
        return f"{self.name} ({self.texts:,} texts{checked})"


def annotators_of(examples: LabelledExamples) -> tuple[Annotator, ...]:
    """The annotators of these texts; empty unless a judge labelled some."""
    if examples.task.kind != "binary":
        return ()
    texts, agreements = Counter[str](), dict[str, Agreement]()
    for row, label in zip(examples.rows, examples.labels.tolist(), strict=True):
        classified = JudgeLabel.of(row, is_positive=bool(label))
        texts[classified.judge if classified else PEOPLE] += 1
        if classified:
            agreements[classified.judge] = classified.agreement
    if not agreements:
        return ()
    return tuple(Annotator(name, texts[name], agreements.get(name)) for name in sorted(texts))
