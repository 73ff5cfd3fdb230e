"""The server of ``sidelight label``, and those who must not ask it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from sitting import TOKEN, Sitting, saved_labels

from sidelight_label import app as labelling_app
from sidelight_label.app import create_app
from sidelight_label.file import Criterion
from worlds.servers import listening

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def untouched(tiny, tmp_path_factory):
    """A sitting without the right to decide anything."""
    return Sitting(tiny, tmp_path_factory.mktemp("untouched"))


@contextmanager
def client_of(sitting) -> Iterator[httpx.Client]:
    with (
        listening(create_app(sitting.queue, TOKEN)) as address,
        httpx.Client(base_url=address, headers=HEADERS, timeout=10) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def http(untouched) -> Iterator[httpx.Client]:
    with client_of(untouched) as client:
        yield client
        assert saved_labels(untouched) == []


def test_requests_without_token_cannot_read_or_change_labels(untouched, http):
    wrong = [{}, {"Authorization": "Bearer x"}, {"Authorization": TOKEN}, {"Cookie": TOKEN}]
    with httpx.Client(base_url=http.base_url) as stranger:
        for headers in wrong:
            asked = stranger.get("/api/state", headers=headers)
            told = stranger.post("/api/label", json={"row": 0, "labels": ["fine"]}, headers=headers)
            assert (asked.status_code, told.status_code) == (401, 401)
            assert untouched.rows[0]["text"] not in asked.text + told.text
        pages = [stranger.get(path) for path in labelling_app.FILES]
    assert [page.status_code for page in pages] == [200] * len(pages)
    assert not any(row["text"] in page.text for page in pages for row in untouched.rows)
    assert not any(TOKEN in page.text for page in pages)
    assert http.get("/api/state").status_code == 200


def test_foreign_hosts_and_origins_are_rejected_despite_the_token(http):
    port = http.base_url.port
    body = {"row": 0, "labels": ["fine"]}
    for headers in (
        # A name of another site that leads to this machine.
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": f"http://localhost:{port}"},
        {"Origin": "null"},
    ):
        for asked in (
            http.get("/api/state", headers=headers),
            http.post("/api/label", json=body, headers=headers),
        ):
            assert asked.status_code == 403, headers
    same_origin = {"Origin": f"http://127.0.0.1:{port}"}
    assert http.get("/api/state", headers=same_origin).status_code == 200


def test_path_traversal_and_unknown_paths_return_404(http):
    for path in (
        "/../pyproject.toml", "/%2e%2e/%2e%2e/etc/passwd", "/static/..%2fapp.py", "//etc/passwd",
        "/label.js/../../queue.py", "/docs", "/openapi.json",
    ):  # fmt: skip
        asked = http.build_request("GET", http.base_url)
        asked.url = asked.url.copy_with(raw_path=path.encode())
        assert http.send(asked).status_code == 404, path


def test_pages_forbid_external_requests_and_inline_scripts(http):
    for path in labelling_app.FILES:
        headers = http.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_malformed_and_out_of_range_decisions_are_rejected(http):
    headers = {"Content-Type": "application/json"}
    for body in (
        "{",
        '{"row": "0", "labels": ["fine"]}',
        '{"row": -1, "labels": ["fine"]}',
        '{"row": 60, "labels": ["fine"]}',
    ):
        assert http.post("/api/label", content=body, headers=headers).status_code == 400, body


def test_concurrent_decisions_are_saved_exactly_once(tiny, tmp_path):
    """Four tabs label all texts at once: each text is in the file once, and no row is torn."""
    sitting = Sitting(tiny, tmp_path)
    codes = []

    def label_all():
        with httpx.Client(base_url=http.base_url, headers=HEADERS, timeout=30) as client:
            for row in range(60):
                told = client.post("/api/label", json={"row": row, "labels": ["fine"]})
                codes.append(told.status_code)

    with client_of(sitting) as http:
        tabs = [threading.Thread(target=label_all) for _ in range(4)]
        for tab in tabs:
            tab.start()
        for tab in tabs:
            tab.join()
    assert sorted(set(codes)) == [200, 400]
    assert codes.count(200) == 60
    ids = [json.loads(line)["id"] for line in sitting.out.read_text().splitlines()]
    assert sorted(ids) == list(range(60))


def test_failed_training_is_reported_and_labelling_continues(tiny, tmp_path):
    sitting = Sitting(tiny, tmp_path)
    with client_of(sitting) as http:
        assert http.post("/api/train").status_code == 400
        sitting.label(40)
        sitting.folder.joinpath("probe").write_text("a file, where a folder has to be")
        http.post("/api/train")
        while (state := http.get("/api/state").json())["training"]["is_running"]:
            pass
        assert "Cannot write the probe" in state["training"]["failure"]
        body = {"row": state["text"]["row"], "labels": ["fine"]}
        assert http.post("/api/label", json=body).is_success


def test_command_exits_without_waiting_for_training(tiny, tmp_path):
    sitting, ended = Sitting(tiny, tmp_path), threading.Event()
    sitting.label(40)
    trainers = []

    def train():
        trainers.append(threading.current_thread())
        ended.wait(60)

    sitting.queue.train = train
    with client_of(sitting) as http:
        for _ in range(2):
            assert http.post("/api/train").json()["training"]["is_running"]
        ended.set()
    (trainer,) = trainers
    assert trainer.daemon


@pytest.mark.parametrize("seen", ["The rule.", "an older rule"])
def test_criterion_is_displayed_and_only_current_tabs_edit_it(tiny, tmp_path, seen):
    rule = tmp_path / "rule.md"
    rule.write_text("The rule.\n")
    sitting = Sitting(tiny, tmp_path)
    sitting.queue.criterion = Criterion(rule)
    with client_of(sitting) as http:
        state = http.get("/api/state").json()
        assert state["criterion"] == {"text": "The rule.", "file": "rule.md", "label": "toxic"}
        assert state["judge"] is None
        told = http.post("/api/criterion", json={"text": "Another.", "seen": seen})
        is_current = seen == "The rule."
        assert told.status_code == (200 if is_current else 400)
        assert rule.read_text() == ("Another.\n" if is_current else "The rule.\n")
        http.post("/api/ask", json={})
        while (judge := http.get("/api/state").json()["judge"]) and judge["is_asked"]:
            pass
        assert judge is None


def test_criterion_edit_is_rejected_without_a_criterion(http):
    assert http.post("/api/criterion", json={"text": "x", "seen": ""}).status_code == 400
