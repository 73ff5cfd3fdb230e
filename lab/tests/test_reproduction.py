"""Tables from recipes, end to end on a tiny backbone and made-up data."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from corpora import TASKS, planted
from sidelight.artifact import load_probe
from sidelight.backbone import TransformersBackbone
from sidelight.bank import Bank
from sidelight.data.examples import Example, Examples
from sidelight.errors import SidelightError
from sidelight.evaluation import Estimate, evaluate
from sidelight.metrics import METRICS
from sidelight.prompts import Message, Reads
from sidelight.states.scoring import score
from sidelight.training.dataset import ProbeDataset, make_split
from sidelight.training.objective import validation_score
from sidelight.types import TaskKind
from sidelight_lab.baselines import BASELINES
from sidelight_lab.cli.reproduce import reproduce as command
from sidelight_lab.tables.figures import (
    Difference,
    difference,
    difference_over_draws,
    mean_draws,
    measure_rows,
)
from sidelight_lab.tables.judging import Judged, JudgedRow, Scored, score_split
from sidelight_lab.tables.recipes import Recipe, parse_recipe, recipe_names, recipe_text
from sidelight_lab.tables.rows import Found, Tools, build_rows, suggested
from sidelight_lab.tables.runner import reproduce
from sidelight_lab.tables.writing import Grid, Made, describe, grid, latex, markdown, terminal

TABLE = """
title = "Planted"
kind = "comparison"
data = "planted"
metric = "auprc"
ours = ["readout"]
seeds = 2

[[probe]]
name = "pooling"
mechanism = "pooling"
settings = { epochs = 2 }

[[probe]]
name = "readout"
mechanism = "readout"
options = { heads = 2 }
settings = { epochs = 3, learning_rate = 1e-2 }

[[baseline]]
name = "tfidf"
seeds = 1
"""


class KilledError(Exception):
    """Stands for the end of the process."""


def examples(kind: TaskKind, count: int, seed: int) -> Examples:
    texts, labels = planted(kind, count, seed=seed)
    items = tuple(Example((Message("user", text),)) for text in texts)
    return Examples(items, TASKS[kind], labels, tuple({"text": text} for text in texts))


@dataclass
class Data:
    """A data set that says when its test part is read, and may be out of reach then."""

    kind: TaskKind = "binary"
    on_test: Callable[[], None] = lambda: None
    title: str = "Planted"
    training: Examples = field(init=False)
    validation: Examples = field(init=False)
    notes: tuple[str, ...] = ("Made up for tests.", "3 test rows have a cold.")
    training_notes: tuple[str, ...] = ("Made up for tests.",)
    test_notes: tuple[str, ...] = ("3 test rows have a cold.",)
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.training = examples(self.kind, 100, 1)
        self.validation = examples(self.kind, 60, 2)

    @property
    def test(self) -> Examples:
        self.on_test()
        return examples(self.kind, 70, 3)

    @property
    def subsets(self) -> Mapping[str, np.ndarray]:
        self.on_test()
        return self.parts


@pytest.fixture(scope="module")
def finished(
    tiny: TransformersBackbone, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> "Finished":
    """The table with a subset; tests that change the folder copy it."""
    folder = tmp_path_factory.mktemp("finished")
    data = Data(parts={"odd": np.arange(1, 70, 2)})
    tools = Tools(tiny, lambda _name: data, _no_search, cache)
    return Finished(folder, reproduce(recipe(), folder, text=TABLE, tools=tools))


@dataclass(frozen=True)
class Finished:
    folder: Path
    made: Made

    def copied(self, target: Path) -> dict[str, int]:
        """Copies the folder; when each of its results was written."""
        shutil.copytree(self.folder, target, dirs_exist_ok=True)
        return stored(target)


def recipe(text: str = TABLE) -> Recipe:
    return parse_recipe(text, name="test")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("activations")


@pytest.fixture
def make(tiny: TransformersBackbone, cache: Path, tmp_path: Path) -> Callable[..., Made]:
    """Makes a table in ``tmp_path`` from a recipe's TOML."""

    def run(text: str = TABLE, data: Data | None = None, **given: object) -> Made:
        tools = Tools(tiny, lambda _name: data or Data(), _no_search, cache)
        tools = replace(tools, **{k: given.pop(k) for k in ("search", "load") if k in given})
        return reproduce(recipe(text), tmp_path, text=text, tools=tools, **given)

    return run


def _no_search(dataset: ProbeDataset, mechanism: str, storage: Path) -> Found:
    raise AssertionError("nothing asked for a search")


def stored(folder: Path) -> dict[str, int]:
    """When each stored result was written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.npz")}


def rows_of(made: Made, table: int = 0) -> dict[str, dict]:
    return {row["name"]: row for row in describe(made)["tables"][table]["rows"]}


def test_a_comparison_is_made_end_to_end(finished: Finished):
    made, folder = finished.made, finished.folder
    assert [table.title for table in made.tables] == ["Planted, all", "Planted, odd"]
    rows = rows_of(made)
    assert list(rows) == ["pooling", "readout", "tfidf"]
    assert [len(row["seeds"]) for row in rows.values()] == [2, 2, 1]
    assert rows["readout"]["metrics"]["auprc"]["mean"] > 0.9
    assert rows["readout"]["ours_minus_this"] is None
    assert rows["pooling"]["ours_minus_this"]["p"] is not None
    written = {path.name for path in folder.iterdir() if path.is_file()}
    assert written == {
        "table.md", "table.json", "table.tex", "recipe.toml", "environment.json", "data.md",
        "test_opened.json",
    }  # fmt: skip
    assert (folder / "recipe.toml").read_text() == TABLE
    assert {"packages", "processor", "recipe"} <= set(
        json.loads((folder / "environment.json").read_text())
    )
    assert {path.name for path in (folder / "plots").iterdir()} == {
        "bars_all.png", "bars_odd.png", "precision_recall_all.png", "precision_recall_odd.png",
    }  # fmt: skip
    assert "Made up for tests." in (folder / "table.md").read_text()
    assert "had not been opened" in (folder / "table.md").read_text()
    assert "- Ours is 'readout'." in (folder / "table.md").read_text()


def test_figures_are_those_of_evaluate_on_the_stored_artifacts(
    finished: Finished, tiny: TransformersBackbone
):
    rows = rows_of(finished.made)
    data = Data()
    prompts = [tiny.encoder.encode_any_length(item.messages, None) for item in data.test.items]
    folders = sorted((finished.folder / "runs").glob("readout-*/probe"))
    values = []
    for folder in folders:
        probe = load_probe(folder)
        (logits,) = score(tiny, Bank([probe]), prompts)
        found = evaluate(
            probe.task,
            probe.calibration.apply(logits),
            data.test.labels,
            thresholds=probe.thresholds,
        )
        values.append(found.metrics)
    # The cache holds bfloat16 states of this float32 backbone, which moves metrics of ranks little.
    for metric in ("auprc", "f1", "ece"):
        shown = rows["readout"]["metrics"][metric]["values"]
        assert shown == pytest.approx([one[metric].value for one in values], abs=0.02)


def test_table_cells_hold_the_figures(finished: Finished):
    made, folder = finished.made, finished.folder
    row = rows_of(made)["readout"]
    f1 = row["metrics"]["f1"]
    cell = f"{f1['mean']:.3f} ± {f1['sd']:.3f}"
    assert f1["sd"] == pytest.approx(np.std(f1["values"], ddof=1))
    (line,) = [
        line for line in (folder / "table.md").read_text().split("##")[1].splitlines()
        if line.startswith("| **readout**")
    ]  # fmt: skip
    assert cell in line
    assert f"{row['parameters']:,}" in line
    chosen = row["chosen"]
    assert chosen["seed"] == row["seeds"][int(np.argmax(row["validation"]["values"]))]
    low, high = chosen["auprc"]["ci"]
    assert f"{chosen['auprc']['value']:.3f} [{low:.3f}, {high:.3f}]" in line
    assert cell.replace("±", r"$\pm$") in (folder / "table.tex").read_text()
    assert json.loads((folder / "table.json").read_text()) == describe(made)


def test_a_second_run_computes_nothing_and_says_the_same(
    finished: Finished, make: Callable[..., Made], tmp_path: Path
):
    before = finished.copied(tmp_path)
    assert rows_of(make()) == rows_of(finished.made)
    assert stored(tmp_path) == before


def test_a_deleted_row_is_made_again_alone_and_alike(
    finished: Finished, make: Callable[..., Made], tmp_path: Path
):
    before = finished.copied(tmp_path)
    (gone,) = (tmp_path / "runs").glob("readout-seed1-*")
    shutil.rmtree(gone)
    again = rows_of(make())
    after = stored(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {
        name for name in before if name.startswith(f"runs/{gone.name}/")
    }
    for name, row in rows_of(finished.made).items():
        for metric, found in row["metrics"].items():
            # Alone, its matmuls are narrower, which rounds differently.
            assert found["values"] == pytest.approx(again[name]["metrics"][metric]["values"])


@pytest.mark.unchecked
def test_a_killed_run_goes_on_from_every_row_that_was_finished(
    make: Callable[..., Made], tmp_path: Path
):
    def kill() -> None:
        raise KilledError

    with pytest.raises(KilledError):
        make(data=Data(on_test=kill))
    before = stored(tmp_path)
    assert len(before) == 5
    (file,) = (tmp_path / "runs").glob("tfidf-*/result.npz")
    seconds = float(np.load(file)["seconds"])
    assert rows_of(make())["tfidf"]["seconds"] == [seconds]
    after = stored(tmp_path)
    # A baseline has no file format: it is fitted once more, with the same seed, for the test.
    kept = {name for name in before if not name.startswith("runs/tfidf")}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_a_run_killed_between_rows_keeps_the_rows_before(
    make: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def kill(*_: object, **__: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(BASELINES["tfidf"], "fit", kill)
        with pytest.raises(KilledError):
            make()
    before = stored(tmp_path)
    assert len(before) == 4
    assert not (tmp_path / "test_opened.json").exists()
    make()
    after = stored(tmp_path)
    assert {name: after[name] for name in before} == before


@pytest.mark.unchecked
def test_no_test_data_is_read_before_every_row_has_its_validation_results(
    make: Callable[..., Made], tmp_path: Path
):
    seen: list[tuple[int, bool]] = []

    def look() -> None:
        fitted = len(list((tmp_path / "runs").glob("*/result.npz")))
        seen.append((fitted, (tmp_path / "test_opened.json").exists()))

    make(data=Data(on_test=look))
    assert seen
    assert set(seen) == {(5, True)}


def test_a_changed_row_is_made_anew_and_the_earlier_opening_is_told(
    finished: Finished, make: Callable[..., Made], tmp_path: Path
):
    before = finished.copied(tmp_path)
    changed = make(TABLE.replace("epochs = 2", "epochs = 1"))
    after = stored(tmp_path)
    assert {name.split("-seed")[0] for name in after.keys() - before.keys()} == {"runs/pooling"}
    assert {name: after[name] for name in before} == before
    openings = json.loads((tmp_path / "test_opened.json").read_text())
    assert len(openings) == 2
    assert openings[0]["config"] != openings[1]["config"]
    assert any("opened before" in note for note in changed.notes)


def test_a_subset_without_a_positive_text_leaves_ranking_undefined(
    make: Callable[..., Made], tmp_path: Path
):
    negative = np.flatnonzero(examples("binary", 70, 3).labels == 0)
    made = make(data=Data(parts={"no, positives": negative}))
    row = rows_of(made, table=1)["tfidf"]
    assert row["metrics"]["auprc"]["mean"] is None
    assert row["ours_minus_this"] == {"value": None, "ci": [None, None], "p": None}
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    assert "bars_no,_positives.png" in drawn
    assert "precision_recall_no,_positives.png" not in drawn


def test_rows_can_be_chosen_and_data_cut(tiny: TransformersBackbone, cache: Path, tmp_path: Path):
    chosen = recipe().only(["pooling", "tfidf"])
    data = Data(parts={"odd": np.arange(1, 70, 2)})
    tools = Tools(tiny, lambda _name: data, _no_search, cache)
    made = reproduce(chosen, tmp_path, text=TABLE, tools=tools, limit=40)
    assert list(rows_of(made)) == ["pooling", "tfidf"]
    assert made.tables[0].texts == 40
    assert 0 < made.tables[1].texts < 35
    assert any("At most 40 rows" in note for note in made.notes)
    assert all(row.difference is None for row in made.tables[0].rows)
    assert grid(made.tables[0]).headings[-3:] == ("validation AUPRC", "parameters", "single pass")
    assert not any("Ours is" in note for note in made.notes)
    with pytest.raises(SidelightError, match="Did you mean 'pooling'"):
        recipe().only(["poling"])


def test_a_searched_probe_is_trained_as_the_search_says(make: Callable[..., Made], tmp_path: Path):
    asked: list[str] = []

    def search(dataset: ProbeDataset, mechanism: str, storage: Path) -> Found:
        asked.append(mechanism)
        assert storage.parent.is_dir()
        found = suggested(mechanism)
        return replace(found, settings=found.settings.changed(epochs=1, learning_rate=5e-3))

    text = TABLE.replace("settings = { epochs = 2 }", "search = true")
    make(text, search=search)
    assert asked == ["pooling"]
    (folder, _) = sorted((tmp_path / "runs").glob("pooling-*/probe"))
    settings = load_probe(folder).record["settings"]
    assert (settings["epochs"], settings["learning_rate"]) == (1, 5e-3)


@pytest.mark.unchecked
def test_a_transfer_is_tested_on_the_other_data_set(make: Callable[..., Made]):
    @dataclass
    class Renamed(Data):
        """The same question, its labels named otherwise."""

        @property
        def test(self) -> Examples:
            task = replace(TASKS["binary"], labels=("0", "1"))
            return replace(examples("binary", 70, 3), task=task)

    sets = {
        "planted": Data(on_test=lambda: pytest.fail("the training set's test part was read")),
        "other": Renamed(title="Other"),
    }
    text = TABLE.replace('"comparison"', '"transfer"\ntest_data = "other"')
    made = make(text, load=sets.__getitem__)
    assert made.tables[0].title == "Other, all"
    told = [note for note in made.notes if ": " in note and "opened" not in note]
    assert told == ["Planted: Made up for tests.", "Other: 3 test rows have a cold."]
    sets["planted"].training = sets["other"].test.select([*range(5), *range(70)])
    sets["planted"].training = replace(sets["planted"].training, task=TASKS["binary"])
    made = make(text, load=sets.__getitem__)
    assert "70 of 70 test texts are among the training texts too." in made.notes
    assert rows_of(made)["readout"]["metrics"]["auprc"]["mean"] > 0.9


def test_a_few_shot_draw_has_as_many_texts_of_each_class(make: Callable[..., Made], tmp_path: Path):
    text = TABLE.replace('"comparison"', '"few-shot"\nlabels_per_class = 8\ndraws = 3')
    made = make(text)
    rows = rows_of(made)
    assert [len(row["seeds"]) for row in rows.values()] == [3, 3, 3]
    hashes = set()
    for folder in (tmp_path / "runs").glob("pooling-*/probe"):
        record = load_probe(folder).record
        for part in ("training", "validation"):
            assert record[part]["classes"] == {"fine": 8, "toxic": 8}
        hashes.add(record["training"]["sha256"])
    assert len(hashes) == 3
    assert "draws" in made.how
    values = {name: row["metrics"]["auprc"]["values"] for name, row in rows.items()}
    shown = rows["tfidf"]["ours_minus_this"]
    mean = np.mean(np.subtract(values["readout"], values["tfidf"]))
    assert shown["value"] == pytest.approx(mean)


def test_a_sweep_trains_every_probe_with_every_value(make: Callable[..., Made], tmp_path: Path):
    text = TABLE.partition("[[baseline]]")[0].replace('"comparison"', '"sensitivity"')
    text = text.replace('ours = ["readout"]', "")
    sweep = '[sweep]\nparameter = "learning_rate"\nvalues = [1e-3, 1e-2]\n'
    made = make(text + sweep)
    names = ["pooling, learning_rate 0.001", "pooling, learning_rate 0.01",
             "readout, learning_rate 0.001", "readout, learning_rate 0.01"]  # fmt: skip
    assert list(rows_of(made)) == names
    assert (tmp_path / "plots" / "sweep_all.png").exists()
    options = text + '[sweep]\nparameter = "heads"\nvalues = [1, 4]\n'
    only = recipe(options).only(["readout"])
    assert [row.spec.options["heads"] for row in build_rows(only, suggested).probes] == [1, 4]


def test_several_classes_make_a_table(make: Callable[..., Made], tmp_path: Path):
    text = TABLE.replace('"auprc"', '"accuracy"').replace("seeds = 2", "seeds = 1")
    made = make(text, data=Data("multiclass"))
    row = rows_of(made)["readout"]
    labels = Data("multiclass").test.labels
    (file,) = (tmp_path / "runs").glob("readout-*/test-*.npz")
    logits = np.load(file)["logits"]
    (probe,) = map(load_probe, (tmp_path / "runs").glob("readout-*/probe"))
    right = probe.calibration.apply(logits).argmax(1) == labels
    assert row["metrics"]["accuracy"]["mean"] == pytest.approx(right.mean())


def test_a_validation_score_is_that_of_the_stored_logits(make: Callable[..., Made], tmp_path: Path):
    row = rows_of(make())["tfidf"]
    (file,) = (tmp_path / "runs").glob("tfidf-*/result.npz")
    data = Data().validation
    score = validation_score(data.task, np.load(file)["validation_logits"], data.labels)
    assert row["validation"]["values"] == [score]


def test_cached_states_give_the_logits_of_a_forward_pass(
    finished: Finished, tiny: TransformersBackbone, cache: Path
):
    probes = [load_probe(path) for path in sorted((finished.folder / "runs").glob("*/probe"))]
    split = make_split(tiny, Data().test, reads=Reads(), max_tokens=512, cache_root=cache)
    named = [replace(probe, name=str(place)) for place, probe in enumerate(probes)]
    expected = score(tiny, Bank(named), split.prompts)
    for own, other in zip(score_split(probes, split, device=tiny.device), expected, strict=True):
        # Cached states are bfloat16: 8 bits of mantissa.
        np.testing.assert_allclose(own, other, atol=0.02 * np.abs(other).max())


def judged_row(name: str, seed: int, runs: int, labels: np.ndarray, strength: float) -> JudgedRow:
    random = np.random.default_rng(seed)
    made = []
    for run in range(runs):
        logits = strength * (labels - 0.5) + random.normal(size=len(labels))
        chances = 1 / (1 + np.exp(-logits))
        made.append(Judged(run, 0.5, chances[:, None], (0.5,), 1.0, 1))
    return JudgedRow(name, name, True, tuple(made))


def drawn(metric: str, *rows: JudgedRow, labels: np.ndarray, resamples: int) -> list[np.ndarray]:
    scored = Scored(TASKS["binary"], labels, rows)
    return [mean_draws(scored, row, metric=metric, resamples=resamples) for row in rows]


def test_a_difference_is_that_of_a_plain_bootstrap():
    labels = np.random.default_rng(0).integers(0, 2, 150)
    ours = judged_row("ours", 1, 1, labels, 2.0)
    theirs = judged_row("theirs", 2, 1, labels, 1.4)
    found = difference(*drawn("f1", ours, theirs, labels=labels, resamples=4000))

    texts = np.random.default_rng(7).integers(150, size=(4000, 150))
    texts = np.vstack([np.arange(150), texts])

    def f1(row: JudgedRow) -> np.ndarray:
        flagged = (row.runs[0].probabilities[:, 0] >= 0.5).astype(int)
        both = (flagged * labels)[texts].sum(1)
        return 2 * both / (flagged + labels)[texts].sum(1)

    value, *draws = f1(ours) - f1(theirs)
    low, high = np.percentile(draws, [2.5, 97.5])
    assert found.estimate.value == pytest.approx(value)
    # Two independent sets of 4,000 resamples: an end of an interval varies by about .003.
    assert found.estimate.low == pytest.approx(low, abs=0.015)
    assert found.estimate.high == pytest.approx(high, abs=0.015)
    assert found.p_value == pytest.approx(2 * np.mean(np.array(draws) <= 0), abs=0.02)


@pytest.mark.parametrize("metric", METRICS)
def test_a_row_does_not_differ_from_itself(metric: str):
    labels = np.random.default_rng(0).integers(0, 2, 150)
    row = judged_row("row", 1, 2, labels, 2.0)
    same = difference(*drawn(metric, row, row, labels=labels, resamples=50))
    assert same == Difference(Estimate(0.0, 0.0, 0.0), 1.0)


def test_a_clear_improvement_is_found_and_changes_sign_when_swapped():
    labels = np.random.default_rng(0).integers(0, 2, 150)
    good, bad = (judged_row(name, 1, 2, labels, n) for name, n in {"good": 3.0, "bad": 0.5}.items())
    draws = drawn("auroc", good, bad, labels=labels, resamples=1000)
    gain, loss = difference(*draws), difference(*draws[::-1])
    assert gain.estimate.low > 0
    assert gain.p_value < 0.01
    assert loss.estimate.value == -gain.estimate.value
    assert loss.p_value == gain.p_value


@pytest.mark.parametrize("metric", METRICS)
def test_reports_and_differences_see_the_same_resamples(metric: str):
    labels = np.random.default_rng(0).integers(0, 2, 150)
    row = judged_row("row", 1, 1, labels, 2.0)
    (draws,) = drawn(metric, row, labels=labels, resamples=1000)
    report = evaluate(TASKS["binary"], row.runs[0].probabilities, labels, thresholds=(0.5,))
    assert Estimate.of(draws) == report.metrics[metric]


def test_the_difference_is_of_means_over_seeds():
    labels = np.random.default_rng(0).integers(0, 2, 120)
    ours, theirs = (judged_row("a", 1, 3, labels, 2.0), judged_row("b", 2, 2, labels, 1.0))
    scored = Scored(TASKS["binary"], labels, (ours, theirs))

    def mean(row: JudgedRow) -> float:
        reports = [
            evaluate(scored.task, run.probabilities, labels, thresholds=(0.5,), bootstrap=0)
            for run in row.runs
        ]
        return float(np.mean([report.metrics["auprc"].value for report in reports]))

    draws = [mean_draws(scored, row, metric="auprc", resamples=50) for row in scored.rows]
    assert difference(*draws).estimate.value == pytest.approx(mean(ours) - mean(theirs))


def test_a_test_over_draws_counts_sign_flips():
    ours, theirs = np.array([0.5, 0.6, 0.7, 0.8]), np.array([0.4, 0.4, 0.4, 0.4])
    found = difference_over_draws(ours, theirs)
    assert found.estimate.value == pytest.approx(0.25)
    # Of the 16 ways to flip four positive differences, two are as far from zero.
    assert found.p_value == pytest.approx(2 / 16)


def test_draws_in_which_a_metric_is_undefined_are_left_out():
    ours, theirs = np.array([0.5, np.nan, 0.7]), np.array([0.4, 0.4, 0.4])
    assert difference_over_draws(ours, theirs) == difference_over_draws(ours[::2], theirs[::2])
    undefined = difference_over_draws(np.full(3, np.nan), theirs)
    assert undefined == Difference(Estimate(None, None, None), None)


def test_a_draw_that_a_row_lacks_is_left_out_whichever_row_it_is():
    labels = np.random.default_rng(0).integers(0, 2, 60)
    long = judged_row("long", 1, 4, labels, 2.0)
    short = judged_row("short", 2, 4, labels, 1.0)
    short = replace(short, runs=short.runs[1::2])
    scored = Scored(TASKS["binary"], labels, (long, short))
    given = {"title": "t", "metric": "auprc", "are_draws": True}
    forth, back = (measure_rows(scored, ours=name, **given) for name in ("long", "short"))
    found = forth.rows[1].difference.estimate.value
    values = [forth.rows[number].spread("auprc").values for number in (0, 1)]
    assert found == pytest.approx(np.mean(np.subtract(values[0][1::2], values[1])))
    assert back.rows[0].difference.estimate.value == pytest.approx(-found)


def test_a_run_that_diverges_is_left_out_and_told(make: Callable[..., Made], tmp_path: Path):
    made = make(TABLE.replace("epochs = 2", "epochs = 2, weight_decay = 1e38"))
    assert list(rows_of(made)) == ["readout", "tfidf"]
    assert sum("'pooling' with seed" in note and "diverged" in note for note in made.notes) == 2
    before = stored(tmp_path)
    assert rows_of(make(TABLE.replace("epochs = 2", "epochs = 2, weight_decay = 1e38")))
    assert stored(tmp_path) == before


def test_validation_texts_that_cannot_choose_are_refused_before_any_work(
    make: Callable[..., Made], tmp_path: Path
):
    data = Data()
    data.validation = data.validation.select(np.flatnonzero(data.validation.labels == 0))
    with pytest.raises(SidelightError, match="no 'toxic' text"):
        make(data=data)
    assert not (tmp_path / "runs").exists()


def test_other_test_texts_are_another_opening(make: Callable[..., Made], tmp_path: Path):
    head, _, tail = TABLE.partition("[[probe]]")
    text = head.replace('ours = ["readout"]', "") + "".join(tail.rpartition("[[baseline]]")[1:])

    @dataclass
    class Longer(Data):
        @property
        def test(self) -> Examples:
            return examples("binary", 80, 4)

    assert not any("opened before" in note for note in make(text).notes)
    assert any("opened before" in note for note in make(text, data=Longer()).notes)
    assert not any("opened before" in note for note in make(text).notes)
    openings = json.loads((tmp_path / "test_opened.json").read_text())
    assert len({one["test"] for one in openings}) == len(openings) == 2
    assert any("opened before" in note for note in make(text, limit=60).notes)


def test_names_cannot_break_a_table():
    one = Grid("50 % of {a}", ("row", "x"), (("a|b $x_1^2~\\", "1"),), None)
    assert r"| a\|b $x_1^2~\ | 1 |" in markdown(one)
    assert r"a|b \$x\_1\textasciicircum{}2\textasciitilde{}\textbackslash{} & 1 \\" in latex(one)
    assert r"\caption{50 \% of \{a\}}" in latex(one)


def test_a_terminal_shows_what_rows_are_compared_by():
    headings = ("row", "macro F1", "AUPRC", "validation AUPRC", "parameters")
    shown = terminal(Grid("t", headings, (("a", "1", "2", "3", "4"),), None))
    assert [column.header for column in shown.columns] == ["row", "macro F1", "AUPRC"]
    headings = ("row", "AUPRC", "macro F1")
    shown = terminal(Grid("t", headings, (("a", "1", "2"),), None))
    assert [column.header for column in shown.columns] == ["row", "AUPRC"]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["own"], "give --train and --test"),
        (["sst2", "--only", " , "], "No row is named. Known: .*pooling"),
    ],
)
def test_a_table_of_nothing_is_refused_with_the_remedy(arguments, remedy, tmp_path: Path):
    with pytest.raises(SidelightError, match=remedy):
        CliRunner().invoke(command, [*arguments, "--out", str(tmp_path)], catch_exceptions=False)


def test_rows_that_are_left_are_those_compared():
    text = TABLE.replace('ours = ["readout"]', 'ours = ["readout", "pooling"]')
    assert recipe(text).only(["tfidf", "pooling"]).ours == ("pooling",)


@pytest.mark.parametrize("option", ["--seeds", "--limit", "--folds", "--train", "--only"])
def test_a_latency_table_takes_no_option_of_training(option: str, tmp_path: Path):
    arguments = ["latency", "--out", str(tmp_path), option, "3"]
    with pytest.raises(SidelightError, match=f"takes no {option}"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_of_the_package_parse(name: str):
    parsed = parse_recipe(recipe_text(name), name=name)
    assert set(parsed.ours) <= set(parsed.names())


def test_the_package_has_a_recipe_for_every_table():
    assert set(recipe_names()) >= {
        "toxicchat", "sst2", "emotion", "imdb", "wildguardmix", "ood", "downcast", "latency",
        "sensitivity", "fewshot",
    }  # fmt: skip


@pytest.mark.parametrize("name", [n for n in recipe_names() if n != "latency"])
def test_recipes_of_the_package_name_what_exists(name: str):
    parsed = parse_recipe(recipe_text(name), name=name)
    rows = build_rows(parsed, suggested)
    swept = len(parsed.sweep.values) if parsed.sweep else 1
    assert len(rows.probes) == swept * len(parsed.probe)
    assert [row.name for row in rows.baselines] == [row.name for row in parsed.baseline]


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_ask_a_prompted_model_about_the_classes(name: str):
    for row in parse_recipe(recipe_text(name), name=name).baseline:
        if row.key in ("zero_shot", "few_shot"):
            # The data's own names may be 0 and 1, which say nothing to the model.
            assert "question" in row.options or name == "own"
            assert "names" in row.options or name in ("own", "emotion", "fewshot-emotion")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("metric =", "metrc ="), r"unknown key 'metrc'.* Did you mean 'metric'"),
        (("options =", "optins ="), r"unknown key 'probe.1.optins'.* Did you mean 'options'"),
        (("seeds = 1", "seed = 1"), r"unknown key 'baseline.0.seed'.* Did you mean 'seeds'"),
        (("seeds = 2", 'seeds = "2"'), "seeds"),
        (('"auprc"', '"auprcc"'), "metric is one of"),
        (('ours = ["readout"]', 'ours = ["readot"]'), "'ours' lists rows"),
        (('"comparison"', '"transfer"'), "test_data"),
        (('"comparison"', '"sensitivity"'), "sweep"),
        (('name = "pooling"', 'name = "readout"'), "name of its own"),
        (("title =", "title"), "not plain TOML"),
        (("seeds = 2", "seeds = 0"), "1 or more"),
        (("seeds = 1", "seeds = 0"), "1 or more"),
        (
            ('"comparison"', '"sensitivity"\nsweep = { parameter = "epochs", values = [] }'),
            "values",
        ),
        (
            ('"comparison"', '"sensitivity"\nsweep = { parameter = "epochs", values = [2, 2] }'),
            "differ",
        ),
    ],
)
def test_a_mistake_in_a_recipe_is_refused(change: tuple[str, str], complaint: str):
    with pytest.raises(SidelightError, match=complaint):
        parse_recipe(TABLE.replace(*change, 1), name="test")


def test_a_sweep_has_no_row_that_is_ours():
    text = TABLE.partition("[[baseline]]")[0].replace('"comparison"', '"sensitivity"')
    with pytest.raises(SidelightError, match="no 'ours'"):
        recipe(text + '[sweep]\nparameter = "epochs"\nvalues = [1, 2]\n')


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (('mechanism = "pooling"', 'mechanism = "poling"'), "Did you mean 'pooling'"),
        (('name = "tfidf"', 'name = "tfdf"'), "Did you mean 'tfidf'"),
        (("epochs = 2", "epoch = 2"), "Did you mean 'epochs'"),
        (("heads = 2", "head = 2"), "Did you mean 'heads'"),
        (("epochs = 2", 'epochs = "two"'), "Setting epochs cannot be 'two'"),
        (("epochs = 2", "epochs = 2.5"), "Setting epochs cannot be 2.5"),
        (("epochs = 2", "epochs = 0"), "epochs = 0: give 1 or more"),
        (("epochs = 2", 'layer_weights = "equl"'), "Setting layer_weights cannot be 'equl'"),
        (("seeds = 1", "options = { strenght = 1.0 }"), "Did you mean 'strength'"),
        (("seeds = 1", 'options = { strength = "x" }'), "tfidf.strength cannot be 'x'"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_before_any_work(
    change: tuple[str, str], complaint: str, make: Callable[..., Made], tmp_path: Path
):
    with pytest.raises(SidelightError, match=re.escape(complaint)):
        make(TABLE.replace(*change, 1), load=lambda _name: pytest.fail("data was loaded"))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def local(tiny: TransformersBackbone, tmp_path: Path) -> list[str]:
    """Options of the command for a saved model and a made-up data set."""
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    for seed, split in enumerate(("train_sentences", "validation", "test")):
        texts, labels = planted("binary", 60, seed=seed)
        rows = [{"text": t, "label": int(n)} for t, n in zip(texts, labels, strict=True)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = {"model": tmp_path / "model", "data": tmp_path / "data", "out": tmp_path / "out"}
    return [word for name, path in places.items() for word in (f"--{name}", str(path))]


@pytest.mark.usefixtures("own_cache")
def test_the_command_makes_a_table_of_local_files(local: list[str], tmp_path: Path):
    arguments = ["sst2", *local, "--only", "readout,tfidf", "--seeds", "1"]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "TF-IDF" in done.output
    assert "had not been opened" in done.output
    assert (tmp_path / "out" / "table.md").exists()


@pytest.mark.usefixtures("own_cache")
def test_a_latency_recipe_times_random_and_real_prompts(local: list[str], tmp_path: Path):
    path = tmp_path / "latency.toml"
    path.write_text(
        'title = "Latency"\nkind = "latency"\ndata = "sst2"\n'
        "[latency]\nbatch_sizes = [1]\ntokens = [16]\ntexts = 2\nrepeats = 1\n"
    )
    done = CliRunner().invoke(command, [str(path), *local, "--json"], catch_exceptions=False)
    rows = json.loads(done.stdout)["rows"]
    assert {row["load"] for row in rows} == {"16 tokens", "2 SST-2 texts"}
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "latency.json", "latency.md", "recipe.toml", "environment.json",
    }  # fmt: skip


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(SidelightError, match="Did you mean 'toxicchat'"):
        recipe_text("toxichat")
