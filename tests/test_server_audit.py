"""The audit log: every decision once, no text, and what happens when it cannot be written."""

import json
import logging
import os
import re
import time
from pathlib import Path

import pytest

from commands import run
from live import MODEL, http_client, served
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.policy.decisions import decide
from sidelight.policy.rules import Policy, Rule, bound_rules
from sidelight.prompts import Message, Reads
from sidelight.server.config import read_config
from sidelight.server.errors import RequestError
from sidelight.server.metrics import Metrics
from sidelight.server.observe import AuditLog, RequestObserver
from sidelight.types import Judgement
from tiny import tiny_backbone, untrained_probe

CHAT = "/v1/chat/completions"
BODY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "zebra"}],
    "max_tokens": 3,
    "temperature": 0,
}
BLOCKING = Policy(input={"never": Rule("block")})


def engine():
    backbone = tiny_backbone()
    probes = [
        untrained_probe(backbone, "never", threshold=1.0),
        untrained_probe(backbone, "always", threshold=0.0),
        untrained_probe(backbone, "late", reads=Reads("response")),
    ]
    return TransformersEngine(backbone, probes)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def test_every_decision_is_written_once_and_no_text(path):
    with (
        served(engine(), audit_log=path, api_key="secret") as address,
        http_client(address) as http,
    ):
        http.headers["Authorization"] = "Bearer secret"
        answer = http.post(CHAT, json=BODY)
        http.post("/v1/moderations", json={"input": "zebra"}).raise_for_status()
    written = lines(path)
    assert [(line["probe"], line["side"], line["outcome"]) for line in written[:3]] == [
        ("never", "input", "passed"),
        ("always", "input", "flagged"),
        ("late", "output", written[2]["outcome"]),
    ]
    assert [line["probe"] for line in written[3:]] == ["never", "always"]
    assert {line["key_id"] for line in written} == {"api-key-1"}
    assert {line["request_id"] for line in written[:3]} == {answer.headers["x-request-id"]}
    verdicts = {v["probe"]: v for v in answer.json()["sidelight"]["verdicts"]}
    for line in written[:3]:
        assert line["scores"] == verdicts[line["probe"]]["probabilities"]
    # The same text has the same hash, wherever it came in.
    assert len({line["text_hmac"] for line in written}) == 1
    assert "zebra" not in path.read_text()
    assert "secret" not in path.read_text()


LATE = Policy(output={"late": Rule("block", threshold=1.0)})


def left_midway(http, body):
    """Reads the first text and closes the connection."""
    with http.stream("POST", CHAT, json={**body, "stream": True, "max_tokens": 200}) as answer:
        for line in answer.iter_lines():
            if '"content":"' in line and '"content":""' not in line:
                return


def wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Policy(), LATE])
def test_a_text_that_a_client_leaves_is_audited_and_counted(path, policy):
    with (
        served(engine(), audit_log=path, policy=policy, admin_key="admin") as address,
        http_client(address) as http,
    ):
        left_midway(http, BODY)
        wait_for(lambda: len(lines(path)) == 3)
        # Scores of a probe that blocks are in the metrics of an admin alone.
        series = http.get("/metrics", headers={"Authorization": "Bearer admin"}).text
    late = lines(path)[2]
    assert (late["probe"], late["side"], late["outcome"]) == ("late", "output", "unfinished")
    assert late["action"] == "none"
    # Without a rule that may cut the text, its probes are judged at its end only.
    assert (late["scores"] is None) == (policy == Policy())
    assert 'sidelight_verdicts_total{outcome="unfinished",probe="late"} 1.0' in series
    assert 'sidelight_probe_score_count{label="toxic",probe="late"}' not in series
    (written,) = re.findall(r"^sidelight_completion_tokens_total (.+)$", series, re.MULTILINE)
    assert 0 < float(written) < 200


def test_a_text_of_which_nothing_was_sent_is_not_audited(path):
    """All of it is held back by the warm-up when the engine fails."""
    backbone = tiny_backbone()
    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) == 5:
            raise RuntimeError("out of memory")

    backbone.model.register_forward_pre_hook(fail)
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    policy = Policy(output={"late": Rule("block", threshold=1.0, warm_up=100)})
    with (
        served(TransformersEngine(backbone, [late]), audit_log=path, policy=policy) as address,
        http_client(address) as http,
    ):
        answer = http.post(CHAT, json={**BODY, "stream": True, "max_tokens": 20})
        assert "generation_failed" in answer.text
        series = http.get("/metrics").text
    assert lines(path) == []
    # The fourth token was drawn, but gave no text and was not read.
    assert "sidelight_completion_tokens_total 3.0" in series


@pytest.mark.slow
@pytest.mark.parametrize("deadline", [1, 600])
def test_a_text_that_the_deadline_or_the_engine_ends_is_audited_too(path, deadline):
    backbone = tiny_backbone()
    is_slow = deadline == 1
    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) > 5:
            if not is_slow:
                raise RuntimeError("out of memory")
            time.sleep(0.2)

    backbone.model.register_forward_pre_hook(fail)
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    with (
        served(TransformersEngine(backbone, [late]), audit_log=path, deadline=deadline) as address,
        http_client(address) as http,
    ):
        answer = http.post(CHAT, json={**BODY, "stream": True, "max_tokens": 200})
        wait_for(lambda: lines(path))
    assert ("deadline_exceeded" if is_slow else "generation_failed") in answer.text
    assert [line["outcome"] for line in lines(path)] == ["unfinished"]


def test_the_hash_depends_on_text_and_salt(path):
    one, other = AuditLog(path, salt=b"1"), AuditLog(path, salt=b"2")
    hashes = {log.hash([]) for log in (one, other)}
    assert len(hashes) == 2


def test_the_salt_is_the_options_then_the_variables_and_never_blank(path, monkeypatch):
    def salt_of(**options):
        return read_config(audit_log=path, **options).salt

    assert salt_of() != salt_of()
    monkeypatch.setenv("SIDELIGHT_AUDIT_SALT", "salt")
    assert salt_of(audit_salt="1") == b"1"
    assert salt_of() == b"salt"
    for blank in ("", " ", "\n"):
        with pytest.raises(SidelightError, match="--audit-salt is blank"):
            salt_of(audit_salt=blank)
        with monkeypatch.context() as patch:
            patch.setenv("SIDELIGHT_AUDIT_SALT", blank)
            with pytest.raises(SidelightError, match="SIDELIGHT_AUDIT_SALT is blank"):
                salt_of()


def test_a_server_does_not_start_with_a_blank_salt(path, monkeypatch, capsys):
    monkeypatch.setenv("SIDELIGHT_AUDIT_SALT", "")
    assert run("serve", "--audit-log", str(path), "--host", "0.0.0.0") == 2
    assert "SIDELIGHT_AUDIT_SALT is blank" in capsys.readouterr().err


class Read(list):
    """A conversation that counts how often it is read."""

    times = 0

    def __iter__(self):
        self.times += 1
        return super().__iter__()


def test_a_text_is_hashed_once_for_all_its_decisions(path):
    probes, text = engine().probes, Read([Message("user", "zebra")])
    metrics = Metrics(TransformersEngine(tiny_backbone(), []))
    observed = RequestObserver(metrics, AuditLog(path, salt=b"salt")).text(text)
    observed.end([decide(bound, Judgement(), tokens=9) for bound in bound_rules(Policy(), probes)])
    assert (len(lines(path)), text.times) == (3, 1)


def test_a_rotated_log_goes_on_in_a_new_file(path):
    audit = AuditLog(path, salt=b"")
    audit.write([{"line": 1}])
    os.rename(path, path.with_suffix(".1"))
    audit.write([{"line": 2}])
    assert lines(path.with_suffix(".1")) == [{"line": 1}]
    assert lines(path) == [{"line": 2}]


def test_an_audit_log_that_cannot_be_opened_is_an_error_at_the_start(tmp_path):
    with pytest.raises(SidelightError, match="Cannot write the audit log"):
        AuditLog(tmp_path / "none" / "audit.jsonl", salt=b"")


# A real device on which every write fails as on a full disk.
FULL = Path("/dev/full")


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("stream", [False, True])
def test_under_a_blocking_policy_nothing_passes_unaudited(stream):
    with served(engine(), audit_log=FULL, policy=BLOCKING) as address, http_client(address) as http:
        refused = http.post(CHAT, json={**BODY, "stream": stream})
        checked = http.post("/v1/moderations", json={"input": "zebra"})
        series = http.get("/metrics").text
    for response in (refused, checked):
        assert (response.status_code, response.json()["error"]["code"]) == (500, "audit_failed")
    assert "sidelight_audit_failures_total 2.0" in series


@pytest.mark.skipif(not FULL.exists(), reason="needs Linux's /dev/full")
def test_text_that_is_held_to_its_end_is_not_sent_unaudited():
    policy = Policy(output={"late": Rule("block", threshold=1.0, hold_back=100)})
    with served(engine(), audit_log=FULL, policy=policy) as address, http_client(address) as http:
        answer = http.post(CHAT, json={**BODY, "stream": True})
    assert "audit_failed" in answer.text
    assert set(re.findall(r'"content":"([^"]*)"', answer.text)) <= {""}


@pytest.mark.skipif(not FULL.exists(), reason="needs Linux's /dev/full")
def test_without_a_blocking_policy_a_failure_is_counted_and_requests_go_on():
    with served(engine(), audit_log=FULL) as address, http_client(address) as http:
        assert http.post(CHAT, json=BODY).status_code == 200
        series = http.get("/metrics").text
    assert "sidelight_audit_failures_total 2.0" in series


def test_a_line_that_was_cut_off_damages_no_other(path, monkeypatch):
    audit, write = AuditLog(path, salt=b"salt"), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:5]))
        for _ in range(2):
            with pytest.raises(RequestError):
                audit.write([{"probe": "torn"}])
    audit.write([{"probe": "a"}, {"probe": "b"}])
    *torn, first, second = path.read_text().splitlines()
    assert [json.loads(first), json.loads(second)] == [{"probe": "a"}, {"probe": "b"}]
    assert torn == ['{"pro', '{"pr']


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [(None, "127.0.0.1"), ("203.0.113.9", "203.0.113.9"), ("zebra", None), ("::1", "::1")],
)
def test_the_address_of_the_client_is_written_if_that_is_wanted(path, forwarded, client):
    """That of a proxy's header if the proxy is trusted, as this machine is; and no words of it."""
    headers = {} if forwarded is None else {"X-Forwarded-For": forwarded}
    for wanted in (True, False):
        with (
            served(engine(), audit_log=path, audit_client=wanted) as address,
            http_client(address) as http,
        ):
            http.post("/v1/moderations", json={"input": "x"}, headers=headers).raise_for_status()
    written = lines(path)
    half = len(written) // 2
    assert [line["client"] for line in written[:half]] == [client] * half
    assert not any("client" in line for line in written[half:])


@pytest.mark.parametrize("as_json", [False, True])
def test_log_lines_of_a_block_have_their_time_and_the_ids_of_the_request_and_its_key(
    capsys, as_json
):
    blocking = Policy(input={"always": Rule("block")})
    with (
        served(engine(), policy=blocking, api_key="sk-secret", json_logs=as_json) as address,
        http_client(address) as http,
    ):
        logging.getLogger("sidelight").setLevel(logging.INFO)
        answer = http.post(CHAT, json=BODY, headers={"Authorization": "Bearer sk-secret"})
    assert answer.json()["error"]["code"] == "content_filter"
    request_id, log = answer.headers["x-request-id"], capsys.readouterr().err
    (line,) = [line for line in log.splitlines() if "blocked the input" in line]
    if as_json:
        found = json.loads(line)
        assert (found["request_id"], found["key_id"]) == (request_id, "api-key-1")
    else:
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 INFO sidelight", line)
        assert line.endswith(f"Probe 'always' blocked the input. [{request_id} api-key-1]")
    assert "sk-secret" not in log
