"""Rows compared on training texts alone."""

import json
from functools import partial

import numpy as np
import pytest
from planted_data import TABLE, Data, context_of, examples, recipe, stored

from sidelight.errors import SidelightError
from sidelight_lab.tables.cross_validation import cross_validate
from sidelight_lab.tables.recipes import suggested


@pytest.fixture
def context(tiny, tmp_path):
    """The planted table in ``tmp_path / "out"``."""
    return partial(context_of, tiny, tmp_path / "out", tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_every_row_is_scored_on_every_fold_and_the_test_stays_closed(context, tmp_path, kind):
    data = Data(kind, on_test=lambda: pytest.fail("the test was opened"))
    # Nor does it look at the validation split.
    del data.__dict__["validation"]
    found = cross_validate(context(data=data), folds=3)
    assert {one.row for one in found} == {"pooling", "readout", "tfidf"}
    assert all(len(one.folds) == 3 for one in found)
    assert [one.mean for one in found] == sorted((one.mean for one in found), reverse=True)
    # What TF-IDF can tell is planted.
    assert {one.row: one.mean for one in found}["tfidf"] > 0.8
    before = stored(tmp_path / "out")
    assert cross_validate(context(data=data), folds=3) == found
    assert stored(tmp_path / "out") == before
    written = json.loads((tmp_path / "out" / "cross_validation.json").read_text())
    assert [one["row"] for one in written] == [one.row for one in found]


def test_folds_cover_every_text_once_keep_equal_ones_together_and_search_for_themselves(
    context, tmp_path
):
    asked = []

    def search(dataset, mechanism, storage):
        asked.append((dataset, storage))
        spec, settings = suggested(mechanism)
        return spec, settings.changed(epochs=1)

    text = TABLE.replace("settings = { epochs = 2 }", "search = true")
    chosen = recipe(text.replace("seeds = 2", "seeds = 1")).only(["pooling"])
    data = Data(training=examples("binary", 100, 1).select(np.arange(100) % 50))
    cross_validate(context(recipe=chosen, data=data, search=search), folds=3)
    folds = [set(dataset.validation.rows.tolist()) for dataset, _ in asked]
    assert sum(map(len, folds)) == len(set().union(*folds)) == 100
    for (dataset, _), fold in zip(asked, folds, strict=True):
        assert fold.isdisjoint(dataset.training.rows.tolist())
        assert set(dataset.training.texts).isdisjoint(dataset.validation.texts)
    assert len({storage for _, storage in asked}) == len(asked) == 3
    # The origin of a table in the same folder stays.
    assert not (tmp_path / "out" / "environment.json").exists()


def test_what_cannot_be_cross_validated_is_refused(context):
    few = TABLE.replace("comparison", "few-shot")
    with pytest.raises(SidelightError, match="Only a comparison"):
        cross_validate(context(text=few), folds=3)
    with pytest.raises(SidelightError, match="fewer distinct texts than 99 folds"):
        cross_validate(context(), folds=99)
