"""What a baseline must give: a rival of the probe, fitted to the same texts.

TF-IDF of words and characters with a logistic regression: what the words alone give away.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline, make_union

from sidelight.errors import SidelightError
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.types import Task


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
            study: The data.
            seed: Of everything random.

        Raises:
            SidelightError: The baseline cannot be used here; the message names the remedy.
        """


# Probabilities are kept this far from 0 and 1, so that log-odds are finite.
_LEAST = 1e-9


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
        """Fits to the training texts; nothing is chosen on validation texts.

        Raises:
            SidelightError: All training texts are of one class.
        """
        regression = LogisticRegression(C=self.strength, max_iter=1000, class_weight="balanced")
        labels = dataset.training.labels
        is_multilabel = dataset.task.kind == "multilabel"
        if not is_multilabel and (labels == labels[0]).all():
            raise SidelightError(
                f"All training texts are labelled '{dataset.task.labels[labels[0]]}', and TF-IDF "
                "has nothing to tell apart. Use more texts, with two labels at least."
            )
        head = OneVsRestClassifier(regression) if is_multilabel else regression
        features, inputs = fit_features(dataset.training.texts)
        head.fit(inputs, labels)
        parameters = (len(features.get_feature_names_out()) + 1) * dataset.task.outputs
        return _Fitted(parameters, _scorer(make_pipeline(features, head), dataset.task))


def fit_features(texts: Sequence[str]) -> tuple[FeatureUnion, Any]:
    """Word 1- and 2-grams and character 2- to 5-grams of these texts; and the texts as such.

    Where no text has a word of two characters, as with emojis, or no two texts share characters,
    it is all characters and what up to five in a row make.
    """
    usual = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2),
    )
    try:
        return usual, usual.fit_transform(texts)
    except ValueError:
        # scikit-learn's way to say that a vocabulary is empty.
        plain = TfidfVectorizer(analyzer="char", ngram_range=(1, 5), sublinear_tf=True)
        characters = make_union(plain)
        return characters, characters.fit_transform(texts)


@dataclass(frozen=True)
class _Fitted(FittedBaseline):
    score: Callable[[Sequence[str]], np.ndarray]

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        return self.score(split.texts)


def _scorer(model: Any, task: Task) -> Callable[[Sequence[str]], np.ndarray]:
    if task.kind == "multilabel":
        return partial(_log_odds, model)
    if task.kind == "multiclass" and len(model.classes_) < task.outputs:
        return partial(_log_chances, model, task.outputs)
    return lambda texts: model.decision_function(texts).reshape(len(texts), -1)


def _log_odds(model: Any, texts: Sequence[str]) -> Float[np.ndarray, "text output"]:
    """Of labels, where one that no training text has is constant: it has no decision function."""
    chance = model.predict_proba(texts).clip(_LEAST, 1 - _LEAST)
    return np.log(chance / (1 - chance))


def _log_chances(
    model: Any, outputs: int, texts: Sequence[str]
) -> Float[np.ndarray, "text output"]:
    """Of classes, where one that no training text has is as good as impossible."""
    chance = np.full((len(texts), outputs), _LEAST)
    chance[:, model.classes_] = model.predict_proba(texts).clip(min=_LEAST)
    return np.log(chance)
