"""Whatever a soak can lose is found, and a short run of the command loses nothing."""

import asyncio
import json
import sys
from dataclasses import replace

import pytest

from commands import run, saved
from live import served
from sidelight.engines.transformers import TransformersEngine
from sidelight_lab.bench.soak import (
    Visit,
    connection_visits,
    ending,
    faults,
    memory_slope,
    pay,
    request_visits,
    soak_record,
)
from tiny import tiny_backbone

BEFORE = {"visits": 0, "seconds": 0.0, "resident_mb": 100.0, "descriptors": 8}
SLOPE = {"value": 0.5, "low": 0.1, "high": 2.0}


def phase(*expected, **endings):
    outcomes = [{"name": "chat", "expected": expected, "endings": endings}]
    return {"title": "requests", "outcomes": outcomes, "samples": [BEFORE], "seconds": 1.0}


SOUND = {
    "connections": phase("200", "429", **{"200": 3, "429": 1}),
    "requests": phase("200", **{"200": 2}),
    "slope": SLOPE,
    "allowed_growth": 1.0,
    "before": BEFORE,
    "after": BEFORE,
    "held": 0,
}


def grown(per_visit, *, jitter=0.0):
    """Samples whose memory grows evenly after a warm-up in which it leaps."""
    return [
        {"visits": visit, "resident_mb": 100 + 500 * (visit > 200) + per_visit * visit + noise}
        for visit, noise in zip(range(0, 1001, 5), [0.0, jitter, -jitter] * 67, strict=True)
    ]


def test_the_slope_is_that_of_the_samples_after_the_warm_up_and_a_passing_peak_is_no_growth():
    for per_visit in (0.0, 0.01, -0.002):
        slope = memory_slope(grown(per_visit, jitter=0.3), warm_up=200)
        assert slope["low"] <= per_visit * 1000 + 1e-9
        assert slope["high"] >= per_visit * 1000 - 1e-9
        assert slope["value"] == pytest.approx(per_visit * 1000, abs=0.5)
    samples = grown(0.0)
    samples[120]["resident_mb"] = 5000.0
    assert memory_slope(samples, warm_up=200) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_each_fault_is_found_and_a_sound_run_has_none():
    assert faults(SOUND) == []
    assert "Faults: none." in soak_record(SOUND, {}).to_markdown()
    for found, fault in (
        ({"slope": {"value": 2.0, "low": 1.1, "high": 3.0}}, "Memory grew by 2.00 MB"),
        ({"after": {**BEFORE, "descriptors": 10}}, "2 more files"),
        ({"held": 3}, "3 requests were still in the engine"),
        ({"requests": phase("a", b=2)}, "2 of 'chat' ended with 'b', not 'a'."),
    ):
        results = {**SOUND, **found}
        (said,) = faults(results)
        assert fault in said
        record = soak_record(results, {})
        assert said in record.to_markdown()
        assert json.loads(record.to_json())["faults"] == [said]


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


def test_a_verdict_that_is_missing_is_seen():
    kinds = [*connection_visits(), *request_visits("m", max_tokens=3)]
    assert len({visit.name for visit in kinds}) == len(kinds)
    # This server has no probes.
    with served(TransformersEngine(tiny_backbone(), [])) as url:
        chat = next(v for v in request_visits("tiny/llama", max_tokens=3) if v.name == "chat")
        assert asyncio.run(pay(chat, url)) == "200 incomplete"
        assert asyncio.run(pay(replace(chat, needs=()), url)) == "200"
    assert asyncio.run(pay(Visit("x", b"", ("left",)), url)).startswith("no connection")


@pytest.mark.skipif(sys.platform == "win32", reason="open files are counted on POSIX systems")
@pytest.mark.slow
def test_the_command_loses_nothing(tmp_path, capsys):
    model = saved(tiny_backbone(), tmp_path / "model")
    code = run(
        "bench", "soak", "--model", model, "--connections", "10", "--burst", "10", "--requests",
        "60", "--clients", "8", "--growth", "10000", "--out", str(tmp_path),
        "--plots", str(tmp_path),
    )  # fmt: skip
    made = json.loads((tmp_path / "soak.json").read_text())
    assert (code, made["faults"]) == (0, [])
    for phase, number in (("connections", 10), ("requests", 60)):
        assert sum(sum(kind["endings"].values()) for kind in made[phase]["outcomes"]) == number
    endings = {kind["name"]: kind["endings"] for kind in made["requests"]["outcomes"]}
    assert endings["blocked prompt"] == {"400 content_filter": 5}
    assert endings["cut text"] == {"200 content_filter": 5}
    assert capsys.readouterr().out == (tmp_path / "soak.md").read_text()
    assert (tmp_path / "soak.png").stat().st_size > 0
