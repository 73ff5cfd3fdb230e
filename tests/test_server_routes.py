"""What holds on every route that takes a body: keys, limits, the audit log, and the metrics."""

import json

import pytest

from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Reads
from test_server_canary import BODIES as CANARY_BODIES
from test_server_canary import WORD as CANARY
from worlds.models import spans_probe, three_probes, untrained_probe
from worlds.servers import in_process, post_paths

KEY = {"Authorization": "Bearer a-client-key"}
WORD = "quagga"
BODIES = json.loads(json.dumps(CANARY_BODIES).replace(CANARY, WORD))
# That one also asks a question that no probe answers.
BODIES["/v1/decisions"]["questions"] = [{"type": "predicate", "name": "toxicity"}]


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    probes = [
        *three_probes(tiny),
        spans_probe(tiny, "words", threshold=0.5),
        untrained_probe(tiny, "late", reads=Reads("response")),
    ]
    limits = {"max_body_bytes": 2000, "audit_log": path}
    keys = {"api_key": "a-client-key", "metrics_key": "a-scraper-key"}
    with in_process(TransformersEngine(tiny, probes), **limits, **keys) as http:
        yield http, path


def counted(http, name: str) -> float:
    """The sum of a series over its labels."""
    text = http.get("/metrics", headers={"Authorization": "Bearer a-scraper-key"}).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_bodies_cover_every_post_route(server):
    http, _ = server
    http.headers.update(KEY)
    paths = post_paths(http)
    del http.headers["Authorization"]
    assert paths == BODIES.keys()


@pytest.mark.parametrize("path", BODIES)
def test_route_requires_key_and_audits_and_counts_verdicts(server, path):
    http, audit = server
    assert http.post(path, json=BODIES[path]).status_code == 401
    before, lines = counted(http, "sidelight_verdicts_total"), len(audit.read_text().splitlines())
    answer = http.post(path, json=BODIES[path], headers=KEY)
    assert answer.status_code == 200, answer.text
    new = [json.loads(line) for line in audit.read_text().splitlines()[lines:]]
    assert new
    assert {line["request_id"] for line in new} == {answer.headers["x-request-id"]}
    assert {line["key_id"] for line in new} == {"api-key-1"}
    assert WORD not in audit.read_text()
    assert counted(http, "sidelight_verdicts_total") - before == len(new)
    series = f'sidelight_requests_total{{route="{path}",status="200"}}'
    assert counted(http, series) >= 1


@pytest.mark.parametrize("path", BODIES)
def test_route_rejects_oversized_body(server, path):
    body = {**BODIES[path], "filler": "x" * 3000}
    assert server[0].post(path, json=body, headers=KEY).status_code == 413
