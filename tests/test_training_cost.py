"""The estimate of a training is what one takes on disk, and grows with tokens and parameters."""

from dataclasses import replace

import numpy as np
import pytest

from sidelight.data.examples import Example, LabelledExamples, SpanExamples
from sidelight.models.conversation import Message
from sidelight.training.background import load_background
from sidelight.training.contexts import context_budget
from sidelight.training.cost import TrainingEstimate, estimate_training, training_tokens
from sidelight.training.preparing import prepare
from sidelight.training.ready import TOKENS_ON_CPU
from sidelight.training.settings import FitOptions
from worlds.data import documented_table, little_traffic
from worlds.models import TOXICITY

SPEED = 1e9
# Contexts end with the one that fills their share of tokens.
OF_CONTEXTS = 0.1
# 2,190 CPU seconds on two cores, before rounding.
MEASURED_H = 2190 / 2 / 3600


@pytest.fixture
def texts():
    items = tuple(
        Example((Message("user", f"number {i:02d} has a text of its own"),)) for i in range(60)
    )
    return LabelledExamples(items, ({},) * 60, labels=np.arange(60) % 2, task=TOXICITY)


def test_disk_estimate_matches_bytes_written(tiny, texts, tmp_path, monkeypatch):
    with little_traffic(tmp_path, monkeypatch):
        options = FitOptions(cache_root=tmp_path / "states", background=load_background("packaged"))
        prepare(tiny, texts, None, options=options)
        estimate = estimate_training(texts, tiny.encoder, tiny.fingerprint, operations_per_s=SPEED)
    files = (tmp_path / "states").rglob("*.safetensors")
    written = sum(path.stat().st_size for path in files)
    assert estimate.disk_bytes == pytest.approx(written, rel=OF_CONTEXTS)


def test_estimate_grows_with_model_width_and_depth(tiny, texts):
    fingerprint, blocks = tiny.fingerprint, tiny.fingerprint.layers - 1
    larger = replace(fingerprint, width=4 * fingerprint.width, layers=2 * blocks + 1)
    small, large = (
        estimate_training(texts, tiny.encoder, model, operations_per_s=SPEED)
        for model in (fingerprint, larger)
    )
    assert small.tokens == large.tokens
    assert large.seconds == pytest.approx(2 * 4**2 * small.seconds)
    assert large.disk_bytes == small.disk_bytes * 4 * larger.layers / fingerprint.layers


def test_disk_estimate_is_quartered_above_10_gib(tiny, texts):
    model = replace(tiny.fingerprint, layers=33, width=8192)
    large = estimate_training(texts, tiny.encoder, model, operations_per_s=SPEED)
    assert large.tokens * 33 * 8192 * 2 > 10 * 2**30
    assert large.disk_bytes == large.tokens * 33 * 8192 // 2


def test_time_estimate_measures_current_cpu(tiny, texts):
    measured = estimate_training(texts, tiny.encoder, tiny.fingerprint)
    assert 0 < measured.seconds < 60


def test_estimate_omits_contexts_for_responses_and_spans(tiny, texts):
    tokens_of_texts = sum(training_tokens(texts, tiny.encoder))
    spans = SpanExamples(**vars(texts), spans=((),) * len(texts))
    answers = replace(texts, items=tuple(replace(item, response="") for item in texts.items))
    for examples_without in (spans, answers):
        estimate = estimate_training(
            examples_without, tiny.encoder, tiny.fingerprint, operations_per_s=SPEED
        )
        assert estimate.tokens == pytest.approx(tokens_of_texts, rel=OF_CONTEXTS)
    with_contexts = estimate_training(texts, tiny.encoder, tiny.fingerprint, operations_per_s=SPEED)
    assert with_contexts.tokens > 10 * tokens_of_texts


def test_estimate_prints_minutes_or_hours_and_gigabytes():
    lines = [
        str(TrainingEstimate(1, 14_300_000_000, seconds)) for seconds in (20.0, 840.0, 36_000.0)
    ]
    assert [text.split(" on ")[0] for text in lines] == [
        "about 2 minutes", "about 14 minutes", "about 10 hours",
    ]  # fmt: skip
    assert lines[0].endswith("14.3 GB of disk")


def test_documented_guard_estimates_match_calculation():
    measured, *rows = documented_table("guards.md", "model", "blocks x width", "hours")
    assert len(rows) == 3
    tokens = TOKENS_ON_CPU + context_budget(TOKENS_ON_CPU)

    def work(row):
        blocks, width = map(int, row["blocks x width"].split(" x "))
        return blocks * width**2, (blocks + 1) * width // 2 * tokens / 1e9

    of_measured, disk = work(measured)
    assert float(measured["GB of disk"]) == pytest.approx(disk, rel=OF_CONTEXTS)
    for row in rows:
        parameters, disk = work(row)
        hours = MEASURED_H * parameters / of_measured
        assert float(row["hours"]) == pytest.approx(hours, rel=0.05)
        assert float(row["GB of disk"]) == pytest.approx(disk, rel=0.01)
