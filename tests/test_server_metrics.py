"""The series of a live server: what they count, and the time that probes take."""

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest

from live import MODEL, http_client, served
from sidelight.bank import BankTap, Panel
from sidelight.engines.base import Engine
from sidelight.engines.transformers import TransformersEngine
from sidelight.policy.rules import Policy, Rule
from sidelight.prompts import Reads
from tiny import tiny_backbone, untrained_probe

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
SHORT = {**CHAT, "max_tokens": 3}
DELAY_S = 0.01


def series(engine: Engine, paths: list[tuple[str, dict[str, object]]], policy: Policy):
    """Count and sum of each side after these requests."""
    with served(engine, policy=policy) as address, http_client(address) as http:
        for path, body in paths:
            http.post(path, json=body)
        lines = [line for line in http.get("/metrics").text.splitlines() if line[0] != "#"]
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
    return {
        side: tuple(
            values.get(f'sidelight_judging_seconds_{part}{{side="{side}"}}', 0.0)
            for part in ("count", "sum")
        )
        for side in ("input", "output")
    }


def engine_of(*sides: str) -> TransformersEngine:
    backbone = tiny_backbone()
    probes = {"input": Reads(), "output": Reads("response")}
    return TransformersEngine(
        backbone, [untrained_probe(backbone, s, reads=probes[s]) for s in sides]
    )


def test_each_text_counts_once_on_each_side():
    asked = [
        ("/v1/chat/completions", SHORT),
        ("/v1/chat/completions", {**SHORT, "stream": True, "n": 2}),
        ("/v1/moderations", {"input": ["one", "two"]}),
    ]
    found = series(engine_of("input", "output"), asked, Policy())
    assert [count for count, _ in found.values()] == [5, 3]
    assert all(seconds > 0 for _, seconds in found.values())


def test_a_blocked_prompt_and_a_cut_text_count_too():
    always = Rule("block", threshold=0.0)
    asked = [("/v1/chat/completions", SHORT)]
    blocked = series(engine_of("input"), asked, Policy(input={"input": always}))
    cut = series(engine_of("output"), asked, Policy(output={"output": always}))
    assert blocked["input"][0] == cut["input"][0] == cut["output"][0] == 1
    assert blocked["output"][0] == 0


def test_no_time_counts_for_a_text_that_no_probe_reads():
    found = series(engine_of("input"), [("/v1/chat/completions", SHORT)], Policy())
    assert [count for count, _ in found.values()] == [1, 0]


def test_the_time_of_a_slow_probe_is_in_it(monkeypatch: pytest.MonkeyPatch):
    """Its projection inside the forward pass, and its state: of each pass, once for each text."""
    monkeypatch.setattr(BankTap, "__call__", delayed(BankTap.__call__))
    monkeypatch.setattr(Panel, "read", delayed(Panel.read))
    found = series(engine_of("output"), [("/v1/chat/completions", SHORT)], Policy())
    layers, steps = 4, 2
    assert found["input"][1] >= layers * DELAY_S
    assert found["output"][1] >= steps * (layers + 1) * DELAY_S


def delayed(call: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any) -> Any:
        time.sleep(DELAY_S)
        return call(*args)

    return slow


def test_metrics_count_requests_tokens_and_verdicts():
    backbone = tiny_backbone()
    request = {"model": MODEL, "messages": [{"role": "user", "content": "zebra"}]}
    probes = [untrained_probe(backbone, "always", threshold=0.0)]
    with served(TransformersEngine(backbone, probes)) as address, http_client(address) as http:
        answer = http.post(
            "/v1/chat/completions", json={**request, "max_tokens": 7, "temperature": 0}
        ).json()
        http.post("/v1/moderations", json={"input": "zebra"})
        http.post("/v1/chat/completions", json={})
        http.get("/some/path/of/zebra")
        series = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines())
    chat = 'sidelight_requests_total{route="/v1/chat/completions",status="%d"}'
    assert series[chat % 200] == series[chat % 400] == "1.0"
    assert series['sidelight_requests_total{route="other",status="404"}'] == "1.0"
    written = answer["usage"]["completion_tokens"]
    assert float(series["sidelight_completion_tokens_total"]) == written > 0
    assert float(series["sidelight_prompt_tokens_total"]) == 2 * answer["usage"]["prompt_tokens"]
    assert series['sidelight_verdicts_total{outcome="flagged",probe="always"}'] == "2.0"
    for name in ("time_to_verdict", "time_to_first_text", "e2e_request_latency"):
        assert series[f"sidelight_{name}_seconds_count"] == "1.0"
    assert series["sidelight_requests_running"] == series["sidelight_requests_waiting"] == "0.0"
    assert "zebra" not in str(series)


def lines_of(address: str, key: str = "") -> list[str]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with http_client(address) as http:
        return http.get("/metrics", headers=headers).raise_for_status().text.splitlines()


def test_counters_of_verdicts_and_actions_begin_at_zero_for_each_probe():
    with served(engine_of("input", "output"), policy=Policy()) as address:
        lines = lines_of(address)
    for probe in ("input", "output"):
        assert (
            f'sidelight_actions_total{{action="block",probe="{probe}",side="{probe}"}} 0.0' in lines
        )
        assert f'sidelight_verdicts_total{{outcome="flagged",probe="{probe}"}} 0.0' in lines


def test_metrics_tell_of_the_process_and_the_version_and_not_when_series_began():
    with served(engine_of("input")) as address:
        text = "\n".join(lines_of(address))
    assert f'sidelight_build_info{{version="{version("sidelight")}"}} 1.0' in text
    assert "process_resident_memory_bytes " in text
    assert "_created" not in text


def test_the_duration_of_requests_is_counted_by_the_template_of_their_route():
    with served(engine_of("input")) as address:
        with http_client(address) as http:
            http.post("/v1/chat/completions", json={**SHORT, "stream": True})
            http.post("/v1/chat/completions", json={})
            for path in ("/v1/models/a", "/v1/models/b", "/nowhere/a", "/nowhere/b"):
                http.get(path)
        lines = lines_of(address)
    name = "sidelight_request_duration_seconds_count"
    counts = dict(line.rsplit(" ", 1) for line in lines if line.startswith(name))
    assert counts == {
        f'{name}{{route="/v1/chat/completions"}}': "2.0",
        f'{name}{{route="/v1/models/{{name:path}}"}}': "2.0",
        f'{name}{{route="other"}}': "2.0",
    }


def test_the_verdict_of_a_blocked_prompt_counts_in_the_time_to_verdict():
    always = Policy(input={"input": Rule("block", threshold=0.0)})
    with served(engine_of("input"), policy=always) as address:
        with http_client(address) as http:
            assert http.post("/v1/chat/completions", json=SHORT).status_code == 400
        assert "sidelight_time_to_verdict_seconds_count 1.0" in lines_of(address)


def test_a_metrics_key_sees_the_scores_of_what_blocks():
    blocking = Policy(input={"input": Rule("block", threshold=1.0)})
    keys = {"api_key": "user", "metrics_key": "scraper"}
    with served(engine_of("input"), policy=blocking, **keys) as address:
        with http_client(address) as http:
            http.post(
                "/v1/moderations", json={"input": "x"}, headers={"Authorization": "Bearer user"}
            )
        text = "\n".join(lines_of(address, "scraper"))
    assert 'sidelight_probe_score_count{label="toxic",probe="input"} 1.0' in text
