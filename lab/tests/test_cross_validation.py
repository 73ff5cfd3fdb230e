"""Rows compared on training texts alone, and tables on files of one's own."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_reproduction import TABLE, Data

from commands import run, saved
from corpora import planted
from sidelight.errors import SidelightError
from sidelight_lab.tables.cross_validation import cross_validate
from sidelight_lab.tables.recipes import parse_recipe
from sidelight_lab.tables.rows import Tools, suggested


def tools(tiny, cache, data):
    def no_search(*_):
        raise AssertionError("nothing asked for a search")

    return Tools(tiny, lambda _name: data, no_search, cache)


def closed() -> None:
    raise AssertionError("the test was opened")


@pytest.mark.unchecked
@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_every_row_is_scored_on_every_fold_and_the_test_stays_closed(tiny, tmp_path, kind):
    data = Data(kind, on_test=closed)
    # Nor does it look at the validation split.
    del data.validation
    given = {"text": TABLE, "tools": tools(tiny, tmp_path / "cache", data), "folds": 3}
    found = cross_validate(parse_recipe(TABLE, name="t"), tmp_path / "out", **given)
    assert {one.row for one in found} == {"pooling", "readout", "tfidf"}
    score = {"binary": "AUPRC", "multiclass": "accuracy", "multilabel": "mean AUPRC"}[kind]
    assert {one.score for one in found} == {score}
    assert f"{score}, mean" in (tmp_path / "out" / "cross_validation.md").read_text("utf-8")
    assert all(len(one.folds) == 3 for one in found)
    assert [one.mean for one in found] == sorted((one.mean for one in found), reverse=True)
    # What TF-IDF can tell is planted.
    assert {one.row: one.mean for one in found}["tfidf"] > 0.8
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("result.npz")}
    assert len(before) == 3 * (2 + 2 + 1)
    again = cross_validate(parse_recipe(TABLE, name="t"), tmp_path / "out", **given)
    assert again == found
    assert {p: p.stat().st_mtime_ns for p in before} == before
    stored = json.loads((tmp_path / "out" / "cross_validation.json").read_text())
    assert [one["row"] for one in stored] == [one.row for one in found]


def test_folds_do_not_overlap_and_cover_every_text(tiny, tmp_path, monkeypatch):
    from sidelight_lab.tables.fitting import Bench

    seen = []
    whole = Bench.fit_rounds

    def spying(self, rows, rounds):
        seen.extend(rounds)
        return whole(self, rows, rounds)

    monkeypatch.setattr(Bench, "fit_rounds", spying)
    given = {"text": TABLE, "tools": tools(tiny, tmp_path / "cache", Data()), "folds": 4}
    cross_validate(parse_recipe(TABLE, name="t").only(["tfidf"]), tmp_path / "out", **given)
    folds = [set(at.dataset.validation.rows.tolist()) for at in seen]
    assert sum(map(len, folds)) == len(set().union(*folds)) == 100
    for at, fold in zip(seen, folds, strict=True):
        assert fold.isdisjoint(at.dataset.training.rows.tolist())


def test_equal_texts_are_in_one_fold_and_each_fold_searches_for_itself(tiny, tmp_path):
    data, asked = Data(), []
    data.training = data.training.select(np.arange(100) % 50)

    def search(dataset, mechanism, storage):
        asked.append((dataset, storage))
        found = suggested(mechanism)
        return replace(found, settings=found.settings.changed(epochs=1))

    text = TABLE.replace("settings = { epochs = 2 }", "search = true").replace(
        "seeds = 2", "seeds = 1"
    )
    given = replace(tools(tiny, tmp_path / "cache", data), search=search)
    recipe = parse_recipe(text, name="t").only(["pooling"])
    cross_validate(recipe, tmp_path / "out", text=text, tools=given, folds=3)
    for dataset, _ in asked:
        assert set(dataset.training.texts).isdisjoint(dataset.validation.texts)
    assert len({storage for _, storage in asked}) == len(asked) == 3
    # The origin of a table in the same folder stays.
    assert not (tmp_path / "out" / "environment.json").exists()


def test_a_row_that_diverges_in_a_fold_has_no_mean_and_comes_last(tiny, tmp_path):
    text = TABLE.replace("epochs = 2", "epochs = 2, weight_decay = 1e38")
    given = {"text": text, "tools": tools(tiny, tmp_path / "cache", Data()), "folds": 2}
    recipe = parse_recipe(text, name="t").only(["pooling", "tfidf"])
    found = cross_validate(recipe, tmp_path / "out", **given)
    assert [(one.row, one.mean is None) for one in found] == [("tfidf", False), ("pooling", True)]
    assert "| pooling | diverged |" in (tmp_path / "out" / "cross_validation.md").read_text()


def test_what_cannot_be_cross_validated_is_refused(tiny, tmp_path):
    few = TABLE.replace("comparison", "few-shot")
    given = {"text": TABLE, "tools": tools(tiny, tmp_path / "cache", Data())}
    with pytest.raises(SidelightError, match="Only a comparison"):
        cross_validate(parse_recipe(few, name="t"), tmp_path / "out", folds=3, **given)
    with pytest.raises(SidelightError, match="fewer distinct texts than 99 folds"):
        cross_validate(parse_recipe(TABLE, name="t"), tmp_path / "out", folds=99, **given)


def rows_file(path, count, seed):
    texts, labels = planted("binary", count, seed=seed)
    pairs = zip(texts, labels, strict=True)
    rows = [{"message": text, "kind": ["good", "bad"][int(label)]} for text, label in pairs]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_a_table_of_ones_own_files(tiny, tmp_path, own_cache, capsys):
    model = saved(tiny, tmp_path / "model")
    files = [rows_file(tmp_path / f"{i}.jsonl", 80, seed=i) for i in (1, 2)]
    common = ["reproduce", "own", "--model", model, "--only", "readout,tfidf", "--seeds", "1"]
    columns = ["--text", "message", "--label", "kind", "--positive", "bad"]
    place = ["--out", str(tmp_path / "out")]
    assert run(*common, *columns, *place, "--train", files[0], "--test", files[1]) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text())["tables"][0]
    assert table["texts"] == 80
    assert {row["name"] for row in table["rows"]} == {"readout", "tfidf"}
    assert run(*common, *columns, *place, "--train", files[0]) == 2
    assert "--train and --test go together" in capsys.readouterr().err
