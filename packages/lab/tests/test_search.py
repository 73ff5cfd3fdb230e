"""A search chooses on validation data alone, from few reads, and goes on after a kill."""

import csv
import json
import shlex
from dataclasses import replace

import optuna
import pytest
from planted_data import write_rows
from sklearn.metrics import average_precision_score

import wordings
from sidelight.errors import SidelightError
from sidelight.probes.card import read_card
from sidelight.probes.mechanisms.base import Geometry, mechanism_names, mechanism_spec
from sidelight.states import cache as states_cache
from sidelight.training.loop import train_mechanisms
from sidelight.training.preparing import ProbeDataset
from sidelight.training.settings import suggested_settings
from sidelight_lab.cli.search import write_search
from sidelight_lab.search import SPACES, Space, best_of, possible_specs, search_settings
from worlds.data import split_of
from worlds.models import saved
from worlds.servers import cli

pytestmark = pytest.mark.slow
PLAN = {"trials": 6, "generation": 3, "seed": 0}
# The mechanism that costs least, and one generation.
BRIEF = {"trials": 2, "generation": 2, "seed": 0}


def dataset_at(backbone, root, *, flipped=False):
    """A signal to learn; ``flipped`` validation labels say the opposite."""
    training, validation = (
        split_of(backbone, root, "binary", *texts) for texts in ((96, 1), (48, 2))
    )
    if flipped:
        labels = 1 - validation.labels
        validation = replace(validation, examples=replace(validation.examples, labels=labels))
    return ProbeDataset.held_out(backbone, training, validation)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("activations")


@pytest.fixture
def dataset(tiny, cache):
    return dataset_at(tiny, cache)


@pytest.fixture(scope="module")
def found(tiny, cache):
    """The plan's search, not disturbed."""
    return search_settings(dataset_at(tiny, cache), "gate", storage=cache / "journal", **PLAN)


def configurations(trials):
    return [(trial.spec, trial.settings) for trial in trials]


@pytest.mark.parametrize("trained", [0, 3])
def test_killed_search_resumes_to_the_same_result(dataset, found, tmp_path, trained):
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
    numbers = []
    resumed = search_settings(
        dataset, "gate", on_generation=lambda t: numbers.append(len(t)), **plan
    )
    assert resumed == found
    # A finished generation is kept.
    assert numbers == ([6] if trained else [3, 6])


def test_generations_share_reads_and_finished_searches_read_nothing(dataset, tmp_path, monkeypatch):
    storage, reads, read = tmp_path / "journal", [], states_cache.read_tensors
    monkeypatch.setattr(states_cache, "read_tensors", lambda path: reads.append(path) or read(path))
    short = search_settings(dataset, "pooling", storage=storage, **BRIEF)
    # A generation reads each text once: what its trials share stays in memory.
    splits = (dataset.training, dataset.validation)
    texts = {item.text_key for split in splits for item in split.examples.items}
    assert len(reads) == len({*reads}) == len(texts)
    once, file, before = len(reads), storage.stat().st_ino, storage.read_bytes()
    assert search_settings(dataset, "pooling", storage=storage, **BRIEF) == short
    assert len(reads) == once
    # Another process may be adding to what is there, so it is not written anew.
    assert storage.stat().st_ino == file
    assert storage.read_bytes().startswith(before)
    longer = search_settings(dataset, "pooling", storage=storage, **{**BRIEF, "trials": 3})
    assert longer[:2] == short
    assert len(longer) == 3


def test_trial_score_matches_separate_training_and_highest_score_is_best(dataset, found):
    trial = found[2]
    (separate,) = train_mechanisms(
        [(trial.spec, trial.settings)],
        split=dataset.split,
        left_out=dataset.left_out,
    )
    assert trial.score == average_precision_score(dataset.validation.labels, separate.logits[:, 0])
    scores = [trial.score for trial in found]
    assert best_of(found) == found[scores.index(max(scores))]
    assert [trial.number for trial in found] == list(range(6))


def test_validation_labels_determine_the_selected_settings(tiny, cache, found, tmp_path):
    flipped = dataset_at(tiny, cache, flipped=True)
    another = search_settings(flipped, "gate", storage=tmp_path / "journal", **PLAN)
    # The first generation is proposed without scores.
    assert configurations(another)[:3] == configurations(found)[:3]
    assert configurations([best_of(another)]) != configurations([best_of(found)])


@pytest.mark.parametrize("name", mechanism_names())
def test_every_search_space_is_valid_and_starts_at_the_defaults(name, dataset, tmp_path):
    defaults, drawn = search_settings(dataset, name, storage=tmp_path / "journal", **BRIEF)
    space = SPACES.get(name, Space())
    # Not adapted to few texts: a search says what it trains.
    exactly = replace(suggested_settings(name), least_steps=0)
    assert (defaults.spec, defaults.settings) == (mechanism_spec(name), exactly)
    for name in ("learning_rate", "weight_decay"):
        low, high = getattr(space, name)
        assert low <= getattr(drawn.settings, name) <= high
    assert 1 <= drawn.settings.epochs <= 12
    assert None not in (defaults.score, drawn.score)


def test_impossible_options_are_skipped_or_rejected_if_none_remain():
    smollm2 = Geometry(layers=31, width=576, outputs=1)
    specs = possible_specs("attention", smollm2, SPACES["attention"].options)
    for spec in specs:
        assert 576 // spec.options["factor"] % spec.options["heads"] == 0
    assert {spec.options["factor"] for spec in specs} == {4, 8, 16}
    for options, remedy in (
        ({"factor": (64,), "heads": (4,)}, "hidden states of width 32"),
        ({"factor": (0,)}, "attention.factor cannot be 0"),
        ({"head": (4,)}, "Did you mean 'heads'"),
    ):
        with pytest.raises(SidelightError, match=remedy):
            possible_specs("attention", Geometry(layers=4, width=32, outputs=1), options)


@pytest.mark.usefixtures("found")
def test_journal_rejects_a_different_search(dataset, tiny, cache):
    journal = cache / "journal"
    with pytest.raises(SidelightError, match=wordings.SEED_DIFFERS):
        search_settings(dataset, "gate", storage=journal, **{**PLAN, "seed": 1})
    flipped = dataset_at(tiny, cache, flipped=True)
    with pytest.raises(SidelightError, match=wordings.VALIDATION_DIFFERS):
        search_settings(flipped, "gate", storage=journal, **PLAN)
    # One of another mechanism is welcome.
    search_settings(dataset, "pooling", storage=journal, **{**BRIEF, "seed": 1})


def test_diverged_trials_do_not_end_the_search(dataset, tmp_path, monkeypatch):
    def search_with(decay: tuple[float, float], trials: int):
        explosive = Space(weight_decay=decay)
        monkeypatch.setattr("sidelight_lab.search.SPACES", {**SPACES, "pooling": explosive})
        storage = tmp_path / f"{trials}"
        return search_settings(dataset, "pooling", trials=trials, seed=0, storage=storage)

    trials = search_with((0.0, 1e38), 5)
    assert [trial.score is None for trial in trials] == [False, True, True, True, True]
    assert best_of(trials) == trials[0]
    write_search({"pooling": trials}, tmp_path)
    assert (tmp_path / "trials.csv").read_text().count("diverged") == 4
    with pytest.raises(SidelightError, match=wordings.DIVERGED):
        search_with((1e37, 1e38), 2)


def test_write_search_writes_all_trials_and_the_best(found, tmp_path):
    write_search({"gate": found}, tmp_path)
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [trial.score for trial in found]
    assert json.loads(rows[0]["options"]) == {"activation": "tanh"}
    best = json.loads((tmp_path / "best.json").read_text())
    assert (
        best["mechanisms"]["gate"]["settings"]["learning_rate"]
        == best_of(found).settings.learning_rate
    )


@pytest.mark.usefixtures("temporary_cache")
@pytest.mark.parametrize("has_validation", [True, False])
def test_printed_options_reproduce_the_best_trial(tiny, tmp_path, capfd, has_validation):
    out, data = tmp_path / "out", write_rows(tmp_path / "rows.jsonl", 80, 1)
    arguments = ["--data", data, "--label", "toxic", "--model", saved(tiny, tmp_path / "model")]
    # Without validation texts, so few rows are cross-fitted.
    if has_validation:
        arguments += ["--validation", write_rows(tmp_path / "held_out.jsonl", 30, 2)]
    arguments += ["--mechanism", "pooling,gate", "--trials", "2", "--set", "keep_cache=true"]
    assert cli("search", *arguments, "--out", str(out)) == 0
    output = capfd.readouterr()
    assert "gate: 2 of 2 trials" in output.err
    line = next(line for line in output.out.splitlines() if "--mechanism gate" in line)
    found = shlex.split(line)[1:]
    options = [*arguments[: arguments.index("--mechanism")], "--background", "none"]
    assert cli("train", *options, *found, "--out", str(out / "gate"), "--json") == 0
    trained = json.loads(capfd.readouterr().out)
    best = json.loads((out / "best.json").read_text())["mechanisms"]["gate"]
    card = read_card(out / "gate")
    record = card.training
    settings = {**record.settings, "seed": record.seed}
    assert settings == {**best["settings"], "normalise": True}
    assert card.mechanism.options == best["options"]
    assert trained["score"] == pytest.approx(best["score"], abs=1e-9)
