"""Whatever a soak can lose is found, and a short run of the command loses nothing."""

import asyncio
import json
import sys
from dataclasses import replace

import pytest

from commands import run, saved
from live import served
from sidelight.engines.transformers import TransformersEngine
from sidelight_lab.bench.soak import Outcomes, Phase, Record
from sidelight_lab.bench.soak_visits import (
    Address,
    Sample,
    Slope,
    Visit,
    connections,
    ending,
    memory_slope,
    pay,
    requests,
)
from tiny import tiny_backbone

BEFORE = Sample(0, 0.0, 100.0, 8)
PHASE = Phase("requests", (Outcomes("chat", ("200", "429"), {"200": 3, "429": 1}),), (BEFORE,), 1.0)
SOUND = Record({}, PHASE, PHASE, Slope(0.5, 0.1, 2.0), 1.0, BEFORE, BEFORE, 0)


def grown(per_visit, *, jitter=0.0):
    """Samples whose memory grows evenly after a warm-up in which it leaps."""
    return [
        Sample(visit, 0.0, 100 + (0 if visit <= 200 else 500) + per_visit * visit + noise, 8)
        for visit, noise in zip(range(0, 1001, 5), [0.0, jitter, -jitter] * 67, strict=True)
    ]


@pytest.mark.parametrize("per_visit", [0.0, 0.01, -0.002])
def test_the_slope_is_that_of_the_samples_after_the_warm_up(per_visit):
    slope = memory_slope(grown(per_visit, jitter=0.3), warm_up=200)
    assert slope.low <= per_visit * 1000 + 1e-9
    assert slope.high >= per_visit * 1000 - 1e-9
    assert slope.value == pytest.approx(per_visit * 1000, abs=0.5)


def test_a_passing_peak_is_no_growth():
    samples = grown(0.0)
    samples[120] = replace(samples[120], resident_mb=5000.0)
    assert memory_slope(samples, warm_up=200) == Slope(0.0, 0.0, 0.0)


def test_a_sound_run_has_no_fault():
    assert SOUND.faults == []
    assert "Faults: none." in SOUND.to_markdown()


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (replace(SOUND, slope=Slope(2.0, 1.1, 3.0)), "Memory grew by 2.00 MB"),
        (replace(SOUND, after=replace(BEFORE, descriptors=10)), "2 more files"),
        (replace(SOUND, held=3), "3 requests were still in the engine"),
        (
            replace(SOUND, requests=replace(PHASE, outcomes=(Outcomes("x", ("a",), {"b": 2}),))),
            "2 of 'x' ended with 'b', not 'a'.",
        ),
    ],
)
def test_each_fault_is_found(record, fault):
    (found,) = record.faults
    assert fault in found
    assert found in record.to_markdown()
    assert json.loads(record.to_json())["faults"] == [found]


@pytest.mark.parametrize(
    ("received", "said"),
    [
        (b"", "closed"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"choices":[{"finish_reason":"length"}]}', "200"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"finish_reason":"content_filter"}', "200 content_filter"),
        (b'HTTP/1.1 400 Bad\r\n\r\n{"error":{"code":"content_filter"}}', "400 content_filter"),
        (b'HTTP/1.1 400 Bad\r\n\r\n{"error":{"code":null}}', "400"),
        (b"HTTP/1.1 200 OK\r\na: text/event-stream\r\n\r\ndata: [DONE]\n\n", "200 [DONE]"),
        (b"HTTP/1.1 200 OK\r\na: text/event-stream\r\n\r\ndata: {}\n\n", "200 no [DONE]"),
    ],
)
def test_an_answer_in_few_words(received, said):
    assert ending(received) == said


def test_every_kind_has_a_name_of_its_own():
    kinds = [*connections(), *requests("m", max_tokens=3)]
    assert len({visit.name for visit in kinds}) == len(kinds)


def test_a_verdict_that_is_missing_is_seen():
    # This server has no probes.
    with served(TransformersEngine(tiny_backbone(), [])) as url:
        address = Address("127.0.0.1", int(url.rsplit(":", 1)[1]))
        chat = next(v for v in requests("tiny/llama", max_tokens=3) if v.name == "chat")
        assert asyncio.run(pay(chat, address)) == "200 incomplete"
        assert asyncio.run(pay(replace(chat, needs=()), address)) == "200"
    assert asyncio.run(pay(Visit("x", b"", ("left",)), address)).startswith("no connection")


@pytest.mark.skipif(sys.platform != "linux", reason="memory and files are read from /proc")
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_loses_nothing(tmp_path, capsys):
    model = saved(tiny_backbone(), tmp_path / "model")
    code = run(
        "bench", "soak", "--model", model, "--connections", "60", "--burst", "30", "--requests",
        "120", "--clients", "8", "--growth", "10000", "--out", str(tmp_path),
        "--plots", str(tmp_path),
    )  # fmt: skip
    made = json.loads((tmp_path / "soak.json").read_text())
    assert (code, made["faults"]) == (0, [])
    for phase, number in (("connections", 60), ("requests", 120)):
        assert sum(sum(kind["endings"].values()) for kind in made[phase]["outcomes"]) == number
    assert capsys.readouterr().out == (tmp_path / "soak.md").read_text()
    assert (tmp_path / "soak.png").stat().st_size > 0
