"""The series of a server: what they count, and the time that probes take."""

import logging
import time
from collections.abc import Sequence
from importlib.metadata import version

import pytest

from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Reads
from sidelight.policy.rules import Policy, Rule
from sidelight.probes.bank import ProbeBanks
from sidelight.probes.standardisation import Projection
from worlds.models import untrained_probe
from worlds.servers import MODEL, in_process

CHATS, CHECKS = "/v1/chat/completions", "/v1/moderations"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "zebra"}], "temperature": 0}
SHORT = {**CHAT, "max_tokens": 3}
DELAY_S = 0.01
DURATION = "sidelight_request_duration_seconds_count"
Asked = Sequence[tuple[str, dict[str, object]]]


def engine_of(backbone: TransformersBackbone, *sides: str) -> TransformersEngine:
    reads = {"input": Reads(), "output": Reads("response")}
    return TransformersEngine(
        backbone, [untrained_probe(backbone, s, reads=reads[s]) for s in sides]
    )


def series(engine: TransformersEngine, asked: Asked, policy: Policy) -> dict[str, float]:
    """All series after these requests."""
    with in_process(engine, policy=policy, metrics_key="scraper") as http:
        for path, body in asked:
            http.post(path, json=body)
        text = http.get("/metrics", headers={"Authorization": "Bearer scraper"}).text
        lines = [line for line in text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def classification_seconds(values: dict[str, float], series: str = "count") -> list[float]:
    """Of the prompts and of the responses."""
    name = f"sidelight_classification_seconds_{series}"
    return [values.get(f'{name}{{side="{side}"}}', 0.0) for side in ("input", "output")]


ALWAYS = Rule("block", threshold=0.0)


@pytest.mark.parametrize(
    ("sides", "asked", "policy", "counts"),
    [
        (
            ("input", "output"),
            [
                (CHATS, SHORT),
                (CHATS, {**SHORT, "stream": True, "n": 2}),
                (CHECKS, {"input": ["one", "two"]}),
            ],
            Policy(),
            [5, 3],
        ),
        (("input",), [(CHATS, SHORT)], Policy(input={"input": ALWAYS}), [1, 0]),
        (("output",), [(CHATS, SHORT)], Policy(output={"output": ALWAYS}), [1, 1]),
        # No time counts for a text that no probe reads.
        (("input",), [(CHATS, SHORT)], Policy(), [1, 0]),
    ],
)
def test_classification_time_is_counted_once_per_text_and_side(tiny, sides, asked, policy, counts):
    values = series(engine_of(tiny, *sides), asked, policy)
    assert classification_seconds(values) == counts
    assert [seconds > 0 for seconds in classification_seconds(values, "sum")] == [
        count > 0 for count in counts
    ]
    # A blocked prompt has a verdict too.
    texts = sum(body.get("n", 1) for path, body in asked if path == CHATS)
    assert values["sidelight_time_to_verdict_seconds_count"] == texts


def test_classification_time_includes_slow_probe(tiny, monkeypatch: pytest.MonkeyPatch):
    """Its projection inside the forward pass, and its state: of each pass, once for each text."""

    def delay(owner: type, name: str) -> None:
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (time.sleep(DELAY_S), call(*args))[1])

    delay(Projection, "layer")
    delay(ProbeBanks, "read")
    values = series(engine_of(tiny, "output"), [(CHATS, SHORT)], Policy())
    of_input, of_output = classification_seconds(values, "sum")
    layers, steps = 4, 2
    assert of_input >= layers * DELAY_S
    assert of_output >= steps * (layers + 1) * DELAY_S


def test_access_log_demotes_health_checks_to_debug(tiny, caplog):
    engine, user = TransformersEngine(tiny, []), {"Authorization": "Bearer user"}
    logged_at = caplog.at_level(logging.DEBUG, logger="sidelight.access")
    with in_process(engine, api_key="user") as http, logged_at:
        for path in ("/health", "/ready", "/v1/models", "/nowhere"):
            http.get(path, headers=user)
    logged = {record.route: (record.levelno, record.key_id) for record in caplog.records}
    assert logged == {
        "/health": (logging.DEBUG, None),
        "/ready": (logging.DEBUG, None),
        "/v1/models": (logging.INFO, "api-key-1"),
        "other": (logging.INFO, "api-key-1"),
    }


def test_metrics_count_requests_tokens_and_verdicts_without_exposing_text(tiny):
    engine = TransformersEngine(tiny, [untrained_probe(tiny, "always", threshold=0.0)])
    with in_process(engine) as http:
        before = http.get("/metrics").text
        answer = http.post(CHATS, json={**CHAT, "max_tokens": 7}).json()
        http.post(CHECKS, json={"input": "zebra"})
        http.post(CHATS, json={})
        for path in ("/v1/models/a", "/v1/models/b", "/some/path/of/zebra"):
            http.get(path)
        text = http.get("/metrics").text
    # Counters begin at zero for each probe, so that rates are known from the start.
    assert 'sidelight_actions_total{action="block"' in before
    assert 'sidelight_verdicts_total{outcome="passed",probe="always"} 0.0' in before
    values = dict(line.rsplit(" ", 1) for line in text.splitlines())
    chat = f'sidelight_requests_total{{route="{CHATS}",status="%d"}}'
    assert values[chat % 200] == values[chat % 400] == "1.0"
    assert values['sidelight_requests_total{route="other",status="404"}'] == "1.0"
    written = answer["usage"]["completion_tokens"]
    assert float(values["sidelight_completion_tokens_total"]) == written > 0
    assert float(values["sidelight_prompt_tokens_total"]) == 2 * answer["usage"]["prompt_tokens"]
    assert values['sidelight_verdicts_total{outcome="flagged",probe="always"}'] == "2.0"
    for name in ("time_to_verdict", "time_to_first_text", "e2e_request_latency"):
        assert values[f"sidelight_{name}_seconds_count"] == "1.0"
    first, later, request_time = (
        float(values[f"sidelight_{name}_seconds_sum"])
        for name in ("time_to_first_text", "inter_text_latency", "e2e_request_latency")
    )
    assert 0 < first <= first + later <= request_time
    assert values["sidelight_requests_running"] == values["sidelight_requests_waiting"] == "0.0"
    # Durations are told by the template of the route.
    counts = {name: value for name, value in values.items() if name.startswith(DURATION)}
    assert counts == {
        f'{DURATION}{{route="{CHATS}"}}': "2.0",
        f'{DURATION}{{route="{CHECKS}"}}': "1.0",
        f'{DURATION}{{route="/v1/models/{{name:path}}"}}': "2.0",
        f'{DURATION}{{route="/metrics"}}': "1.0",
        f'{DURATION}{{route="other"}}': "1.0",
    }
    assert values[f'sidelight_build_info{{version="{version("sidelight")}"}}'] == "1.0"
    assert "zebra" not in text
