"""Every task gets its three plots, however many classes and however odd their names."""

import sys

import numpy as np
import pytest
from matplotlib.image import imread

from sidelight.data.plots import plot_report
from sidelight.statistics.metrics import decide
from sidelight.types import Task
from worlds.servers import cli

ODD_NAMES = ("_hidden", "costs $5 and $6", r"\frac{", "x" * 300)
BINARY = Task("binary", ("fine", "toxic"))


def plot(task, directory, labels):
    generator = np.random.default_rng(0)
    probabilities = generator.random((len(labels), task.outputs))
    if task.kind == "multiclass":
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    thresholds = () if task.kind == "multiclass" else (0.5,) * task.outputs
    predictions = decide(task, probabilities, labels, thresholds=thresholds)
    return plot_report(predictions, directory, title="a $p")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (BINARY, np.arange(100) % 2),
        # 60 of the 90 classes never occur.
        (Task("multiclass", tuple(f"label {i}" for i in range(90))), np.arange(100) % 30),
        # All rows have the first label, and none the second.
        (Task("multilabel", ODD_NAMES), np.tile([[1, 0, 0, 1], [1, 0, 1, 0]], (50, 1))),
    ],
    ids=["binary", "many classes", "odd names"],
)
def test_every_task_gets_exactly_three_plots(task, labels, tmp_path):
    drawn = plot(task, tmp_path / "new" / "folder", labels)
    assert {path.stem for path in drawn} == {"confusion", "precision_recall", "reliability"}
    assert sorted(drawn) == sorted((tmp_path / "new" / "folder").iterdir())
    for path in drawn:
        image = imread(path)
        assert all(500 < side < 4000 for side in image.shape[:2])
        assert image.std() > 0.01
    if task is BINARY:
        # The same rows give the same bytes.
        for one, another in zip(drawn, plot(task, tmp_path / "again", labels), strict=True):
            assert one.read_bytes() == another.read_bytes()


def test_invalid_rows_leave_no_plot_folder(tmp_path):
    with pytest.raises(AssertionError):
        plot(BINARY, tmp_path / "new", np.full(3, 2))
    assert not (tmp_path / "new").exists()


def test_eval_reports_missing_plots_extra_before_loading_probe(monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sys.modules, "sidelight.data.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    absent = str(tmp_path / "absent")
    assert cli("eval", absent, "--data", absent, "--plots", str(tmp_path)) == 2
    assert "pip install '.[plots]'" in capsys.readouterr().err
