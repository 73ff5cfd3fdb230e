"""The baseline: logistic regression on TF-IDF features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline, make_union

from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError, warn
from sidelight.training.measuring import Calibrated, calibrate_examples
from sidelight.training.preparing import ProbeDataset
from sidelight.training.settings import FitOptions
from sidelight.types import Task

# Minimum distance of probabilities from 0 and 1, so that log-odds are finite.
_LEAST = 1e-9
# Number of standard errors from which TF-IDF is clearly better, and of texts of the rarest label
# for this conclusion.
_CLEAR, _ENOUGH_TEXTS = 2.0, 30


@dataclass(frozen=True)
class TfIdf:
    """A fitted regression.

    Attributes:
        task: The classes.
        model: scikit-learn's pipeline, from texts to scores.
        parameters: Number of parameters that prediction needs.
    """

    task: Task
    model: Any
    parameters: int

    def logits(self, texts: Sequence[str]) -> Float[np.ndarray, "text output"]:
        """Scores before calibration, as a probe's; a binary task has one column."""
        if self.task.kind == "multilabel":
            # A label without training texts is constant and has no decision function.
            chance = self.model.predict_proba(texts).clip(_LEAST, 1 - _LEAST)
            return np.log(chance / (1 - chance))
        if len(self.model.classes_) < self.task.outputs:
            # A class without training texts is almost impossible.
            chance = np.full((len(texts), self.task.outputs), _LEAST)
            chance[:, self.model.classes_] = self.model.predict_proba(texts).clip(min=_LEAST)
            return np.log(chance)
        return self.model.decision_function(texts).reshape(len(texts), -1)


def fit_tfidf(
    texts: Sequence[str], labels: np.ndarray, task: Task, *, strength: float = 10.0
) -> TfIdf:
    """A balanced logistic regression on word 1- and 2-grams and character 2- to 5-grams.

    Texts without words use n-grams of up to five characters of any kind instead.

    Args:
        texts: The training texts.
        labels: As in ``Examples.labels``.
        task: The classes.
        strength: Inverse of the L2 penalty (scikit-learn's C).

    Raises:
        SidelightError: All texts have the same label.
    """
    regression = LogisticRegression(C=strength, max_iter=1000, class_weight="balanced")
    if task.kind == "multilabel":
        head = OneVsRestClassifier(regression)
    elif (labels == labels[0]).all():
        raise SidelightError(
            f"All training texts are labelled '{task.labels[labels[0]]}', so there is nothing to "
            "learn. Add texts with another label."
        )
    else:
        head = regression
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2),
    )
    try:
        inputs = features.fit_transform(texts)
    except ValueError:
        # The vocabulary is empty: no text has a word of two characters, as with emojis, or no two
        # texts share characters.
        features = TfidfVectorizer(analyzer="char", ngram_range=(1, 5), sublinear_tf=True)
        inputs = features.fit_transform(texts)
    head.fit(inputs, labels)
    parameters = (len(features.get_feature_names_out()) + 1) * task.outputs
    return TfIdf(task, make_pipeline(features, head), parameters)


def measure_baseline(dataset: ProbeDataset, options: FitOptions) -> Calibrated:
    """Train the baseline on the texts without contexts, and measure it on the same texts as a
    probe.
    """
    task, split = dataset.task, dataset.split.without_contexts()
    logits = np.empty((len(split), task.outputs))
    folds = [fold[fold < len(split)] for fold in dataset.left_out]
    for fold in folds:
        rest = split.without(fold)
        words = fit_tfidf(rest.texts, rest.labels, task)
        logits[fold] = words.logits(split.select(fold).texts)
    return calibrate_examples(
        logits[np.sort(np.concatenate(folds))],
        dataset.validation.examples,
        dataset.folds,
        kind=options.calibration,
        rule=options.threshold,
    )


def warn_of_better_words(
    losses: Float[np.ndarray, " text"],
    of_words: Float[np.ndarray, " text"],
    examples: LabelledExamples,
) -> None:
    """Warn if the loss of TF-IDF is clearly below that of the probe.

    Args:
        losses: Log loss of the probe on each held-out text.
        of_words: Log loss of TF-IDF.
        examples: The texts; with few texts of a label, the difference could be random.
    """
    lost = losses - of_words
    is_clear = lost.mean() > _CLEAR * lost.std() / np.sqrt(len(lost))
    if not is_clear or examples.label_counts.min() < _ENOUGH_TEXTS:
        return
    warn(
        "TF-IDF predicts held-out texts better than the probe: its log loss is "
        f"{of_words.mean():.3f}, the probe's {losses.mean():.3f}. Add texts, or try another "
        "model (--model)."
    )
