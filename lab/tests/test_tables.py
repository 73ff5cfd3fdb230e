"""Tables from recipes, end to end on a tiny backbone and made-up data."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from planted_tables import TABLE, Data, context_of, examples, recipe, rows_of, stored

from corpora import TASKS
from sidelight.artifact import load_probe
from sidelight.backbone import TransformersBackbone
from sidelight.bank import Bank
from sidelight.errors import SidelightError
from sidelight.evaluation import evaluate
from sidelight.states.extraction import score
from sidelight.training.dataset import ProbeDataset, make_split
from sidelight.training.optimisation import validation_score
from sidelight.training.settings import FitOptions
from sidelight_lab.baselines import BASELINES
from sidelight_lab.tables.recipes import Configuration, build_rows, suggested
from sidelight_lab.tables.reproduce import reproduce
from sidelight_lab.tables.runs import score_split
from sidelight_lab.tables.writing import FinishedTable, grid

Make = Callable[..., FinishedTable]


class KilledError(Exception):
    """Stands for the end of the process."""


@dataclass(frozen=True)
class Finished:
    folder: Path
    table: FinishedTable

    def copied(self, target: Path) -> dict[str, int]:
        """Copies the folder; when each of its results was written."""
        shutil.copytree(self.folder, target, dirs_exist_ok=True)
        return stored(target)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("activations")


@pytest.fixture(scope="module")
def finished(
    tiny: TransformersBackbone, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """The table with a subset; tests that change the folder copy it."""
    folder = tmp_path_factory.mktemp("finished")
    data = Data(parts={"odd": np.arange(1, 70, 2)})
    return Finished(folder, reproduce(context_of(tiny, folder, cache, data=data)))


@pytest.fixture
def make(tiny: TransformersBackbone, cache: Path, tmp_path: Path) -> Make:
    """Makes a table in ``tmp_path`` from a recipe's TOML."""

    def run(text: str = TABLE, **given: object) -> FinishedTable:
        return reproduce(context_of(tiny, tmp_path, cache, text=text, **given))

    return run


@pytest.mark.slow
def test_a_comparison_is_made_end_to_end(finished: Finished):
    made, folder = finished.table, finished.folder
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
    rows = rows_of(finished.table)
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
    made, folder = finished.table, finished.folder
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
    assert json.loads((folder / "table.json").read_text()) == made.to_dict()


@pytest.mark.slow
def test_a_second_run_computes_nothing_and_says_the_same(
    finished: Finished, make: Make, tmp_path: Path
):
    before = finished.copied(tmp_path)
    assert rows_of(make()) == rows_of(finished.table)
    assert stored(tmp_path) == before


@pytest.mark.slow
def test_a_deleted_row_is_made_again_alone_and_alike(
    finished: Finished, make: Make, tmp_path: Path
):
    before = finished.copied(tmp_path)
    (gone,) = (tmp_path / "runs").glob("readout-seed1-*")
    shutil.rmtree(gone)
    again = rows_of(make())
    after = stored(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {
        name for name in before if name.startswith(f"runs/{gone.name}/")
    }
    for name, row in rows_of(finished.table).items():
        for metric, found in row["metrics"].items():
            # Alone, its matmuls are narrower, which rounds differently.
            assert found["values"] == pytest.approx(again[name]["metrics"][metric]["values"])


@pytest.mark.slow
@pytest.mark.unchecked
def test_a_killed_run_goes_on_from_every_row_that_was_finished(make: Make, tmp_path: Path):
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


@pytest.mark.slow
def test_a_run_killed_between_rows_keeps_the_rows_before(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.slow
@pytest.mark.unchecked
def test_no_test_data_is_read_before_every_row_has_its_validation_results(
    make: Make, tmp_path: Path
):
    seen: list[tuple[int, bool]] = []

    def look() -> None:
        fitted = len(list((tmp_path / "runs").glob("*/result.npz")))
        seen.append((fitted, (tmp_path / "test_opened.json").exists()))

    make(data=Data(on_test=look))
    assert seen
    assert set(seen) == {(5, True)}


@pytest.mark.slow
def test_a_changed_row_is_made_anew_and_the_earlier_opening_is_told(
    finished: Finished, make: Make, tmp_path: Path
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


@pytest.mark.slow
def test_a_subset_without_a_positive_text_leaves_ranking_undefined(make: Make, tmp_path: Path):
    negative = np.flatnonzero(examples("binary", 70, 3).labels == 0)
    made = make(data=Data(parts={"no, positives": negative}))
    row = rows_of(made, 1)["tfidf"]
    assert row["metrics"]["auprc"]["mean"] is None
    assert row["ours_minus_this"] == {"value": None, "ci": [None, None], "p": None}
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    assert "bars_no,_positives.png" in drawn
    assert "precision_recall_no,_positives.png" not in drawn


@pytest.mark.slow
def test_rows_can_be_chosen_and_data_cut(tiny: TransformersBackbone, cache: Path, tmp_path: Path):
    chosen = recipe().only(["pooling", "tfidf"])
    data = Data(parts={"odd": np.arange(1, 70, 2)})
    made = reproduce(context_of(tiny, tmp_path, cache, data=data, recipe=chosen, limit=40))
    assert list(rows_of(made)) == ["pooling", "tfidf"]
    assert made.tables[0].texts == 40
    assert 0 < made.tables[1].texts < 35
    assert any("At most 40 rows" in note for note in made.notes)
    assert all(row.difference is None for row in made.tables[0].rows)
    assert grid(made.tables[0]).headings[-3:] == ("validation AUPRC", "parameters", "single pass")
    assert not any("Ours is" in note for note in made.notes)
    with pytest.raises(SidelightError, match="Did you mean 'pooling'"):
        recipe().only(["poling"])


@pytest.mark.slow
def test_a_searched_probe_is_trained_as_the_search_says(make: Make, tmp_path: Path):
    asked: list[str] = []

    def search(dataset: ProbeDataset, mechanism: str, storage: Path) -> Configuration:
        asked.append(mechanism)
        assert storage.parent.is_dir()
        spec, settings = suggested(mechanism)
        return spec, settings.changed(epochs=1, learning_rate=5e-3)

    text = TABLE.replace("settings = { epochs = 2 }", "search = true")
    make(text, search=search)
    assert asked == ["pooling"]
    (folder, _) = sorted((tmp_path / "runs").glob("pooling-*/probe"))
    settings = load_probe(folder).record["settings"]
    assert (settings["epochs"], settings["learning_rate"]) == (1, 5e-3)


@pytest.mark.slow
@pytest.mark.unchecked
def test_a_transfer_is_tested_on_the_other_data_set(make: Make):
    # The same question, its labels named otherwise.
    renamed = replace(TASKS["binary"], labels=("0", "1"))
    tested = replace(examples("binary", 70, 3), task=renamed)
    closed = lambda: pytest.fail("the training set's test part was read")  # noqa: E731
    sets = {"planted": Data(on_test=closed), "other": Data(title="Other", tested=tested)}
    text = TABLE.replace('"comparison"', '"transfer"\ntest_data = "other"')
    made = make(text, load=sets.__getitem__)
    assert made.tables[0].title == "Other, all"
    told = [note for note in made.notes if ": " in note and "opened" not in note]
    assert told == ["Planted: Made up for tests.", "Other: 3 test rows have a cold."]
    shared = replace(tested.select([*range(5), *range(70)]), task=TASKS["binary"])
    sets["planted"] = Data(training=shared, on_test=closed)
    made = make(text, load=sets.__getitem__)
    assert "70 of 70 test texts are among the training texts too." in made.notes
    assert rows_of(made)["readout"]["metrics"]["auprc"]["mean"] > 0.9


@pytest.mark.slow
def test_a_few_shot_draw_has_as_many_texts_of_each_class(make: Make, tmp_path: Path):
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


@pytest.mark.slow
def test_a_sweep_trains_every_probe_with_every_value(make: Make, tmp_path: Path):
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
    assert [row.spec.options["heads"] for row in build_rows(only, suggested)] == [1, 4]


@pytest.mark.slow
def test_several_classes_make_a_table(make: Make, tmp_path: Path):
    text = TABLE.replace('"auprc"', '"accuracy"').replace("seeds = 2", "seeds = 1")
    made = make(text, data=Data("multiclass"))
    row = rows_of(made)["readout"]
    labels = Data("multiclass").test.labels
    (file,) = (tmp_path / "runs").glob("readout-*/test-*.npz")
    logits = np.load(file)["logits"]
    (probe,) = map(load_probe, (tmp_path / "runs").glob("readout-*/probe"))
    right = probe.calibration.apply(logits).argmax(1) == labels
    assert row["metrics"]["accuracy"]["mean"] == pytest.approx(right.mean())


@pytest.mark.slow
def test_a_validation_score_is_that_of_the_stored_logits(make: Make, tmp_path: Path):
    row = rows_of(make())["tfidf"]
    (file,) = (tmp_path / "runs").glob("tfidf-*/result.npz")
    data = Data().validation
    score = validation_score(data.task, np.load(file)["validation_logits"], data.labels)
    assert row["validation"]["values"] == [score]


def test_cached_states_give_the_logits_of_a_forward_pass(
    finished: Finished, tiny: TransformersBackbone, cache: Path
):
    probes = [load_probe(path) for path in sorted((finished.folder / "runs").glob("*/probe"))]
    split = make_split(tiny, Data().test, FitOptions(max_tokens=512, cache_root=cache))
    named = [replace(probe, name=str(place)) for place, probe in enumerate(probes)]
    expected = score(tiny, Bank(named), split.prompts)
    for own, other in zip(score_split(probes, split, device=tiny.device), expected, strict=True):
        # Cached states are bfloat16: 8 bits of mantissa.
        np.testing.assert_allclose(own, other, atol=0.02 * np.abs(other).max())


@pytest.mark.slow
def test_a_run_that_diverges_is_left_out_and_told(make: Make, tmp_path: Path):
    made = make(TABLE.replace("epochs = 2", "epochs = 2, weight_decay = 1e38"))
    assert list(rows_of(made)) == ["readout", "tfidf"]
    assert sum("'pooling' with seed" in note and "diverged" in note for note in made.notes) == 2
    before = stored(tmp_path)
    assert rows_of(make(TABLE.replace("epochs = 2", "epochs = 2, weight_decay = 1e38")))
    assert stored(tmp_path) == before


def test_validation_texts_that_cannot_choose_are_refused_before_any_work(
    make: Make, tmp_path: Path
):
    validation = examples("binary", 60, 2)
    data = Data(validation=validation.select(np.flatnonzero(validation.labels == 0)))
    with pytest.raises(SidelightError, match="no 'toxic' text"):
        make(data=data)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_other_test_texts_are_another_opening(make: Make, tmp_path: Path):
    head, _, tail = TABLE.partition("[[probe]]")
    text = head.replace('ours = ["readout"]', "") + "".join(tail.rpartition("[[baseline]]")[1:])

    longer = Data(tested=examples("binary", 80, 4))
    assert not any("opened before" in note for note in make(text).notes)
    assert any("opened before" in note for note in make(text, data=longer).notes)
    assert not any("opened before" in note for note in make(text).notes)
    openings = json.loads((tmp_path / "test_opened.json").read_text())
    assert len({one["test"] for one in openings}) == len(openings) == 2
    assert any("opened before" in note for note in make(text, limit=60).notes)


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
    change: tuple[str, str], complaint: str, make: Make, tmp_path: Path
):
    with pytest.raises(SidelightError, match=re.escape(complaint)):
        make(TABLE.replace(*change, 1), load=lambda _name: pytest.fail("data was loaded"))
    assert not list(tmp_path.iterdir())
