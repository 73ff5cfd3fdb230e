"""scikit-learn's tools work with the classifier."""

import pickle
from collections import Counter

import numpy as np
import pytest
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks, get_tags

import sidelight
import wordings
from sidelight import SidelightClassifier
from sidelight.errors import SidelightError
from worlds.data import SIGNALS, little_traffic, planted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("offline"),
    pytest.mark.filterwarnings("ignore:Of the rarest class"),
]
WITHOUT_BACKGROUND = {"background": "none"}
QUICK = {
    "mechanism": "pooling",
    "epochs": 6,
    "batch_size": 16,
    "learning_rate": 0.03,
    **WITHOUT_BACKGROUND,
}
TEXTS, NUMBERS = planted("multiclass", 60, seed=0)
LETTERS = np.array(list(SIGNALS))[NUMBERS]
NEW_TEXTS, NEW_NUMBERS = planted("multiclass", 40, seed=1)


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory):
    """Classifiers of one model share it, so they share a folder for hidden states."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch, little_traffic(folder, patch):
        patch.setenv("SIDELIGHT_CACHE", str(folder))
        yield


@pytest.fixture(scope="module")
def fitted(model):
    return SidelightClassifier(model, **QUICK).fit(TEXTS, LETTERS)


CHECKS = [
    "check_estimator_cloneable", "check_estimator_repr", "check_estimator_tags_renamed",
    "check_estimators_unfitted", "check_valid_tag_types", "check_no_attributes_set_in_init",
    "check_do_not_raise_errors_in_init_or_set_params", "check_mixin_order",
    "check_parameters_default_constructible", "check_get_params_invariance", "check_set_params",
]  # fmt: skip


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("check", CHECKS)
def test_applicable_scikit_learn_checks_pass(check):
    getattr(estimator_checks, check)("SidelightClassifier", SidelightClassifier())
    tags = get_tags(SidelightClassifier()).input_tags
    assert (tags.string, tags.one_d_array, tags.two_d_array) == (True, True, False)
    assert is_classifier(SidelightClassifier())


def test_predictions_and_probabilities_follow_class_order(fitted):
    assert fitted.classes_.tolist() == sorted(SIGNALS)
    probabilities = fitted.predict_proba(NEW_TEXTS)
    assert probabilities.shape == (40, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert fitted.score(NEW_TEXTS, np.array(list(SIGNALS))[NEW_NUMBERS]) > 0.6
    assert (fitted.predict(NEW_TEXTS) == fitted.classes_[probabilities.argmax(1)]).all()
    # The most probable one, unless another calibration is named.
    assert fitted.probe_.calibration.kind == "temperature"


@pytest.fixture(scope="module")
def in_traffic(model):
    return SidelightClassifier(model).fit(TEXTS, LETTERS)


def test_estimator_trains_same_probe_as_train(model, in_traffic):
    rows = [*zip(TEXTS, LETTERS.tolist(), strict=True)]
    trained = sidelight.train(model, rows).probe
    assert trained.card.training.contexts
    assert trained.version == in_traffic.probe_.version


def test_predictions_exclude_none_class(in_traffic):
    assert in_traffic.probe_.task.abstains
    probabilities = in_traffic.predict_proba(NEW_TEXTS)
    assert in_traffic.classes_.tolist() == sorted(SIGNALS)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert in_traffic.score(NEW_TEXTS, np.array(list(SIGNALS))[NEW_NUMBERS]) > 0.6
    verdicts = in_traffic.classifier_.predict(NEW_TEXTS)
    served = np.array([[*verdict.probabilities.values()] for verdict in verdicts])
    known = served[:, :3] / served[:, :3].sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, known, atol=1e-6)


@pytest.mark.parametrize("labels", [(False, True), ("b", "a")])
def test_classes_match_targets(model, labels):
    texts, numbers = planted("binary", 40, seed=2)
    targets = np.array(labels)[numbers]
    estimator = SidelightClassifier(model, **QUICK).fit(np.array(texts), targets)
    assert estimator.classes_.tolist() == sorted(labels)
    assert estimator.probe_.task.labels == tuple(str(label) for label in estimator.classes_)
    assert estimator.predict(texts).dtype == targets.dtype
    assert (
        roc_auc_score(targets == estimator.classes_[1], estimator.predict_proba(texts)[:, 1]) > 0.75
    )


def test_pipeline_grid_search_rereads_texts_in_every_fit(model, ran):
    texts, numbers = planted("binary", 30, seed=3)
    texts = [f"{text}{number}" for number, text in enumerate(texts)]
    classifier = SidelightClassifier(model, **QUICK)
    lower = FunctionTransformer(lambda texts: [text.replace("a", "b") for text in texts])
    grid = {"sidelightclassifier__mechanism": ["pooling", "gate"]}
    search = GridSearchCV(make_pipeline(lower, classifier), grid, cv=2).fit(texts, numbers)
    # Once to train and once to be scored for each setting, and once for the last fit.
    assert {*Counter(ran).values()} == {5}
    assert roc_auc_score(numbers, search.predict_proba(texts)[:, 1]) > 0.75


def test_keep_cache_reads_each_text_once_across_fits(model, ran):
    texts, numbers = planted("binary", 30, seed=4)
    texts = [f"{text}-{number}" for number, text in enumerate(texts)]
    classifier = SidelightClassifier(model, keep_cache=True, **QUICK)
    for mechanism in ("pooling", "gate"):
        classifier.set_params(mechanism=mechanism).fit(texts, numbers)
    assert {*Counter(ran).values()} == {1}


@pytest.mark.parametrize(
    ("texts", "labels", "says"),
    [
        ([["a"], ["b"]], ["a", "b"], r"shape \(2, 1\), expected a list"),
        (["a", 5], ["a", "b"], "Text 2 is 5, expected a string"),
        (["a", "b"], ["a", None], r"^Label 2 is None, expected .* remove it from X and y\.$"),
        (["a", "b"], [float("nan"), 1.0], "Label 1 is nan"),
        (["a", "b"], ["a", "a"], r"Got one class \(a\), expected two"),
        (["a", "b"], ["a"], "inconsistent numbers of samples"),
        (["a", "b"], [0.5, 1.5], "Unknown label type"),
    ],
)
def test_invalid_texts_or_labels_raise_value_error(model, texts, labels, says):
    with pytest.raises(ValueError, match=says):
        SidelightClassifier(model).fit(texts, labels)


def test_fitted_classifier_can_be_saved_pickled_and_cloned(model, fitted, tmp_path):
    classifier = sidelight.load(fitted.save(tmp_path / "letters"), model=model)
    assert {verdict.probe for verdict in classifier.predict(NEW_TEXTS)} == {"letters"}
    expected = fitted.predict_proba(NEW_TEXTS)
    scores = [[*verdict.probabilities.values()] for verdict in classifier.predict(NEW_TEXTS)]
    np.testing.assert_allclose(np.array(scores), expected, atol=1e-6)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict_proba(NEW_TEXTS), expected)
    unfitted = clone(fitted)
    assert unfitted.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        unfitted.predict(NEW_TEXTS)


def test_failed_fit_preserves_previous_fit(model, fitted):
    restored, new = pickle.loads(pickle.dumps(fitted)), SidelightClassifier(model, **QUICK)
    for estimator in (restored, new):
        with pytest.raises(SidelightError):
            estimator.fit(TEXTS[:3], ["p", "q", "r"])
    assert set(restored.predict(NEW_TEXTS)) <= set(LETTERS)
    with pytest.raises(NotFittedError):
        new.predict(NEW_TEXTS)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(("verbose", "random_state", "seed"), [(False, 7, 7), (True, None, 0)])
def test_estimator_parameters_reach_training(model, tmp_path, capsys, verbose, random_state, seed):
    # NumPy's numbers, as of a grid, are settings too.
    estimator = SidelightClassifier(
        model, mechanism="gate", weight_decay=0.2, class_weight="balanced", calibration="none",
        random_state=random_state, max_tokens=np.int64(9), epochs=np.int64(1), verbose=verbose,
        **WITHOUT_BACKGROUND,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=wordings.TEXTS_CUT.format(tokens=9)):
        estimator.fit(TEXTS, LETTERS)
    estimator.save(tmp_path)
    assert ("Training" in capsys.readouterr().err) == verbose
    record = estimator.probe_.card.training
    assert (estimator.probe_.card.mechanism.name, record.seed, record.max_tokens) == (
        "gate",
        seed,
        9,
    )
    settings = record.settings
    assert (settings["weight_decay"], settings["class_weight"]) == (0.2, "balanced")
    assert estimator.probe_.calibration.kind == "none"
