"""The queue of ``sidelight label``: what is decided is on disk, and the order follows the probe."""

import json
import os
import shutil
import signal
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from sitting import Sitting

import wordings
from sidelight.data.loading import load_examples
from sidelight.data.readers import read_file
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message, Reads
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.scoring import classify
from sidelight.training.settings import FitOptions
from sidelight.types import Task
from sidelight_label.file import LabelFile
from sidelight_label.pool import Pool, merged
from sidelight_label.queue import LabelQueue, certainty, require_replaceable, shuffled, task_of
from worlds.data import TASKS
from worlds.gguf import gguf_model, needs_llama
from worlds.models import TOXICITY, untrained_probe
from worlds.servers import cli

# A text is judged from vectors in bf16, and live from states of the model.
ROUNDING_TO_BF16 = 0.03


def logits_of(backbone, probes, examples):
    """By each probe."""
    outputs = [classify(backbone, probe, examples) for probe in probes]
    return [np.stack([text.logits for text in texts]) for texts in outputs]


@pytest.fixture
def sitting(tiny, tmp_path):
    return Sitting(tiny, tmp_path)


@pytest.fixture(scope="module")
def first_sitting(tiny, tmp_path_factory):
    """A sitting of 40 labels and a probe, which stays as it is."""
    sitting = Sitting(tiny, tmp_path_factory.mktemp("first"), count=120)
    sitting.label(40)
    sitting.queue.train()
    return sitting


@pytest.fixture
def trained(tiny, first_sitting, tmp_path):
    """Its next sitting."""
    shutil.copytree(first_sitting.folder, tmp_path, dirs_exist_ok=True)
    return Sitting(tiny, tmp_path, count=120)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_sitting_produces_a_probe_from_unlabelled_texts(tiny, tmp_path, kind):
    sitting = Sitting(tiny, tmp_path, kind, count=90)
    with pytest.raises(SidelightError, match=wordings.TOO_FEW_OF_LABEL.format(count=5)):
        sitting.queue.train()
    labelled = []
    while sitting.queue.obstacle:
        labelled += sitting.label(1)
    labelled += sitting.label(20)
    # The labels are a training file with the cells of their rows.
    read = sitting.read()
    assert [row["id"] for row in read.rows] == labelled
    assert [sorted(names) for names in read.label_names()] == [
        sorted(sitting.truth[row]) for row in labelled
    ]
    before = sitting.queue.order
    sitting.queue.train()
    assert sitting.queue.order != before
    probe = load_probe(tmp_path / "probe")
    assert probe.task == TASKS[kind]
    # It judges live texts as it judged them in the pool.
    rows = [row for row in range(90) if row not in sitting.queue.decided][:10]
    live = logits_of(tiny, [probe], [sitting.pool.examples.items[row] for row in rows])[0]
    known = sitting.probabilities(rows)
    np.testing.assert_allclose(probe.calibration.apply(live), known, atol=ROUNDING_TO_BF16)


@pytest.mark.slow
def test_comparisons_use_held_out_predictions(tiny, first_sitting, trained):
    (overall,) = first_sitting.queue.comparisons
    (report,) = overall["rows"].values()
    assert report["rows"] == 40
    first = load_probe(trained.folder / "probe")
    assert report == first.card.training.validation.report.to_dict()
    earlier = trained.probabilities(range(len(trained.rows)))
    known = [*trained.queue.decided]
    batch = trained.label(20)
    trained.queue.train()
    at_random, overall = trained.queue.comparisons
    count = len(trained.at_random())
    assert [row["rows"] for row in at_random["rows"].values()] == [count, count]
    # New texts are judged by the earlier probe itself, those that it learned from by its folds.
    live = first.calibration.apply(logits_of(tiny, [first], trained.pool.examples.items)[0])
    np.testing.assert_allclose(earlier[batch], live[batch], atol=ROUNDING_TO_BF16)
    assert abs(earlier[known] - live[known]).max() > ROUNDING_TO_BF16
    rows = known + batch
    positives = np.array([trained.truth[row] == ("toxic",) for row in rows])
    flagged = earlier[rows, 0] >= first.thresholds[0]
    before, after = overall["rows"].values()
    assert before["accuracy"]["value"] == pytest.approx((positives == flagged).mean())
    assert before["rows"] == after["rows"] == 60
    assert after == load_probe(trained.folder / "probe").card.training.validation.report.to_dict()


@pytest.mark.slow
def test_any_folder_name_yields_a_loadable_probe(trained, tmp_path):
    trained.queue.folder = tmp_path / "my texts & more"
    trained.queue.train()
    assert load_probe(trained.queue.folder).name == "my-texts-more"


@pytest.mark.slow
def test_queue_mixes_uncertain_texts_with_one_in_four_at_random(trained):
    chances = trained.probabilities(range(len(trained.rows)))[:, 0]
    order = [row for row in shuffled(trained.pool.examples) if row not in trained.queue.decided]
    rows = trained.label(12)
    at_random = rows[3::4]
    assert at_random == [row for row in order if row not in set(rows) - set(at_random)][:3]
    chosen = [row for row in rows if row not in at_random]
    left = [row for row in range(120) if row not in trained.queue.decided]
    assert max(abs(chances[chosen] - 0.5)) <= min(abs(chances[left] - 0.5))


@pytest.mark.slow
def test_random_sample_includes_texts_chosen_by_uncertainty(trained):
    """They are the first of a random order, whichever of them were chosen early."""
    trained.label(40)
    at_random = trained.at_random()
    assert 50 <= len(at_random) < 80
    trained.queue.train()
    assert trained.queue.comparisons[0]["title"] == f"The {len(at_random)} texts drawn at random"


def test_certainty_is_lower_for_uncertain_and_disputed_texts():
    binary, several = Task("binary", ("a", "b")), Task("multiclass", ("a", "b", "c"))
    for task, unsure, sure in (
        (binary, [[0.4], [0.5]], [[0.9], [0.8]]),
        # Each is sure, and they disagree.
        (binary, [[0.99], [0.01]], [[0.3], [0.3]]),
        (several, [[0.4, 0.3, 0.3]] * 2, [[0.6, 0.4, 0.0]] * 2),
        (Task("multilabel", ("a", "b")), [[0.99, 0.5]] * 2, [[0.2, 0.8]] * 2),
    ):
        found = certainty(task, np.array([unsure, sure]).transpose(1, 0, 2))
        assert found[0] < found[1]


@pytest.mark.slow
def test_user_probes_order_the_texts_from_the_start(tiny, tmp_path):
    save_probe(untrained_probe(tiny, "one"), tmp_path / "one")
    save_probe(untrained_probe(tiny, "two", mechanism="gate"), tmp_path / "two")
    probes = [load_probe(tmp_path / name) for name in ("one", "two")]
    sitting = Sitting(tiny, tmp_path, probes=probes)
    logits = logits_of(tiny, probes, sitting.pool.examples.items)
    mean = np.mean([1 / (1 + np.exp(-probe_logits[:, 0])) for probe_logits in logits], 0)
    opinions = sitting.queue.opinions(3)
    assert list(opinions) == ["one", "two"]
    assert [probabilities["toxic"] for probabilities in opinions.values()] == pytest.approx(
        [float(1 / (1 + np.exp(-probe_logits[3, 0]))) for probe_logits in logits],
        abs=ROUNDING_TO_BF16,
    )
    first = sitting.queue.next()
    assert abs(mean[first] - 0.5) <= np.sort(abs(mean - 0.5))[5]
    assert sitting.queue.order.startswith("least certain first, by one and two")


@needs_llama
@pytest.mark.slow
def test_labelling_works_with_a_gguf_model(tmp_path, temporary_cache):
    backbone = gguf_model(tmp_path, "llama").backbone
    sitting = Sitting(backbone, tmp_path)
    sitting.label(40)
    sitting.queue.train()
    probe = load_probe(tmp_path / "probe")
    assert probe.card.backbone == backbone.fingerprint
    rows = [row for row in range(60) if row not in sitting.queue.decided]
    live = logits_of(backbone, [probe], [sitting.pool.examples.items[row] for row in rows])[0]
    known = sitting.probabilities(rows)
    np.testing.assert_allclose(probe.calibration.apply(live), known, atol=ROUNDING_TO_BF16)


def test_incompatible_probes_are_rejected_and_foreign_probes_never_replaced(tiny, tmp_path):
    with pytest.raises(SidelightError, match=wordings.PROBE_DECIDES.format(labels="billing")):
        Sitting(tiny, tmp_path, probes=[untrained_probe(tiny, "a", task=task_of(["billing", "x"]))])
    probe = untrained_probe(tiny, "b", reads=Reads("response"))
    with pytest.raises(SidelightError, match=wordings.PROBE_READS.format(side="response")):
        Sitting(tiny, tmp_path / "other", probes=[probe])
    save_probe(untrained_probe(tiny, "mine", task=TOXICITY), tmp_path / "probe")
    with pytest.raises(SidelightError, match=wordings.NO_CROSS_FIT):
        require_replaceable(tmp_path / "probe", LabelFile(tmp_path / "labels.jsonl"))


@pytest.mark.slow
def test_sitting_resumes_without_running_the_backbone_again(first_sitting, trained, ran):
    trained.begin()
    assert trained.queue.next() == first_sitting.queue.next()
    assert [*trained.queue.decided] == [*first_sitting.queue.decided]
    assert trained.queue.next() not in trained.queue.decided
    trained.label(5)
    trained.queue.train()
    assert trained.queue.comparisons[-1]["title"] == "All 45 labelled texts"
    assert not ran


def test_undo_reverts_labels_and_skips_and_redisplays_their_texts(sitting):
    first, second = sitting.label(2)
    skipped = sitting.queue.next()
    sitting.queue.skip(skipped)
    assert sitting.out.read_bytes()
    for row, done in ((skipped, 2), (second, 1), (first, 0)):
        sitting.queue.undo(row)
        assert sitting.queue.next() == row
        assert len(sitting.queue.decided) == done
    assert sitting.out.read_bytes() == b""
    assert sitting.queue.last is None
    assert sitting.label(3) == [first, second, skipped]
    # Skipped texts come last, and are no labels.
    skipped = sitting.queue.next()
    sitting.queue.skip(skipped)
    assert sitting.label(56)[-1] != skipped
    assert sitting.label(1) == [skipped]
    assert sitting.queue.next() is None


def test_first_tab_to_label_a_text_wins(sitting):
    row = sitting.queue.next()
    sitting.queue.label(row, ["toxic"])
    with pytest.raises(SidelightError, match=wordings.ALREADY_DECIDED):
        sitting.queue.label(row, ["fine"])
    with pytest.raises(SidelightError, match=wordings.ALREADY_DECIDED):
        sitting.queue.skip(row)
    (another,) = sitting.label(1)
    with pytest.raises(SidelightError, match=wordings.TAB_DIFFERS):
        sitting.queue.undo(row)
    sitting.queue.undo(another)
    assert len(sitting.read()) == 1


def test_invalid_label_selections_are_rejected(sitting):
    for labels in ([], ["fine", "toxic"], ["other"]):
        with pytest.raises(
            SidelightError, match=wordings.EXPECTED_ONE_OF.format(labels="fine, toxic")
        ):
            sitting.queue.label(0, labels)
    assert sitting.out.read_bytes() == b""


@pytest.mark.slow
def test_duplicates_appear_once_and_removed_labelled_rows_still_train(trained):
    trained.rows = trained.rows[:10] * 2
    trained.begin()
    gone = [row for row in trained.read().rows if row["id"] >= 10]
    assert len(trained.pool.examples) == 10 + len(gone)
    assert len(trained.queue.decided) == 40
    trained.queue.train()


def test_label_file_changed_by_another_program_is_not_overwritten(sitting):
    (first,) = sitting.label(1)
    with sitting.out.open("a") as file:
        file.write('{"text": "mine", "label": "fine"}\n')
    content = sitting.out.read_bytes()
    row = sitting.queue.next()
    for act in (lambda: sitting.queue.label(row, ["fine"]), lambda: sitting.queue.undo(first)):
        with pytest.raises(SidelightError, match=wordings.FILE_CHANGED):
            act()
    assert sitting.out.read_bytes() == content
    assert sitting.queue.next() == row
    assert len(sitting.begin().queue.decided) == 2
    sitting.out.unlink()
    with pytest.raises(SidelightError, match=wordings.FILE_CHANGED):
        sitting.label(1)


def test_stale_label_file_handle_cannot_write(tmp_path):
    path = tmp_path / "labels.jsonl"
    first, second = LabelFile(path), LabelFile(path)
    first.append({"text": "a", "label": "x"})
    with pytest.raises(SidelightError, match=wordings.FILE_CHANGED):
        second.append({"text": "b", "label": "x"})
    first.append({"text": "c", "label": "y"})
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_full_disk_leaves_the_label_file_intact(sitting, monkeypatch):
    import resource

    sitting.label(2)
    content = sitting.out.read_bytes()
    row = sitting.queue.next()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # Room for a part of a row.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) + 5, limits[1]))
        with pytest.raises(SidelightError, match=wordings.LABEL_NOT_SAVED):
            sitting.queue.label(row, ["fine"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert sitting.out.read_bytes() == content
    assert sitting.label(1) == [row]


def test_append_handles_a_missing_trailing_newline(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"text": "a", "label": "x"}')
    LabelFile(path).append({"text": "c", "label": "y"})
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_new_label_file_is_private_and_existing_mode_is_preserved(tmp_path):
    """Its texts may be what users wrote."""
    path = tmp_path / "labels.jsonl"
    before = os.umask(0o022)
    try:
        LabelFile(path).append({})
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o640)
        LabelFile(path).append({})
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_label_file_round_trips_every_cell(tmp_path):
    path = tmp_path / "labels.jsonl"
    row = {"text": "\u2028 日本 <b>", "half": "\ud800", "when": date(2026, 1, 2), "label": "x"}
    LabelFile(path).append(row)
    (read,) = read_file(path)
    assert read.cells == {**row, "when": "2026-01-02"}
    assert "日本".encode() in path.read_bytes()


def test_long_texts_are_truncated_and_oversized_pools_are_rejected(sitting):
    sitting.rows[0]["text"] = "a long text " * 100
    sitting.begin()
    cut = [prompt.dropped for prompt in sitting.pool.prompts]
    assert cut[0] > 0
    assert not any(cut[1:])
    with pytest.raises(SidelightError, match=wordings.CACHE_TOO_SMALL):
        sitting.begin(memory_bytes=10_000)


def test_empty_and_duplicate_texts_are_counted_in_warnings(warned):
    texts = load_examples([{"text": text} for text in ("a", "b", "a", "", "a")], label=None)
    examples, _ = merged(texts, None)
    assert [item.text for item in examples.items] == ["a", "b"]
    assert warned() == [
        "Left out 1 rows with an empty text or response.",
        "2 of 4 texts are duplicates and are shown once.",
    ]


@pytest.mark.slow
def test_chats_and_responses_can_be_labelled(tiny, tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    rows = [{"text": turns, "answer": f"{'X' if n % 2 else 'a'} {n}"} for n in range(24)]
    file = LabelFile(tmp_path / "labels.jsonl")
    examples, decided = merged(load_examples(rows, label=None, response="answer"), None)
    reads = Reads("response", scope="conversation")
    pool = Pool(tiny, examples, TOXICITY, FitOptions(reads=reads, cache_root=tmp_path / "cache"))
    queue = LabelQueue(pool, file, column="said", labelled=decided, folder=tmp_path / "probe")
    while (row := queue.next()) is not None:
        queue.label(row, ["toxic" if row % 2 else "fine"])
    queue.train()
    assert load_probe(tmp_path / "probe").reads.side == "response"
    read = load_examples(tmp_path / "labels.jsonl", label="said", response="answer")
    assert read.items[0].messages[0] == Message("system", "s")


def test_label_names_are_normalised_and_invalid_ones_rejected():
    assert task_of(["No", "1.0"]).labels == ("no", "1")
    assert task_of(["a", "b", "c"]).kind == "multiclass"
    assert task_of(["a", "b"], is_multilabel=True).kind == "multilabel"
    for names in ([], ["a"], ["a", "a"], ["Yes", "yes"], ["a", "null"]):
        with pytest.raises(SidelightError):
            task_of(names)


def test_command_rejects_invalid_options_immediately(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text('{"text": "a"}\n')
    for options, message in (
        ([], "Name either the labels with --labels"),
        (["--labels", "a,b", "--out", "labels.csv"], "ends in .jsonl"),
        (["--labels", "a,b", "--label", "text"], "the labels would replace"),
        (["--labels", "a,b", "--multilabel", "--probe", "p"], "Name either"),
        (["--labels", "a,b", "--model", "absent.gguf"], "There is no file 'absent.gguf'"),
    ):
        assert cli("label", "texts.jsonl", *options) == 2
        assert message in capsys.readouterr().err
