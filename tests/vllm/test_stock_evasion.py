"""The attacks of ``sidelight redteam`` on vLLM's own server, by every route that writes text."""

import json

import httpx
import numpy as np
import pytest

from commands import run
from stock_requests import ADMIN, TEXTS, served

ROUTES = {"chat", "text", "ids", "responses", "messages"}
# Whoever writes the template by hand can write control tokens too, which the routes of chats and
# the probe by itself read as other tokens.
WRITTEN = ("control", "template")


@pytest.fixture(scope="module")
def server(subjects, tmp_path_factory):
    with served(subjects, tmp_path_factory.mktemp("open"), "open") as server:
        yield server


@pytest.fixture(scope="module")
def attacked(subjects, server, tmp_path_factory):
    """The JSON of the command on the server, and that of the command on the probe itself."""
    home = tmp_path_factory.mktemp("data")
    scores = subjects.scores([subjects.chat(text) for text in TEXTS], 0)
    labels = ["toxic" if own >= subjects.threshold else "fine" for own in scores]
    rows = [{"text": t, "label": n} for t, n in zip(TEXTS, labels, strict=True)]
    (home / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    attacks = "control,template,places,disguises,padding-150-before,padding-150-after"

    def called(*more):
        out = home / "e.json"
        options = ("--texts", "4", "--attacks", attacks, "--json", str(out))
        threshold = ("--threshold", str(subjects.threshold))
        data = ("--data", str(home / "data.jsonl"), "--model", subjects.path)
        words = (subjects.folders[0], *data, *threshold, *options, *more)
        assert run("redteam", *words) == 0
        return json.loads(out.read_text())

    return called("--url", server.address), called("--dtype", "float32")


def rates(row):
    return [row[key]["flagged"] for key in ("recall", "false_alarms")]


def test_every_route_blocks_what_the_probe_flags_by_itself(attacked):
    live, alone = attacked
    routes = {route["route"]: route["attacks"] for route in live["routes"]}
    assert routes.keys() == ROUTES
    for route, rows in routes.items():
        for row, own in zip(rows, alone["attacks"], strict=True):
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
    assert any(rates(row) != rates(live["routes"][0]["attacks"][0]) for row in routes["chat"])


def test_the_route_that_only_judges_says_what_the_others_block(server, subjects):
    key = {"Authorization": f"Bearer {ADMIN}"}
    answer = httpx.post(f"{server.address}/v1/moderations", json={"input": TEXTS}, headers=key)
    found = [each["sidelight"]["verdicts"][0] for each in answer.json()["results"]]
    said = np.array([verdict["probabilities"]["toxic"] for verdict in found])
    for text, is_flagged in zip(TEXTS, said >= subjects.threshold, strict=True):
        turns = [{"role": "user", "content": text}]
        for path, body in (
            ("/v1/chat/completions", {"messages": turns, "max_tokens": 1}),
            ("/v1/responses", {"input": text, "max_output_tokens": 1}),
            ("/v1/messages", {"messages": turns, "max_tokens": 1}),
            ("/v1/completions", {"prompt": [*subjects.chat(text).token_ids], "max_tokens": 1}),
        ):
            sent = httpx.post(f"{server.address}{path}", json={"model": "tiny", **body}, timeout=60)
            assert (sent.status_code == 400) == is_flagged, (path, text, sent.text)
