"""scikit-learn's tools work with the classifier, and the model reads each text once for them."""

import pickle
import re
import warnings
from collections import Counter

import numpy as np
import pytest
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks, get_tags

import sidelight
from commands import saved
from corpora import SIGNALS, planted
from sidelight import SidelightClassifier
from sidelight.backbone import TransformersBackbone, load_backbone
from sidelight.calibration import Calibration
from sidelight.errors import SidelightError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("offline"),
    pytest.mark.filterwarnings("ignore:The rarest class has"),
]
QUICK = {"mechanism": "pooling", "epochs": 6, "batch_size": 16, "learning_rate": 0.03}
# A known text is judged from states in bf16, a new one from those of the model.
ROUNDING_TO_BF16 = 0.03
TEXTS, NUMBERS = planted("multiclass", 90, seed=0)
LETTERS = np.array(list(SIGNALS))[NUMBERS]
NEW_TEXTS, NEW_NUMBERS = planted("multiclass", 40, seed=1)


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory):
    """Classifiers of one model share its states, so they share a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIDELIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    return saved(tiny, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fitted(model):
    return SidelightClassifier(model, **QUICK).fit(TEXTS, LETTERS)


@pytest.fixture
def ran(monkeypatch):
    """Every prompt that the backbone runs."""
    prompts = []
    run = TransformersBackbone.run

    def counted(self, batch, **options):
        prompts.extend(prompt.token_ids for prompt in batch)
        return run(self, batch, **options)

    monkeypatch.setattr(TransformersBackbone, "run", counted)
    return prompts


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_estimator_tags_renamed,
        estimator_checks.check_estimators_unfitted,
        estimator_checks.check_valid_tag_types,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
        estimator_checks.check_mixin_order,
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
    ],
    ids=lambda check: check.__name__,
)
def test_the_checks_of_scikit_learn_that_need_no_table_of_numbers_pass(check):
    check("SidelightClassifier", SidelightClassifier())


def test_its_tags_say_that_it_takes_texts():
    tags = get_tags(SidelightClassifier()).input_tags
    assert tags.string
    assert tags.one_d_array
    assert not tags.two_d_array
    assert is_classifier(SidelightClassifier())


def test_new_texts_get_their_class_and_probabilities_in_the_order_of_the_classes(fitted):
    assert fitted.classes_.tolist() == sorted(SIGNALS)
    probabilities = fitted.predict_proba(NEW_TEXTS)
    assert probabilities.shape == (40, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert fitted.score(NEW_TEXTS, np.array(list(SIGNALS))[NEW_NUMBERS]) > 0.6
    assert (fitted.predict(NEW_TEXTS) == fitted.classes_[probabilities.argmax(1)]).all()


@pytest.mark.parametrize("labels", [(0, 1), (False, True), ("b", "a"), (3, -3), (0.0, 1.0)])
def test_the_classes_are_those_that_were_given(model, labels):
    texts, numbers = planted("binary", 60, seed=2)
    given = np.array(labels)[numbers]
    made = SidelightClassifier(model, **QUICK).fit(np.array(texts), given)
    assert made.classes_.tolist() == sorted(labels)
    assert made.probe_.task.labels == tuple(str(label) for label in made.classes_)
    assert made.predict(texts).dtype == given.dtype
    assert roc_auc_score(given == made.classes_[1], made.predict_proba(texts)[:, 1]) > 0.75


def test_a_known_text_is_judged_as_a_new_one(model, ran):
    # Not the shared classifier: another test's model may have taken its states' place since.
    fitted = SidelightClassifier(model, **QUICK).fit(TEXTS, LETTERS)
    ran.clear()
    known = fitted.predict_proba(TEXTS)
    assert ran == []
    verdicts = fitted.classifier_.predict(TEXTS)
    assert len(ran) == len(TEXTS)
    live = np.array([[*verdict.probabilities.values()] for verdict in verdicts])
    np.testing.assert_allclose(known, live, atol=ROUNDING_TO_BF16)


def test_a_grid_search_extracts_each_text_once(model, ran):
    texts, numbers = planted("binary", 60, seed=3)
    texts = [f"{text}{number}" for number, text in enumerate(texts)]
    search = GridSearchCV(
        SidelightClassifier(model, **QUICK),
        {"mechanism": ["pooling", "gate"]},
        cv=3,
    ).fit(texts, numbers)
    assert roc_auc_score(numbers, search.predict_proba(texts)[:, 1]) > 0.75
    # The first fold to be judged had not been trained on by any classifier.
    assert Counter(Counter(ran).values()) == {1: 40, 2: 20}


def test_it_works_behind_a_step_that_changes_the_texts(model):
    classifier = SidelightClassifier(model, **QUICK)
    upper = FunctionTransformer(lambda texts: [text.replace("q", "X") for text in texts])
    texts, numbers = planted("binary", 60, seed=4)
    changed = [text.replace("X", "q") for text in texts]
    behind = cross_val_score(make_pipeline(upper, classifier), changed, numbers, cv=2)
    np.testing.assert_array_equal(behind, cross_val_score(classifier, texts, numbers, cv=2))


def test_a_clone_is_unfitted_and_has_the_same_settings(fitted):
    made = clone(fitted)
    assert made.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        made.predict(["a text"])


@pytest.mark.parametrize(
    ("texts", "labels", "says"),
    [
        ("a text", ["a"], "shape \\(\\), wanted a list"),
        ([], [], "shape \\(0,\\), wanted a list"),
        ([["a"], ["b"]], ["a", "b"], "shape \\(2, 1\\), wanted a list"),
        (["a", 5], ["a", "b"], "Text 2 is 5, wanted a string"),
        (["a", None], ["a", "b"], "Text 2 is None, wanted a string"),
        (["a", "b"], ["a", "a"], "Got one class \\(a\\), wanted two"),
        (["a", "b"], ["a"], "inconsistent numbers of samples"),
        (["a", "b"], [[0, 1], [1, 0]], "1d array"),
        (["a", "b"], [0.5, 1.5], "Unknown label type"),
    ],
)
def test_what_are_no_texts_or_no_classes_is_a_value_error(model, texts, labels, says):
    with pytest.raises(ValueError, match=says):
        SidelightClassifier(model).fit(texts, labels)


def test_a_fitted_classifier_is_saved_as_an_artifact_and_pickled(model, fitted, tmp_path):
    classifier = sidelight.load(fitted.save(tmp_path / "letters"), model=model)
    assert {verdict.probe for verdict in classifier.predict(NEW_TEXTS)} == {"letters"}
    expected = fitted.predict_proba(NEW_TEXTS)
    scores = [[*verdict.probabilities.values()] for verdict in classifier.predict(NEW_TEXTS)]
    np.testing.assert_allclose(np.array(scores), expected, atol=1e-6)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict_proba(NEW_TEXTS), expected)


def test_a_fit_that_fails_leaves_what_was_fitted_before(model):
    made = SidelightClassifier(model, **QUICK).fit(TEXTS, LETTERS)
    with pytest.raises(SidelightError):
        made.fit(TEXTS[:3], ["p", "q", "r"])
    assert set(made.predict(NEW_TEXTS)) <= set(LETTERS)
    new = SidelightClassifier(model, **QUICK)
    with pytest.raises(SidelightError):
        new.fit(TEXTS[:3], ["p", "q", "r"])
    with pytest.raises(NotFittedError):
        new.predict(NEW_TEXTS)


@pytest.mark.unchecked
def test_numbers_of_numpy_and_no_random_state_are_settings_too(model, tmp_path):
    settings = {**QUICK, "epochs": np.int64(1), "max_tokens": np.int64(64), "random_state": None}
    SidelightClassifier(model, **settings).fit(TEXTS, LETTERS).save(tmp_path / "probe")
    assert sidelight.load(tmp_path / "probe", model=model).probe.record["seed"] == 0


def test_the_settings_reach_the_training(model):
    made = SidelightClassifier(
        model, mechanism="gate", weight_decay=0.2, class_weight="balanced", calibration="none",
        random_state=7, max_tokens=9, epochs=1,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made.fit(TEXTS, LETTERS)
    assert any("were cut to 9 tokens" in str(one.message) for one in told)
    record = made.probe_.record
    assert (made.probe_.spec.name, record["seed"], record["max_tokens"]) == ("gate", 7, 9)
    settings = record["settings"]
    assert (settings["weight_decay"], settings["class_weight"]) == (0.2, "balanced")
    assert isinstance(made.probe_.calibration, Calibration)
    assert made.probe_.calibration.kind == "none"


def test_several_classes_keep_the_most_probable_one_unless_another_calibration_is_named(fitted):
    assert fitted.probe_.calibration.kind == "temperature"


def test_progress_is_shown_on_demand_alone(model, capsys):
    SidelightClassifier(model, **QUICK).fit(TEXTS[:60], LETTERS[:60])
    assert capsys.readouterr().err == ""
    SidelightClassifier(model, **QUICK, verbose=True).fit(TEXTS[:60], LETTERS[:60])
    assert re.search("Training.* tokens", capsys.readouterr().err)


def test_a_probe_of_another_model_is_refused(fitted, family, tmp_path):
    moved = pickle.loads(pickle.dumps(fitted))
    other = saved(family, tmp_path)
    if load_backbone(other).fingerprint.differences(fitted.probe_.fingerprint):
        moved.set_params(model=other)
        with pytest.raises(sidelight.SidelightError, match="was trained on"):
            moved.predict(["a text"])
