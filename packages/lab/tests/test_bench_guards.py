"""Probes of ready guards beside rivals and published figures, on the guards' tests."""

import json

import numpy as np
import pytest

import wordings
from sidelight.data.guards import find_guard
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message
from sidelight.statistics.calibration import Calibration
from sidelight.training.background import Background
from sidelight.training.settings import FitOptions, suggested_settings
from sidelight.types import Task
from sidelight_lab.baselines import encoders
from sidelight_lab.bench.guards import (
    METRICS,
    OURS,
    Row,
    Texts,
    guard_sections,
    measure_guards,
    measure_rows,
    published_results,
)
from worlds.data import install_guards
from worlds.models import saved
from worlds.servers import cli

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("temporary_cache", "letters")]
NAMES = ("shouts", "replies")
# Little of everything: the signal is plain.
BRIEF = FitOptions(settings=suggested_settings("readout").changed(epochs=6), context_tokens=400)
ROWS = ("pooling", "mean_last_layer", "means_all_layers", "tfidf")


@pytest.fixture(scope="module", autouse=True)
def letters(tmp_path_factory):
    """The folder of a package of guards."""
    with pytest.MonkeyPatch.context() as patch:
        yield install_guards(tmp_path_factory.mktemp("guards"), patch)


@pytest.fixture(scope="module")
def background() -> Background:
    """Short chats of eight sources, each of five."""
    exchanges = [
        (Message("user", f"Hello {n}."), Message("assistant", f"Yes {n}.")) for n in range(40)
    ]
    chats = tuple((*turns, Message("user", f"Thanks {n}.")) for n, turns in enumerate(exchanges))
    return Background(chats, tuple(f"source {n % 8}" for n in range(40)))


@pytest.fixture(scope="module")
def measure(tiny, background, tmp_path_factory):
    """Runs the benchmark, into the same folder each time."""
    out = tmp_path_factory.mktemp("out")
    return lambda **changed: measure_guards(
        tiny,
        **{
            "names": NAMES,
            "background": background,
            "rivals": ROWS,
            "seeds": 1,
            "rows": 30,
            "options": BRIEF,
            "out": out,
        }
        | changed,
    )


@pytest.fixture(scope="module")
def record(measure):
    return measure()


def test_record_has_every_metric_for_every_row_and_test(record):
    for name in NAMES:
        measured = record.results["guards"][name]
        assert measured["traffic"] > 0
        assert set(measured["traffic flagged"]) == {OURS, *ROWS}
        for rows in (measured["mean"], measured["tests"]["unseen"]["rows"]):
            assert [*rows] == [OURS, *ROWS]
            for row_metrics in rows.values():
                assert [*row_metrics] == [*METRICS]
                assert all(0 <= figure["value"] <= 1 for figure in row_metrics.values())
                low, high = row_metrics["auroc"]["ci"]
                assert low <= row_metrics["auroc"]["value"] <= high
    output = record.to_markdown()
    for name in (*METRICS, "traffic flagged", "95 % bootstrap"):
        assert name in output
    # Of each guard, one table for its test and one for the mean over tests.
    assert all(output.count(f"| {row} ") == 2 * len(NAMES) for row in (OURS, *ROWS))
    assert json.loads(record.to_json())["guards"].keys() == {*NAMES}


def test_probe_and_tfidf_find_planted_signal(record):
    rows = record.results["guards"]["shouts"]["tests"]["unseen"]["rows"]
    assert rows[OURS]["auroc"]["value"] > 0.8
    assert rows["tfidf"]["recall"]["value"] > 0.8


def test_finished_guards_are_reused_only_with_unchanged_settings(measure, record, ran):
    again = measure()
    assert not ran
    assert again.results == record.results
    measure(names=["shouts"], rivals=["tfidf"])
    assert ran


def test_rows_with_missing_models_are_skipped_and_named(measure, record, monkeypatch):
    monkeypatch.setattr(encoders, "_PACKAGE", "not_installed")
    record_without = measure(rivals=(*ROWS, "encoder"))
    assert record_without.results == record.results
    assert (
        "'encoder' is left out: The small encoder is not installed." in record_without.to_markdown()
    )


def test_backbone_processes_each_text_once_with_tests_last(tiny, measure, ran, tmp_path):
    measure(names=["shouts"], rivals=["mean_last_layer"], seeds=2, rows=20, out=tmp_path)
    passed = [prompt.token_ids for prompt in ran]
    assert len(set(passed)) == len(passed)
    items = load_examples("guard:shouts:unseen").items
    tested = {tiny.encoder.encode(item.messages).token_ids for item in items}
    assert {*passed[-len(tested) :]} == tested
    assert not (tmp_path / "states").exists()


def test_draws_use_different_texts_and_metrics_average_over_draws(measure, background, tmp_path):
    first, second = (Texts.of("shouts", background, 20, draw) for draw in range(2))
    assert {*first.training.items} != {*second.training.items}
    assert first.traffic.items == second.traffic.items
    options = {"names": ["shouts"], "rivals": ["tfidf"], "rows": 20}
    one = measure(**options, out=tmp_path / "one").results["guards"]["shouts"]["mean"]["tfidf"]
    two = measure(**options, draws=2, out=tmp_path / "two").results["guards"]["shouts"]["mean"][
        "tfidf"
    ]
    assert one != two
    with pytest.raises(SidelightError, match=wordings.FEWER_ROWS):
        measure(names=["shouts"], rows=None, draws=2, out=tmp_path / "all")


def test_recall_is_measured_at_fixed_shares_of_flagged_traffic():
    task = Task("binary", ("other", "shouting"))
    row = Row("one", Calibration("none", "binary", (1.0,), (0.0,)), (0.9,), lambda split: split)
    scores, labels = np.array([0.5, 0.955, 0.985, 0.999, 0.1, 0.95]), np.array([1, 1, 1, 1, 0, 0])
    traffic = np.arange(100) / 100
    metrics = measure_rows([row], [scores], labels, [traffic], task)["one"]
    values = {name: draws[0] for name, draws in metrics.items()}
    assert values == {
        "auroc": 7 / 8,
        "recall": 3 / 4,
        "false alarms": 1 / 2,
        "recall at 1% of traffic": 2 / 4,
        "recall at 4% of traffic": 3 / 4,
    }


def test_traffic_excludes_sources_used_for_training(background):
    texts = Texts.of("shouts", background, rows=20)
    source_of = dict(zip(background.conversations, background.sources or (), strict=True))
    unseen = {source_of[item.messages] for item in texts.traffic.items}
    assert len(texts.training) == 20
    assert unseen
    assert not unseen & {*(texts.background.sources or ())}
    # A guard of answers reads those of any source that its texts are not of.
    answers = Texts.of("replies", background, rows=None).traffic
    assert len(answers) == 40
    assert answers.items[0].response is not None


def test_published_results_cover_packaged_tests_and_appear_in_report(record):
    published = published_results()
    assert {name: {*tests} for name, tests in published.items()} == {
        "harmful": {"simplesafetytests", "xstest"},
        "injection": {"bipia_attacks", "spikee"},
    }
    for name, tests in published.items():
        assert tests.keys() <= find_guard(name).card.tests.keys()
        measured = dict(record.results["guards"]["shouts"])
        for test, results in tests.items():
            measured["tests"] = {test: record.results["guards"]["shouts"]["tests"]["unseen"]}
            output = "\n".join(guard_sections(name, measured))
            for one in results.results:
                line = next(line for line in output.splitlines() if f"| {one.guard} " in line)
                assert one.source in line
                assert ("second hand" in line) == one.second_hand
            for sentence in (results.computed, *results.cautions):
                assert sentence in output
    assert "No comparable figure" in record.to_markdown()


def test_unsupported_guards_and_unknown_names_are_rejected_with_hints(tiny, tmp_path, capsys):
    command = ["bench", "guards", f"--out={tmp_path / 'out'}"]
    command += [f"--model={saved(tiny, tmp_path / 'model')}"]
    assert cli(*command, "--only=letters") == 2
    assert "`sidelight bench spans --data guard:letters" in capsys.readouterr().err
    assert cli(*command, "--only=shouts", "--rivals=tfidv") == 2
    assert "Did you mean 'tfidf'" in capsys.readouterr().err
    assert cli(*command, "--only=shout") == 2
    assert "Did you mean 'shouts'" in capsys.readouterr().err
