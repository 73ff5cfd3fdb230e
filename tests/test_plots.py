"""Every task gets its three plots, however many classes and however odd their names."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from commands import run
from sidelight.errors import SidelightError
from sidelight.plots import plot_report
from sidelight.types import Task

NAMES = ["confusion.png", "precision_recall.png", "reliability.png"]


def draw_rows(task: Task, *, rows: int = 200):
    generator = np.random.default_rng(0)
    if task.kind == "multiclass":
        labels = generator.integers(task.outputs, size=rows)
        odds = np.exp(generator.normal(size=(rows, task.outputs)))
        return odds / odds.sum(axis=1, keepdims=True), labels
    labels = generator.integers(2, size=(rows, task.outputs))
    return generator.random(labels.shape), labels[:, 0] if task.kind == "binary" else labels


def plot(task: Task, directory: Path, labels: np.ndarray | None = None) -> list[Path]:
    probabilities, drawn = draw_rows(task)
    thresholds = () if task.kind == "multiclass" else (0.5,) * task.outputs
    labels = drawn if labels is None else labels
    return plot_report(
        task, probabilities, labels, directory, thresholds=thresholds, title="a $probe on rows"
    )


def named(kind, count: int) -> Task:
    return Task(kind, tuple(f"label {number}" for number in range(count)))


TASKS = [
    named("binary", 2),
    named("multiclass", 3),
    named("multiclass", 90),
    named("multilabel", 24),
]


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: f"{task.kind}-{len(task.labels)}")
def drawn(request, tmp_path_factory):
    return plot(request.param, tmp_path_factory.mktemp("plots") / "new" / "folder")


@pytest.mark.slow
def test_every_task_gets_three_plots_and_nothing_else(drawn):
    assert sorted(path.name for path in drawn) == NAMES
    assert sorted(drawn) == sorted(drawn[0].parent.iterdir())
    for path in drawn:
        height, width, _ = imread(path).shape
        assert 500 < height < 4000
        assert 500 < width < 4000


@pytest.mark.slow
@pytest.mark.parametrize("label", [0, 1])
def test_rows_of_one_class_are_drawn(label, tmp_path):
    assert len(plot(named("binary", 2), tmp_path, np.full(200, label))) == 3


@pytest.mark.slow
def test_classes_that_never_occur_are_drawn(tmp_path):
    assert len(plot(named("multiclass", 12), tmp_path, np.zeros(200, int))) == 3


@pytest.mark.slow
def test_names_with_special_characters_are_drawn(tmp_path):
    task = Task("multilabel", ("_hidden", "costs $5 and $6", r"\frac{", "x" * 300))
    assert len(plot(task, tmp_path)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("drawn", TASKS[:1], indirect=True)
def test_the_same_rows_give_the_same_bytes(drawn, tmp_path):
    for one, other in zip(drawn, plot(TASKS[0], tmp_path), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_wrong_rows_leave_no_folder_behind(tmp_path):
    with pytest.raises(SidelightError):
        plot(named("binary", 2), tmp_path / "new", np.zeros(3, int))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_drawing_leaves_pyplot_and_its_global_state_alone():
    check = "import sys, sidelight.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.slow
def test_without_matplotlib_the_extra_is_named_and_only_plots_need_it():
    code = """
import sys
sys.modules["matplotlib"] = None
import sidelight.training.runs
try:
    import sidelight.plots
except sidelight.SidelightError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "Plots need the package matplotlib. Run `pip install 'sidelight[plots]'`."
    ]


def test_evaluation_names_the_extra_before_it_looks_at_the_probe(monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sys.modules, "sidelight.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    absent = str(tmp_path / "absent")
    assert run("eval", absent, "--data", absent, "--plots", str(tmp_path)) == 2
    assert capsys.readouterr().err.endswith("Run `pip install 'sidelight[plots]'`.\n")
