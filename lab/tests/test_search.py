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
from click.testing import CliRunner
from killed_search import PLAN, dataset_at
from matplotlib.image import imread
from sklearn.metrics import average_precision_score

from commands import run, saved
from corpora import planted
from sidelight.backbone import TransformersBackbone
from sidelight.cli import main
from sidelight.errors import SidelightError
from sidelight.manifest import read_manifest
from sidelight.mechanisms.base import Geometry, mechanism_names, mechanism_spec
from sidelight.training.dataset import ProbeDataset
from sidelight.training.loop import train_mechanisms
from sidelight.training.settings import Job, TrainingSettings, suggested_settings
from sidelight_lab.cli.search import search, write_search
from sidelight_lab.search import SPACES, Range, Space, possible_specs, search_settings

SMOLLM2 = Geometry(layers=31, width=576, outputs=1)


def exactly(mechanism: str) -> TrainingSettings:
    """The suggested settings, not adapted to few texts: a search says what it trains."""
    return replace(suggested_settings(mechanism), least_steps=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("activations")


@pytest.fixture
def dataset(tiny: TransformersBackbone, cache: Path) -> ProbeDataset:
    return dataset_at(tiny, cache)


@pytest.fixture(scope="module")
def found(tiny: TransformersBackbone, cache: Path, tmp_path_factory: pytest.TempPathFactory):
    """The plan's search, not disturbed."""
    storage = tmp_path_factory.mktemp("search") / "new" / "journal"
    return search_settings(dataset_at(tiny, cache), "gate", storage=storage, **PLAN)


def configurations(best):
    return [(trial.spec, trial.settings) for trial in best.trials]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_trials_and_another_seed_others(dataset, found, tmp_path):
    again = search_settings(dataset, "gate", storage=tmp_path / "again", **PLAN)
    other = search_settings(dataset, "gate", storage=tmp_path / "other", **{**PLAN, "seed": 1})
    assert again == found
    assert len(set(map(repr, configurations(found)[1:] + configurations(other)[1:]))) == 10


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_finished_search_reads_nothing_and_a_longer_one_adds_trials(dataset, tmp_path):
    reads = []
    dataset.training.states.on_read = lambda: reads.append(1)
    plan = {"seed": 0, "generation": 2, "storage": tmp_path / "journal"}
    short = search_settings(dataset, "pooling", trials=2, **plan)
    once = len(reads)
    assert search_settings(dataset, "pooling", trials=2, **plan) == short
    assert len(reads) == once
    longer = search_settings(dataset, "pooling", trials=3, **plan)
    assert longer.trials[:2] == short.trials
    assert len(longer.trials) == 3


@pytest.mark.slow
@pytest.mark.parametrize("trained", [0, 3])
def test_what_a_kill_left_half_written_does_not_count(dataset, found, tmp_path, trained):
    storage = tmp_path / "journal"
    plan = {**PLAN, "storage": storage}
    if trained:
        search_settings(dataset, "gate", **{**plan, "trials": trained})
    journal = optuna.storages.journal.JournalFileBackend(str(storage))
    stored = optuna.create_study(
        storage=optuna.storages.JournalStorage(journal),
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


@pytest.mark.slow
def test_opening_a_journal_writes_nothing_to_what_is_there(dataset, tmp_path):
    """Another process may be adding to it."""
    storage = tmp_path / "journal"
    plan = {"seed": 0, "generation": 2, "storage": storage}
    search_settings(dataset, "pooling", trials=2, **plan)
    file, before = storage.stat().st_ino, storage.read_bytes()
    search_settings(dataset, "pooling", trials=2, **plan)
    assert storage.stat().st_ino == file
    assert storage.read_bytes().startswith(before)


@pytest.mark.slow
def test_a_generation_reads_each_shard_once_an_epoch(dataset, tmp_path):
    reads = []
    dataset.training.states.on_read = lambda: reads.append(1)
    best = search_settings(
        dataset, "gate", trials=6, generation=6, seed=0, storage=tmp_path / "journal"
    )
    epochs = [trial.settings.epochs for trial in best.trials]
    to_measure_moments = 1
    assert len(dataset.training.states) == 1
    assert len(reads) <= max(epochs) + to_measure_moments < sum(epochs)


@pytest.mark.slow
def test_a_score_is_that_of_one_training_with_these_settings(dataset, found):
    trial = found.trials[2]
    (alone,) = train_mechanisms(
        [Job(trial.spec, PLAN["seed"], trial.settings)],
        training=dataset.training,
        validation=dataset.validation,
    )
    assert trial.score == average_precision_score(dataset.validation.labels, alone.logits[:, 0])


def test_the_best_has_the_highest_score(found):
    scores = [trial.score for trial in found.trials]
    first = found.trials[scores.index(max(scores))]
    assert (found.score, found.spec, found.settings) == (max(scores), first.spec, first.settings)
    assert [trial.number for trial in found.trials] == list(range(6))


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", mechanism_names())
def test_every_mechanism_has_a_usable_space_that_starts_at_its_defaults(name, dataset, tmp_path):
    best = search_settings(
        dataset, name, trials=2, generation=2, seed=0, storage=tmp_path / "journal"
    )
    defaults, drawn = best.trials
    space = SPACES.get(name, Space())
    assert (defaults.spec, defaults.settings) == (mechanism_spec(name), exactly(name))
    assert space.learning_rate.low <= drawn.settings.learning_rate <= space.learning_rate.high
    assert space.weight_decay.low <= drawn.settings.weight_decay <= space.weight_decay.high
    assert 1 <= drawn.settings.epochs <= 10
    assert None not in (defaults.score, drawn.score)


@pytest.mark.slow
def test_impossible_options_are_not_tried(dataset, tmp_path):
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
    best = search_settings(
        dataset, "attention", trials=3, generation=3, seed=0, storage=tmp_path / "journal"
    )
    width = dataset.backbone.fingerprint.width
    tried = {(trial.spec.options["factor"], trial.spec.options["heads"]) for trial in best.trials}
    assert len(tried) > 1
    assert all(width // factor % heads == 0 for factor, heads in tried)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"factor": (64,), "heads": (4,)}, "hidden states of width 32"),
        ({"factor": (0,)}, "attention.factor cannot be 0"),
        ({"head": (4,)}, "Did you mean 'heads'"),
    ],
)
def test_a_space_without_a_possible_option_is_refused(options, remedy):
    with pytest.raises(SidelightError, match=remedy):
        possible_specs("attention", Geometry(layers=4, width=32, outputs=1), options)


def test_another_search_in_the_same_file_is_refused(dataset, tiny, cache, tmp_path):
    storage = tmp_path / "journal"
    plan = {"trials": 1, "storage": storage}
    search_settings(dataset, "pooling", seed=0, **plan)
    with pytest.raises(SidelightError, match="another seed"):
        search_settings(dataset, "pooling", seed=1, **plan)
    with pytest.raises(SidelightError, match="another validation set"):
        search_settings(dataset_at(tiny, cache, flipped=True), "pooling", seed=0, **plan)
    search_settings(dataset, "gate", seed=1, **plan)


@pytest.mark.slow
def test_a_training_that_diverges_ends_neither_the_search_nor_its_neighbours(
    dataset, tmp_path, monkeypatch
):
    explosive = Space(weight_decay=Range(0.0, 1e38))
    monkeypatch.setattr("sidelight_lab.search.SPACES", {**SPACES, "pooling": explosive})
    best = search_settings(
        dataset, "pooling", trials=5, generation=5, seed=0, storage=tmp_path / "journal"
    )
    assert [trial.score is None for trial in best.trials] == [False, True, True, True, True]
    assert best.settings == exactly("pooling")
    write_search({"pooling": best}, tmp_path, score="AUPRC")
    assert (tmp_path / "trials.csv").read_text().count("diverged") == 4


def test_a_search_that_only_diverged_is_told_so(dataset, tmp_path, monkeypatch):
    explosive = Space(weight_decay=Range(1e37, 1e38))
    monkeypatch.setattr("sidelight_lab.search.SPACES", {**SPACES, "pooling": explosive})
    with pytest.raises(SidelightError, match="diverged"):
        search_settings(dataset, "pooling", trials=2, seed=0, storage=tmp_path / "journal")


def test_a_search_leaves_a_table_the_best_and_a_picture(found, tmp_path):
    write_search({"gate": found}, tmp_path, score="AUPRC")
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [trial.score for trial in found.trials]
    assert rows[0]["options"] == "activation=tanh"
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["mechanisms"]["gate"]["settings"]["learning_rate"] == found.settings.learning_rate
    assert imread(tmp_path / "sensitivity.png").std() > 0.01


@pytest.mark.slow
def test_enough_trials_say_which_parameter_matters(dataset, tmp_path):
    best = search_settings(
        dataset, "pooling", trials=16, generation=16, seed=0, storage=tmp_path / "journal"
    )
    assert set(best.importance) >= {"learning rate", "weight decay", "epochs", "batch size"}
    assert sum(best.importance.values()) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("has_validation", [True, False])
def test_the_printed_command_trains_what_was_found(
    tiny: TransformersBackbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_validation: bool,
):
    model, data, out = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out"
    tiny.model.save_pretrained(model)
    tiny.tokenizer.save_pretrained(model)
    texts, labels = planted("binary", 160, seed=1)
    rows = [{"text": text, "toxic": int(label)} for text, label in zip(texts, labels, strict=True)]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(map(json.dumps, rows[120:])))
    data.write_text("\n".join(map(json.dumps, rows[:120])))
    arguments = ["--data", data, "--label", "toxic", "--model", model, "--out", out]
    # Without validation texts, so few rows are cross-fitted.
    arguments += ["--validation", held_out] if has_validation else []
    arguments += ["--mechanism", "pooling,gate", "--trials", "2", "--keep-cache"]
    shown = CliRunner().invoke(search, [*map(str, arguments)], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "gate: 2 of 2 trials" in shown.stderr
    command = next(line for line in shown.stdout.splitlines() if "--mechanism gate" in line)
    assert "--keep-cache" in command
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    main()
    found = json.loads((out / "best.json").read_text())["mechanisms"]["gate"]
    manifest = read_manifest(out / "gate")
    assert manifest.record["settings"] == {**found["settings"], "normalise": True}
    assert manifest.mechanism.options == found["options"]
    trained = json.loads((out / "gate" / "training.json").read_text())
    assert trained["runs"][0]["score"] == pytest.approx(found["score"], abs=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("has_validation", [True, False])
def test_a_search_warns_of_what_training_warns_of(
    tiny: TransformersBackbone,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    has_validation: bool,
):
    texts, labels = planted("binary", 60, seed=1)
    rows = [{"text": text, "toxic": int(label)} for text, label in zip(texts, labels, strict=True)]
    # Too few of one class for folds.
    rows = [row for row in rows if not row["toxic"]] + [row for row in rows if row["toxic"]][:4]
    training, held_out = tmp_path / "training.jsonl", tmp_path / "held_out.jsonl"
    training.write_text("\n".join(map(json.dumps, rows)))
    held_out.write_text("\n".join(map(json.dumps, [*rows[-20:], {"text": "", "toxic": 1}])))
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
