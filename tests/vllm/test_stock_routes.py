"""vLLM's own server under a policy: every route that it has, with each of its options."""

import json
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest

from commands import run
from policy_contract import ADMIN, parts_of
from sidelight.artifact import save_probe
from stock_requests import post, posts, requests_of, written_in

pytestmark = pytest.mark.xdist_group("stock")
# Whoever writes the template by hand can write control tokens too, which the routes of chats and
# the probe by itself read as other tokens.
WRITTEN = ("control", "template")


@contextmanager
def reloaded(address, name, folder, old):
    """Serves the probe of another folder meanwhile."""
    for path, is_over in ((folder, False), (old, True)):
        url = f"{address}/admin/probes/{name}/reload"
        headers = {"Authorization": f"Bearer {ADMIN}"}
        answer = httpx.post(url, json={"path": str(path)}, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        if not is_over:
            yield


@pytest.fixture
def sealed(stock, subjects, tmp_path):
    """Every answer is cut before any of it is sent."""
    (leak,) = (probe for probe in subjects.probes if probe.name == "leak")
    calibration = replace(leak.calibration, shift=(50.0,))
    folder = save_probe(replace(leak, calibration=calibration), tmp_path / "leak")
    with reloaded(stock.address, "leak", folder, subjects.folders[1]):
        yield stock.address


@pytest.mark.parametrize("streamed", [False, True])
def test_no_route_answers_an_injected_prompt(stock, subjects, streamed):
    # /v1/systemone writes a prompt of its own around the text.
    tried = posts(stock.address) - {"/v1/systemone"}
    for path, body in requests_of(subjects, subjects.injected, streamed=streamed):
        if path not in tried:
            continue
        response = post(stock.address, path, body)
        assert response.status_code == 400, (path, body, response.text)
        assert response.json()["error"]["code"] == "content_filter", (path, body, response.text)
        assert "injection" in response.headers["x-sidelight-flagged"]


@pytest.mark.parametrize("streamed", [False, True])
def test_no_route_sends_anything_of_a_text_that_is_cut_at_once(sealed, subjects, streamed):
    known = posts(sealed)
    for path, body in requests_of(subjects, subjects.benign, streamed=streamed):
        if path not in known:
            continue
        response = post(sealed, path, body)
        parts = parts_of(response)
        if body.get("echo"):
            assert response.status_code == 200
        else:
            found = [each for part in parts for each in written_in(part)]
            assert response.status_code >= 400 or not found, (path, body, found, response.text)
        if response.status_code == 200 and path in ("/v1/chat/completions", "/v1/completions"):
            reasons = {
                choice["index"]: choice["finish_reason"]
                for part in parts
                for choice in part.get("choices", ())
            }
            texts = body.get("n", 1) * (2 if isinstance(body.get("prompt"), list) else 1)
            assert reasons.keys() == {*range(texts)}, (body, response.text)
            # An empty answer has nothing to cut.
            assert set(reasons.values()) <= {"content_filter", "stop"}, (body, response.text)


def rates(row):
    return [row[key]["flagged"] for key in ("recall", "false_alarms")]


def test_every_route_blocks_what_the_probe_flags_by_itself(stock, subjects, tmp_path):
    """The attacks of ``sidelight redteam``, on the server and on the probe."""
    scores = subjects.scores([subjects.chat(text) for text in subjects.texts])
    labels = ["toxic" if own >= subjects.threshold else "fine" for own in scores]
    rows = [{"text": t, "label": n} for t, n in zip(subjects.texts, labels, strict=True)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def called(*more):
        out = tmp_path / "e.json"
        attacks = "control,template,places,padding-150-before"
        options = ("--texts", "2", "--attacks", attacks, "--json", str(out))
        threshold = ("--threshold", str(subjects.threshold))
        data = ("--data", str(tmp_path / "data.jsonl"), "--model", subjects.path)
        assert run("redteam", subjects.folders[0], *data, *threshold, *options, *more) == 0
        return json.loads(out.read_text())

    live, alone = called("--url", stock.address), called("--dtype", "float32")
    routes = {route["route"]: route["attacks"] for route in live["routes"]}
    assert routes.keys() == {"chat", "text", "ids", "responses", "messages"}
    for route, attacks in routes.items():
        for row, own in zip(attacks, alone["attacks"], strict=True):
            if row["attack"] == "system-turn":
                # Nobody reads it, so the policy refuses it.
                assert row["recall"]["flagged"] == row["recall"]["texts"] > 0, route
            elif not row["attack"].startswith(WRITTEN):
                assert rates(row) == rates(own), (route, row["attack"])
            if row["attack"] != "empty-turns":
                assert row["skipped"] == {}, (route, row["attack"])
    # The same tokens have the same verdict, whoever has made them.
    for name in WRITTEN:
        of = [
            [rates(r) for r in routes[w] if r["attack"].startswith(name)] for w in ("text", "ids")
        ]
        assert of[0] == of[1]
