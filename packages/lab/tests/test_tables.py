"""Tables from recipes, end to end on a tiny backbone and made-up data."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from planted_data import TABLE, Data, context_of, recipe, rows_of, stored

from sidelight.data.evaluation import evaluate
from sidelight.probes.artifact import load_probe
from sidelight.probes.bank import Bank
from sidelight.states.extraction import cached_logits
from sidelight.statistics.metrics import decide
from sidelight.training.dataset import make_split
from sidelight.training.settings import FitOptions
from sidelight_lab.baselines import BASELINES
from sidelight_lab.tables.reproduce import reproduce
from sidelight_lab.tables.writing import FinishedTable, cells
from worlds.data import TASKS, examples
from worlds.models import score

pytestmark = pytest.mark.slow
ONE_SEED = TABLE.replace("seeds = 2", "seeds = 1")


class KilledError(Exception):
    """Stands for the end of the process."""


@dataclass(frozen=True)
class Finished:
    folder: Path
    table: FinishedTable


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("activations")


@pytest.fixture(scope="module")
def finished(tiny, cache, tmp_path_factory):
    """The table with two subsets; tests that change the folder copy it."""
    folder = tmp_path_factory.mktemp("finished")
    negative = np.flatnonzero(examples("binary", 70, 3).labels == 0)
    data = Data(splits={"odd": np.arange(1, 70, 2), "no, positives": negative})
    return Finished(folder, reproduce(context_of(tiny, folder, cache, data=data)))


@pytest.fixture
def make(tiny, cache, tmp_path):
    """Makes a table in ``tmp_path`` from a recipe's TOML."""

    def run(text: str = TABLE, **options: object) -> FinishedTable:
        return reproduce(context_of(tiny, tmp_path, cache, text=text, **options))

    return run


def test_comparison_runs_end_to_end(finished):
    table, folder = finished.table, finished.folder
    assert [table.title for table in table.tables] == [
        "Planted, all", "Planted, odd", "Planted, no, positives",
    ]  # fmt: skip
    rows = rows_of(table)
    assert [len(row["seeds"]) for row in rows.values()] == [2, 2, 1]
    assert rows["readout"]["metrics"]["auprc"]["mean"] > 0.9
    assert rows["readout"]["ours_minus_this"] is None
    assert rows["pooling"]["ours_minus_this"]["p"] is not None
    # Without a positive text, ranking is undefined.
    row = rows_of(table, 2)["tfidf"]
    assert row["metrics"]["auprc"]["mean"] is None
    assert row["ours_minus_this"] == {"value": None, "ci": [None, None], "p": None}
    written = {path.name for path in folder.iterdir() if path.is_file()}
    assert written == {
        "table.md", "table.json", "table.tex", "recipe.toml", "environment.json", "data.md",
        "test_opened.json",
    }  # fmt: skip
    assert (folder / "recipe.toml").read_text() == TABLE
    page = (folder / "table.md").read_text()
    for words in ("Made up for tests.", "had not been read before", "- Ours is 'readout'."):
        assert words in page


def test_table_metrics_match_evaluate_on_stored_probes(finished, tiny, cache):
    folders = sorted((finished.folder / "runs").glob("*/probe"))
    probes = [load_probe(path).changed(name=path.parent.name) for path in folders]
    split = make_split(tiny, Data().test, FitOptions(max_tokens=512, cache_root=cache))
    expected = score(tiny, Bank(probes), split.states.prompts)
    for probe, expected_logits in zip(probes, expected, strict=True):
        actual_logits = cached_logits(probe, split.states)
        # Cached states are bfloat16: 8 bits of mantissa.
        np.testing.assert_allclose(
            actual_logits, expected_logits, atol=0.02 * np.abs(expected_logits).max()
        )
    reports = [
        evaluate(
            decide(
                probe.task,
                probe.calibration.apply(logits),
                split.labels,
                thresholds=probe.thresholds,
            )
        )
        for probe, logits in zip(probes, expected, strict=True)
        if probe.name.startswith("readout")
    ]
    # Of the float32 states, which moves metrics of ranks little.
    for metric in ("auprc", "f1", "ece"):
        values_in_table = rows_of(finished.table)["readout"]["metrics"][metric]["values"]
        values = [report.metrics[metric].value for report in reports]
        assert values_in_table == pytest.approx(values, abs=0.02)


def test_table_cells_contain_the_metrics(finished):
    table, folder = finished.table, finished.folder
    row = rows_of(table)["readout"]
    f1 = row["metrics"]["f1"]
    cell = f"{f1['mean']:.3f} ± {f1['sd']:.3f}"
    assert f1["sd"] == pytest.approx(np.std(f1["values"], ddof=1))
    page = (folder / "table.md").read_text().split("##")[1]
    (line,) = [line for line in page.splitlines() if line.startswith("| readout")]
    for cell_text in (cell, f"{row['parameters']:,}"):
        assert cell_text in line
    chosen = row["chosen"]
    assert chosen["seed"] == row["seeds"][int(np.argmax(row["validation"]["values"]))]
    assert cell in (folder / "table.tex").read_text()
    assert (folder / "table.json").read_text() == json.dumps(table.to_dict(), indent=2) + "\n"


def test_second_run_recomputes_only_deleted_or_changed_rows(finished, make, tmp_path):
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    before = stored(tmp_path)
    assert rows_of(make()) == rows_of(finished.table)
    assert stored(tmp_path) == before
    (gone,) = (tmp_path / "runs").glob("readout-seed1-*")
    shutil.rmtree(gone)
    again = rows_of(make())
    after = stored(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {
        name for name in before if name.startswith(f"runs/{gone.name}/")
    }
    for name, row in rows_of(finished.table).items():
        # Alone, its matmuls are narrower, which rounds differently.
        values = row["metrics"]["auprc"]["values"]
        assert values == pytest.approx(again[name]["metrics"]["auprc"]["values"])
    # A changed row is made anew, and the earlier opening is told.
    changed = make(TABLE.replace("epochs = 2", "epochs = 1"))
    new = stored(tmp_path)
    assert {name.split("-seed")[0] for name in new.keys() - after.keys()} == {"runs/pooling"}
    assert {name: new[name] for name in after} == after
    first, *_, last = json.loads((tmp_path / "test_opened.json").read_text())
    assert first["config"] != last["config"]
    assert any("had been read before" in note for note in changed.notes)


def test_killed_run_resumes_and_opens_the_test_set_last(make, tmp_path, monkeypatch):
    opened: list[tuple[int, bool]] = []

    def kill(*_: object, **__: object) -> None:
        raise KilledError

    def open_test() -> None:
        opened.append((len(stored(tmp_path)), (tmp_path / "test_opened.json").exists()))
        kill()

    # Between two rows.
    with monkeypatch.context() as patch:
        patch.setattr(BASELINES["tfidf"], "fit", kill)
        with pytest.raises(KilledError):
            make(data=Data(on_test=open_test))
    probes = stored(tmp_path)
    assert len(probes) == 4
    assert not (tmp_path / "test_opened.json").exists()
    # When the test is read.
    with pytest.raises(KilledError):
        make(data=Data(on_test=open_test))
    assert opened == [(5, True)]
    (file,) = (tmp_path / "runs").glob("tfidf-*/result.npz")
    seconds = float(np.load(file)["seconds"])
    # A baseline has no file format: it is fitted once more, with the same seed, for the test.
    assert rows_of(make())["tfidf"]["seconds"] == [seconds]
    after = stored(tmp_path)
    assert {name: after[name] for name in probes} == probes


def test_rows_can_be_selected_and_data_limited(make):
    chosen = recipe().only(["pooling", "tfidf"])
    data = Data(splits={"odd": np.arange(1, 70, 2)})
    table = make(data=data, recipe=chosen, limit=40)
    assert list(rows_of(table)) == ["pooling", "tfidf"]
    assert table.tables[0].texts == 40
    assert 0 < table.tables[1].texts < 35
    assert any("At most 40 rows" in note for note in table.notes)
    assert all(row.difference is None for row in table.tables[0].rows)
    assert cells(table.tables[0])[0][-3:] == ["validation AUPRC", "parameters", "single pass"]
    assert not any("Ours is" in note for note in table.notes)


def test_transfer_recipe_evaluates_on_the_other_dataset(make):
    # The same question, its labels named otherwise.
    renamed = replace(TASKS["binary"], labels=("0", "1"))
    tested = replace(examples("binary", 70, 3), task=renamed)
    shared = replace(tested.select([*range(5), *range(70)]), task=TASKS["binary"])
    closed = lambda: pytest.fail("the training set's test part was read")  # noqa: E731
    sets = {
        "planted": Data(training=shared, on_test=closed),
        "other": Data(title="Other", tested=tested),
    }
    text = ONE_SEED.replace('"comparison"', '"transfer"\ntest_data = "other"')
    table = make(text, load=sets.__getitem__)
    assert table.tables[0].title == "Other, all"
    assert "70 of 70 test texts also occur in the training data." in table.notes
    assert rows_of(table)["readout"]["metrics"]["auprc"]["mean"] > 0.9


def test_few_shot_draws_balance_the_classes(make, tmp_path):
    table = make(TABLE.replace('"comparison"', '"few-shot"\nlabels_per_class = 8\ndraws = 3'))
    rows = rows_of(table)
    assert [len(row["seeds"]) for row in rows.values()] == [3, 3, 3]
    hashes = set()
    for folder in (tmp_path / "runs").glob("pooling-*/probe"):
        record = load_probe(folder).card.training
        for texts in (record.training, record.validation):
            assert texts.classes == {"fine": 8, "toxic": 8}
        hashes.add(record.training.sha256)
    assert len(hashes) == 3
    assert "draws" in table.how


def test_sweep_trains_every_probe_with_every_value(make):
    text = ONE_SEED.partition("[[baseline]]")[0].replace('"comparison"', '"sensitivity"')
    text = text.replace('ours = ["readout"]', "")
    table = make(text + '[sweep]\nparameter = "learning_rate"\nvalues = [1e-3, 1e-2]\n')
    assert list(rows_of(table)) == [
        f"{name}, learning_rate {rate}" for name in ("pooling", "readout") for rate in (0.001, 0.01)
    ]


def test_diverged_runs_are_left_out_and_noted(make):
    table = make(ONE_SEED.replace("epochs = 2", "epochs = 2, weight_decay = 1e38"))
    assert list(rows_of(table)) == ["readout", "tfidf"]
    assert sum("'pooling' with seed" in note and "diverged" in note for note in table.notes) == 1


def test_changed_test_texts_count_as_a_separate_opening(make, tmp_path):
    head, _, tail = TABLE.partition("[[probe]]")
    text = head.replace('ours = ["readout"]', "") + "".join(tail.rpartition("[[baseline]]")[1:])
    longer = Data(tested=examples("binary", 80, 4))
    assert not any("had been read before" in note for note in make(text).notes)
    assert any("had been read before" in note for note in make(text, data=longer).notes)
    assert not any("had been read before" in note for note in make(text).notes)
    openings = json.loads((tmp_path / "test_opened.json").read_text())
    assert len({one["test"] for one in openings}) == len(openings) == 2
