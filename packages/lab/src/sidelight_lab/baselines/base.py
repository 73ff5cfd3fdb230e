"""Interface of baselines: classifiers fitted to the same texts as probes, for comparison."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from pydantic import ConfigDict

from sidelight.training import tfidf
from sidelight.training.dataset import Split
from sidelight.training.optimisation import validation_score
from sidelight.training.preparing import ProbeDataset


@dataclass(frozen=True, eq=False)
class FittedBaseline:
    """A fitted baseline.

    Attributes:
        logits: Function that returns the uncalibrated logits of texts; a binary task has one
            column.
        parameters: Number of fitted parameters that prediction needs.
    """

    logits: Callable[[Split], Float[np.ndarray, "text output"]]
    parameters: int


def best_on_validation(
    candidates: Iterable[FittedBaseline], dataset: ProbeDataset
) -> FittedBaseline:
    """The candidate with the best validation score; the first one on ties."""
    validation = dataset.validation

    def score(fitted: FittedBaseline) -> float:
        return validation_score(dataset.task, fitted.logits(validation), validation.labels)

    return max(candidates, key=score)


class Baseline(ABC):
    """A baseline classifier: a frozen dataclass whose fields are its options.

    Attributes:
        title: Name in tables.
        is_single_pass: Whether it needs only the served LLM's own forward pass.
    """

    # Reject misspelled options in recipes.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    title: ClassVar[str]
    is_single_pass: ClassVar[bool]

    @abstractmethod
    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Fit to the training texts, choosing any settings on the validation texts.

        Args:
            dataset: Training and validation texts with their hidden states.
            seed: Seed of all random numbers.

        Raises:
            SidelightError: The baseline cannot be used here; the message names the remedy.
        """


@dataclass(frozen=True)
class TfIdf(Baseline):
    """Balanced logistic regression on word 1- and 2-grams and character 2- to 5-grams.

    Attributes:
        strength: Inverse of the L2 penalty (scikit-learn's C).
    """

    title: ClassVar[str] = "TF-IDF, logistic regression"
    is_single_pass: ClassVar[bool] = False
    strength: float = 10.0

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Fit without validation texts or randomness."""
        training = dataset.training
        fitted = tfidf.fit_tfidf(
            training.texts, training.labels, dataset.task, strength=self.strength
        )
        return FittedBaseline(lambda split: fitted.logits(split.texts), fitted.parameters)
