"""What a training takes, in both ways."""

import json

import pytest

import wordings
from sidelight.errors import SidelightError
from sidelight_lab.bench.training import short_texts
from worlds.models import saved
from worlds.servers import cli

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("temporary_cache")]


def test_short_texts_are_distinct_and_cover_both_labels():
    examples = short_texts(300, 5)
    texts = [item.messages[-1].content for item in examples.items]
    assert len({*texts}) == 300
    assert {len(text.split()) for text in texts} == {5}
    assert {*examples.labels} == {0, 1}
    with pytest.raises(SidelightError, match=wordings.FEWER_BACKGROUND_TEXTS):
        short_texts(10**7, 5)


def test_streaming_uses_less_disk_and_finished_trainings_are_reused(tiny, tmp_path, capsys):
    model = saved(tiny, tmp_path / "model")
    options = ["--texts", "200", "--epochs", "3", "--model", model, "--out", str(tmp_path)]
    assert cli("bench", "training", *options) == 0
    output = capsys.readouterr().out
    assert output == (tmp_path / "training.md").read_text()
    record = json.loads((tmp_path / "training.json").read_text())
    disk, stream = record["trainings"]
    assert (disk["states"], stream["states"]) == ("disk", "stream")
    assert disk["tokens"] == stream["tokens"]
    assert stream["disk_gb"] < disk["disk_gb"]
    # Each of three epochs reads all texts.
    assert stream["passes"] >= 3 > disk["passes"]
    assert min(disk["seconds"], disk["memory_gb"]) > 0
    assert "Estimate, not measured" in output
    assert (tmp_path / "training.svg").read_text("utf-8").startswith("<?xml")
    # What was measured is not measured again.
    assert cli("bench", "training", *options) == 0
    assert json.loads((tmp_path / "training.json").read_text())["trainings"] == record["trainings"]
