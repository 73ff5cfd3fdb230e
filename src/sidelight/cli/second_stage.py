"""``sidelight eval --judge``: ask a judge about labelled texts, and fit it to a probe."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sidelight.cli import options
from sidelight.errors import SidelightError, warn
from sidelight.guards import is_guard
from sidelight.judges.settings import JudgeSettings, read_judge
from sidelight.probes.hub import is_on_hub
from sidelight.progress import progress

if TYPE_CHECKING:
    from sidelight.data.examples import LabelledExamples
    from sidelight.judges.fitting import DeferralReport
    from sidelight.probes.card import ProbeCard
    from sidelight.scoring import Assessment


@dataclass(frozen=True)
class SecondStageOptions:
    """The judge options of ``eval``.

    Attributes:
        file: File of the judge.
        share: Share of background traffic that the fit is for.
        ask: Maximum share of background traffic to ask about.
        threshold: Objective of the threshold; None uses the probe's.
    """

    file: Path
    share: float
    ask: float
    threshold: str | None

    @cached_property
    def judge(self) -> JudgeSettings:
        return read_judge(self.file)

    def prepare(self, probe: Path, save: Path | None, *, force: bool) -> Path:
        """Check everything that needs no model, and return the folder for the fitted probe.

        Raises:
            SidelightError: The judge's file or key is not valid, or the folder already contains a
                probe.
        """
        from sidelight.probes.card import require_free
        from sidelight.statistics.thresholds import ThresholdRule

        self.judge.key()
        if self.threshold is not None:
            ThresholdRule.parse(self.threshold)
        if save is None and (is_guard(probe) or is_on_hub(probe)):
            raise SidelightError(f"Name a folder for the fitted {probe} with --save.")
        folder = save or probe.resolve().with_name(f"{probe.resolve().name}-judged")
        require_free(folder, force=force)
        return folder

    def require_fittable(self, card: "ProbeCard", examples: "LabelledExamples") -> None:
        from sidelight.judges.fitting import require_fittable

        require_fittable(card, examples, self.share)

    def fit(self, assessment: "Assessment") -> "DeferralReport":
        """Ask the judge and fit it.

        Raises:
            SidelightError: The judge does not answer, or too few texts are deferred.
        """
        from sidelight.judges.answers import ask_all, cached_answers, cost_of, sent_characters
        from sidelight.judges.fitting import defer_thresholds, fit_judge
        from sidelight.judges.question import JudgeError, Question
        from sidelight.statistics.thresholds import ThresholdRule

        probe, examples, judge = assessment.probe, assessment.examples, self.judge
        scores = assessment.probabilities[:, 0]
        thresholds = defer_thresholds(probe, self.share, self.ask)
        rows = np.flatnonzero(scores >= min(thresholds.values()))
        questions = [
            Question.about(examples.items[row].messages, examples.items[row].response)
            for row in rows
        ]
        stored = cached_answers(judge)
        unanswered = stored.unanswered(judge, questions)
        cost = cost_of(judge, [sent_characters(judge, question) for question in unanswered])
        options.announce(
            f"Asking {judge.model} at {judge.url} about {cost}; answers are kept in {stored.path}"
        )
        with progress(f"Asking {judge.model}", len(questions), unit="texts") as advance:
            found = ask_all(judge, questions, stored, heard=lambda _row, _answer: advance(1))
        answers = np.full(len(scores), np.nan)
        answers[rows] = [np.nan if isinstance(each, JudgeError) else each for each in found]
        failures = Counter(each.reason for each in found if isinstance(each, JudgeError))
        if failures:
            reasons = ", ".join(f"{reason} {count}" for reason, count in failures.most_common())
            warn(
                f"The judge gave no verdict on {failures.total()} texts ({reasons}); they are "
                "excluded from its metrics. Run the command again to retry them."
            )
        return fit_judge(
            probe,
            examples,
            scores,
            answers,
            judge=judge,
            thresholds=thresholds,
            share=self.share,
            rule=None if self.threshold is None else ThresholdRule.parse(self.threshold),
        )
