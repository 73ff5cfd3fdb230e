"""A search chooses on validation data alone, from few reads, and goes on after a kill."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import optuna
import pytest
from killed_search import PLAN, dataset_at
from matplotlib.image import imread
from planted_data import write_rows
from sklearn.metrics import average_precision_score

from commands import run, saved
from sidelight.cli import main
from sidelight.errors import SidelightError
from sidelight.manifest import read_manifest
from sidelight.mechanisms.base import Geometry, mechanism_names, mechanism_spec
from sidelight.training.dataset import ProbeDataset
from sidelight.training.loop import train_mechanisms
from sidelight.training.settings import Job, TrainingSettings, suggested_settings
from sidelight_lab import search
from sidelight_lab.cli.search import write_search
from sidelight_lab.search import SPACES, Range, Space, possible_specs, search_settings

pytestmark = pytest.mark.slow
SMOLLM2 = Geometry(layers=31, width=576, outputs=1)
# The mechanism that costs least, and one generation.
BRIEF = {"trials": 2, "generation": 2, "seed": 0}


def exactly(mechanism: str) -> TrainingSettings:
    """The suggested settings, not adapted to few texts: a search says what it trains."""
    return replace(suggested_settings(mechanism), least_steps=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("activations")


@pytest.fixture
def dataset(tiny, cache):
    return dataset_at(tiny, cache)


@pytest.fixture
def reads(dataset):
    """One entry for each read of the training states."""
    found = []
    dataset.training.states.on_read = lambda: found.append(1)
    return found


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    return tmp_path_factory.mktemp("search") / "new" / "journal"


@pytest.fixture(scope="module")
def found(tiny, cache, journal):
    """The plan's search, not disturbed."""
    return search_settings(dataset_at(tiny, cache), "gate", storage=journal, **PLAN)


def configurations(best):
    return [(trial.spec, trial.settings) for trial in best.trials]


def test_another_seed_tries_other_settings_after_the_defaults(dataset, found, tmp_path):
    plan = {**PLAN, "trials": 3, "seed": 1}
    other = search_settings(dataset, "gate", storage=tmp_path / "other", **plan)
    tried = configurations(found) + configurations(other)[1:]
    assert len(set(map(repr, tried))) == 6 + 2


def test_a_killed_search_ends_as_if_it_had_not_been_killed(dataset, found, cache, tmp_path):
    storage = tmp_path / "journal"
    killer = Path(__file__).parent / "killed_search.py"
    killed = subprocess.run(
        [sys.executable, killer, cache, storage],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    numbers = []
    resumed = search_settings(
        dataset, "gate", storage=storage, on_generation=lambda t: numbers.append(len(t)), **PLAN
    )
    assert numbers == [6]  # The three of the first generation were kept.
    assert resumed == found


@pytest.mark.parametrize("trained", [0, 3])
def test_what_a_kill_left_half_written_does_not_count(dataset, found, tmp_path, trained):
    storage = tmp_path / "journal"
    plan = {**PLAN, "storage": storage}
    if trained:
        search_settings(dataset, "gate", **{**plan, "trials": trained})
    backend = optuna.storages.journal.JournalFileBackend(str(storage))
    stored = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="gate",
        direction="maximize",
        load_if_exists=True,
    )
    if not trained:
        # Killed while it drew its very first trial, the defaults.
        stored.enqueue_trial({"learning rate": 1e-2})
    stored.ask().suggest_float("learning rate", 1e-5, 5e-2, log=True)
    with storage.open("a") as file:
        file.write('{"op_code": 6, "trial')
    assert search_settings(dataset, "gate", **plan) == found


def test_a_generation_shares_reads_and_a_finished_search_reads_nothing(dataset, reads, tmp_path):
    storage = tmp_path / "journal"
    short = search_settings(dataset, "pooling", storage=storage, **BRIEF)
    # A generation reads each shard once an epoch.
    epochs = [trial.settings.epochs for trial in short.trials]
    to_measure_moments = 1
    assert len(dataset.training.states) == 1
    assert len(reads) <= max(epochs) + to_measure_moments < sum(epochs)
    once, file, before = len(reads), storage.stat().st_ino, storage.read_bytes()
    assert search_settings(dataset, "pooling", storage=storage, **BRIEF) == short
    assert len(reads) == once
    # Another process may be adding to what is there, so it is not written anew.
    assert storage.stat().st_ino == file
    assert storage.read_bytes().startswith(before)
    longer = search_settings(dataset, "pooling", storage=storage, **{**BRIEF, "trials": 3})
    assert longer.trials[:2] == short.trials
    assert len(longer.trials) == 3


def test_a_score_is_that_of_one_training_with_these_settings_and_the_highest_is_best(
    dataset, found
):
    trial = found.trials[2]
    (alone,) = train_mechanisms(
        [Job(trial.spec, PLAN["seed"], trial.settings)],
        training=dataset.training,
        validation=dataset.validation,
    )
    assert trial.score == average_precision_score(dataset.validation.labels, alone.logits[:, 0])
    scores = [trial.score for trial in found.trials]
    first = found.trials[scores.index(max(scores))]
    assert (found.score, found.spec, found.settings) == (max(scores), first.spec, first.settings)
    assert [trial.number for trial in found.trials] == list(range(6))


def test_other_validation_labels_choose_other_settings(tiny, cache, found, tmp_path):
    flipped = dataset_at(tiny, cache, flipped=True)
    other = search_settings(flipped, "gate", storage=tmp_path / "journal", **PLAN)
    # The first generation is proposed without scores.
    assert configurations(other)[:3] == configurations(found)[:3]
    assert (other.spec, other.settings) != (found.spec, found.settings)


def test_a_probe_dataset_has_no_place_for_test_data():
    names = {field.name for field in fields(ProbeDataset)}
    described = {"warnings", "variants", "given_sha256"}
    assert names == {"backbone", "training", "validation", "folds", *described}


@pytest.mark.parametrize("name", mechanism_names())
def test_every_mechanism_has_a_usable_space_that_starts_at_its_defaults(name, dataset, tmp_path):
    best = search_settings(dataset, name, storage=tmp_path / "journal", **BRIEF)
    defaults, drawn = best.trials
    space = SPACES.get(name, Space())
    assert (defaults.spec, defaults.settings) == (mechanism_spec(name), exactly(name))
    assert space.learning_rate.low <= drawn.settings.learning_rate <= space.learning_rate.high
    assert space.weight_decay.low <= drawn.settings.weight_decay <= space.weight_decay.high
    assert 1 <= drawn.settings.epochs <= 10
    assert None not in (defaults.score, drawn.score)


def test_impossible_options_are_not_tried_and_refused_where_none_is_left():
    specs = possible_specs("attention", SMOLLM2, SPACES["attention"].options)
    pairs = {(spec.options["factor"], spec.options["heads"]) for spec in specs}
    shared = {
        (factor, heads)
        for factor in (4, 8, 16, 32, 64)
        for heads in (4, 8, 16)
        if 576 // factor % heads == 0
    }
    assert pairs == shared
    assert len(specs) == 2 * len(shared)
    for options, remedy in (
        ({"factor": (64,), "heads": (4,)}, "hidden states of width 32"),
        ({"factor": (0,)}, "attention.factor cannot be 0"),
        ({"head": (4,)}, "Did you mean 'heads'"),
    ):
        with pytest.raises(SidelightError, match=remedy):
            possible_specs("attention", Geometry(layers=4, width=32, outputs=1), options)


def test_another_search_in_the_same_file_is_refused(dataset, tiny, cache, found, journal):
    with pytest.raises(SidelightError, match="another seed"):
        search_settings(dataset, "gate", storage=journal, **{**PLAN, "seed": 1})
    flipped = dataset_at(tiny, cache, flipped=True)
    with pytest.raises(SidelightError, match="another validation set"):
        search_settings(flipped, "gate", storage=journal, **PLAN)
    # One of another mechanism is welcome.
    search_settings(dataset, "pooling", storage=journal, **{**BRIEF, "seed": 1})


def test_a_training_that_diverges_ends_neither_the_search_nor_its_neighbours(
    dataset, tmp_path, monkeypatch
):
    def search_with(decay: Range, trials: int):
        explosive = Space(weight_decay=decay)
        monkeypatch.setattr("sidelight_lab.search.SPACES", {**SPACES, "pooling": explosive})
        storage = tmp_path / f"{trials}"
        return search_settings(dataset, "pooling", trials=trials, seed=0, storage=storage)

    best = search_with(Range(0.0, 1e38), 5)
    assert [trial.score is None for trial in best.trials] == [False, True, True, True, True]
    assert best.settings == exactly("pooling")
    write_search({"pooling": best}, tmp_path, score="AUPRC")
    assert (tmp_path / "trials.csv").read_text().count("diverged") == 4
    with pytest.raises(SidelightError, match="diverged"):
        search_with(Range(1e37, 1e38), 2)


def test_a_search_leaves_a_table_the_best_and_a_picture(found, tmp_path):
    write_search({"gate": found}, tmp_path, score="AUPRC")
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [trial.score for trial in found.trials]
    assert rows[0]["options"] == "activation=tanh"
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["mechanisms"]["gate"]["settings"]["learning_rate"] == found.settings.learning_rate
    assert imread(tmp_path / "sensitivity.png").std() > 0.01


def test_enough_trials_say_which_parameter_matters(dataset, found, journal, monkeypatch):
    assert found.importance == {}
    monkeypatch.setattr(search, "_ENOUGH_FOR_IMPORTANCE", 6)
    importance = search_settings(dataset, "gate", storage=journal, **PLAN).importance
    assert set(importance) >= {"learning rate", "weight decay", "epochs", "batch size"}
    assert sum(importance.values()) == pytest.approx(1)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("has_validation", [True, False])
def test_the_printed_command_trains_what_was_found(
    tiny, tmp_path, monkeypatch, capfd, has_validation
):
    out = tmp_path / "out"
    data = write_rows(tmp_path / "rows.jsonl", 80, 1)
    arguments = ["--data", data, "--label", "toxic", "--model", saved(tiny, tmp_path / "model")]
    # Without validation texts, so few rows are cross-fitted.
    if has_validation:
        arguments += ["--validation", write_rows(tmp_path / "held_out.jsonl", 30, 2)]
    arguments += ["--mechanism", "pooling,gate", "--trials", "2", "--keep-cache"]
    assert run("search", *arguments, "--out", str(out)) == 0
    shown = capfd.readouterr()
    assert "gate: 2 of 2 trials" in shown.err
    command = next(line for line in shown.out.splitlines() if "--mechanism gate" in line)
    assert "--keep-cache" in command
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    main()
    best = json.loads((out / "best.json").read_text())["mechanisms"]["gate"]
    manifest = read_manifest(out / "gate")
    assert manifest.record["settings"] == {**best["settings"], "normalise": True}
    assert manifest.mechanism.options == best["options"]
    trained = json.loads((out / "gate" / "training.json").read_text())
    assert trained["runs"][0]["score"] == pytest.approx(best["score"], abs=1e-9)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("has_validation", [True, False])
def test_a_search_warns_of_what_training_warns_of(tiny, tmp_path, capfd, has_validation):
    lines = Path(write_rows(tmp_path / "all.jsonl", 60, 1)).read_text().splitlines()
    fine, toxic = ([line for line in lines if line.endswith(f"{n}}}")] for n in (0, 1))
    training, held_out = tmp_path / "training.jsonl", tmp_path / "held_out.jsonl"
    # Too few of one class for folds.
    training.write_text("\n".join([*fine, *toxic[:4]]))
    held_out.write_text("\n".join([*fine[-16:], *toxic[:4], '{"text": "", "toxic": 1}']))
    arguments = ["--data", str(training), "--label", "toxic", "--mechanism", "pooling"]
    arguments += ["--model", saved(tiny, tmp_path / "model")]
    arguments += ["--validation", str(held_out)] if has_validation else []
    told = []
    for command in (["search", "--trials", "1"], ["train"]):
        assert run(*command, *arguments, "--out", str(tmp_path / command[0])) == 0
        lines = capfd.readouterr().err.splitlines()
        told.append([line for line in lines if line.startswith("Warning: ")])
    # Training also tells of its calibrated figures, which a search does not print.
    assert told[0] == [line for line in told[1] if "the figures are flattering" not in line]
    expected = (
        "Left out 1 rows with an empty text"
        if has_validation
        else "has 4, or some of them are equal"
    )
    assert expected in " ".join(told[0])
