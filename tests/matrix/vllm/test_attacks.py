"""The attacks of ``sidelight redteam`` on vLLM's own server, by every route that writes text."""

import json

import pytest

from worlds.servers import cli
from worlds.stock import stock_server

# A client that writes the template by hand can write control tokens too, which the routes of chats
# and the probe by itself read as other tokens.
WRITTEN = ("control", "template")


def rates(row):
    return [row[key]["flagged"] for key in ("recall", "false_alarms")]


@pytest.fixture(scope="module")
def blocking(subjects, tmp_path_factory):
    """vLLM's own server with the probe that is asked by itself, whose rule blocks."""
    home = tmp_path_factory.mktemp("blocking")
    policy = home / "policy.toml"
    policy.write_text(f'[input.injection]\nmode = "block"\nthreshold = {subjects.threshold}\n')
    folders = subjects.folders[:1]
    options = ("--enable-scale-out",)
    with stock_server(
        subjects.path, folders, home, *options, SIDELIGHT_POLICY=str(policy)
    ) as server:
        yield server


def test_redteam_rates_match_offline_probe_on_every_route(blocking, subjects, tmp_path):
    scores = subjects.scores([subjects.chat(text) for text in subjects.texts])
    labels = ["toxic" if score >= subjects.threshold else "fine" for score in scores]
    rows = [{"text": t, "label": n} for t, n in zip(subjects.texts, labels, strict=True)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def called(*more):
        out = tmp_path / "e.json"
        attacks = "control,template,places,disguises,padding-150-before,padding-150-after"
        options = ("--texts", "4", "--attacks", attacks, "--out", str(out))
        threshold = ("--threshold", str(subjects.threshold))
        data = ("--data", str(tmp_path / "data.jsonl"), "--model", subjects.path)
        assert cli("redteam", subjects.folders[0], *data, *threshold, *options, *more) == 0
        return json.loads(out.read_text())

    live, offline = called("--url", blocking.address), called("--dtype", "float32")
    routes = {route["route"]: route["attacks"] for route in live["routes"]}
    assert routes.keys() == {"chat", "text", "ids", "responses", "messages"}
    for route, attacks in routes.items():
        for row, offline_row in zip(attacks, offline["attacks"], strict=True):
            if row["attack"] == "system-turn":
                # No probe reads it, so the policy refuses it.
                assert row["recall"]["flagged"] == row["recall"]["texts"] > 0, route
            elif not row["attack"].startswith(WRITTEN):
                assert rates(row) == rates(offline_row), (route, row["attack"])
            if row["attack"] != "empty-turns":
                assert row["skipped"] == {}, (route, row["attack"])
    # The same tokens have the same verdict, whatever their source.
    for name in WRITTEN:
        of = [
            [rates(r) for r in routes[w] if r["attack"].startswith(name)] for w in ("text", "ids")
        ]
        assert of[0] == of[1]
