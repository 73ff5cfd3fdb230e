"""TF-IDF of words and characters with a logistic regression: what the words alone give away."""

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline, make_union

from sidelight.types import Task


def tfidf_logits(
    task: Task, texts: Sequence[str], labels: np.ndarray, held_out: Sequence[str]
) -> np.ndarray:
    """Logits on held-out texts, ``[text, output]``, of a model fitted to the others.

    Word 1- and 2-grams and character 2- to 5-grams, balanced logistic regression (C = 10).

    Args:
        task: The classes.
        texts: To fit to.
        labels: As in ``Examples.labels``.
        held_out: To score.
    """
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2),
    )
    regression = LogisticRegression(C=10, max_iter=1000, class_weight="balanced")
    multilabel = task.kind == "multilabel"
    model = make_pipeline(features, OneVsRestClassifier(regression) if multilabel else regression)
    model.fit(list(texts), labels)
    if not multilabel:
        return model.decision_function(list(held_out)).reshape(len(held_out), -1)
    chance = model.predict_proba(list(held_out)).clip(1e-9, 1 - 1e-9)
    return np.log(chance / (1 - chance))
