"""What a baseline must give: a rival of the probe, fitted to the same texts."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from sidelight.training import tfidf
from sidelight.training.dataset import ProbeDataset, Split


@dataclass(frozen=True)
class FittedBaseline(ABC):
    """A fitted baseline.

    Attributes:
        parameters: Numbers fitted to the training texts that are kept for prediction.
        seconds_before: That an earlier, killed fit took for what this one went on from.
    """

    parameters: int
    seconds_before: float = field(default=0.0, kw_only=True)

    @abstractmethod
    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        """Scores before calibration, as a probe's; a binary task has one column."""


class Baseline(ABC):
    """A way of classifying that probes are compared with. Frozen dataclass; fields are options.

    Attributes:
        title: As tables show it.
        is_single_pass: Whether the served LLM's own forward pass gives all that it reads.
    """

    title: ClassVar[str]
    is_single_pass: ClassVar[bool]

    def require(self) -> None:
        """Checks what must be installed, before others are fitted for hours.

        Raises:
            SidelightError: It is not there; the message names the remedy.
        """
        return

    @abstractmethod
    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Fits to the training texts; chooses its settings, if any, on the validation texts.

        Args:
            dataset: The data.
            seed: Of everything random.

        Raises:
            SidelightError: The baseline cannot be used here; the message names the remedy.
        """


@dataclass(frozen=True)
class TfIdf(Baseline):
    """Word 1- and 2-grams and character 2- to 5-grams, balanced logistic regression.

    Attributes:
        strength: Inverse of the L2 penalty (scikit-learn's C).
    """

    title: ClassVar[str] = "TF-IDF, logistic regression"
    is_single_pass: ClassVar[bool] = False
    strength: float = 10.0

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Nothing is chosen on validation texts, and nothing is random."""
        training = dataset.training
        fitted = tfidf.fit_tfidf(
            training.texts, training.labels, dataset.task, strength=self.strength
        )
        return _FittedTfIdf(fitted.parameters, fitted)


@dataclass(frozen=True)
class _FittedTfIdf(FittedBaseline):
    fitted: tfidf.TfIdf

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        return self.fitted.logits(split.texts)
