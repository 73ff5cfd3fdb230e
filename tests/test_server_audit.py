"""The audit log: every decision once, no text, and what happens when it cannot be written."""

import json
import logging
import os
import re
import resource
import signal
from contextlib import closing
from pathlib import Path

import pytest

import wordings
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.models.conversation import Reads
from sidelight.policy.rules import Policy, Rule
from sidelight.server.config import read_config
from sidelight.server.errors import RequestError
from sidelight.server.observe import AuditLog
from worlds.models import untrained_probe
from worlds.servers import MODEL, faults, http_client, in_process, served

CHAT = "/v1/chat/completions"
TURNS = [{"role": "user", "content": "zebra"}]
BODY = {"model": MODEL, "messages": TURNS, "max_tokens": 3, "temperature": 0}
BLOCKING = Policy(input={"never": Rule("block")})
STREAMED = Policy(output={"late": Rule("block", threshold=1.0)})
KEY = {"Authorization": "Bearer sk-secret"}


@pytest.fixture
def engine(tiny):
    probes = [
        untrained_probe(tiny, "never", threshold=1.0),
        untrained_probe(tiny, "always", threshold=0.0),
        untrained_probe(tiny, "late", reads=Reads("response")),
    ]
    return TransformersEngine(tiny, probes)


def fail():
    raise RuntimeError("out of memory")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def test_audit_log_records_every_decision_once_without_text(engine, path):
    with in_process(engine, audit_log=path, api_key="sk-secret") as http:
        answer = http.post(CHAT, json=BODY, headers=KEY)
        http.post("/v1/moderations", json={"input": "zebra"}, headers=KEY).raise_for_status()
    written = lines(path)
    assert [line["probe"] for line in written] == ["never", "always", "late", "never", "always"]
    assert [line["side"] for line in written[:3]] == ["input", "input", "output"]
    assert [line["outcome"] for line in written[:2]] == ["passed", "flagged"]
    assert {line["key_id"] for line in written} == {"api-key-1"}
    assert {line["request_id"] for line in written[:3]} == {answer.headers["x-request-id"]}
    verdicts = {v["probe"]: v for v in answer.json()["sidelight"]["verdicts"]}
    for line in written[:3]:
        assert line["scores"] == verdicts[line["probe"]]["probabilities"]
        assert line["turn"] == verdicts[line["probe"]].get("turn")
    assert [line["thresholds"] for line in written[:3]] == [{"toxic": t} for t in (1.0, 0.0, 0.5)]
    # The same text has the same hash, wherever it came in.
    assert len({line["text_hmac"] for line in written}) == 1
    assert "zebra" not in path.read_text()
    assert "secret" not in path.read_text()
    # Addresses of clients are written only if that is wanted.
    assert not any("client" in line for line in written)
    assert path.stat().st_mode & 0o777 == 0o600


def test_check_under_blocking_rule_is_audited_as_flag(engine, path):
    policy = Policy(input={"always": Rule("block")})
    with in_process(engine, audit_log=path, policy=policy) as http:
        http.post("/v1/moderations", json={"input": "zebra"}).raise_for_status()
    assert [(line["probe"], line["action"]) for line in lines(path)] == [
        ("never", "none"),
        ("always", "flag"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Policy(), STREAMED])
def test_interrupted_stream_is_audited_and_counted_as_unfinished(tiny, engine, path, policy):
    """Whether its client leaves, or the engine fails."""
    response_probe = untrained_probe(tiny, "late", reads=Reads("response"))
    body = {**BODY, "stream": True, "max_tokens": 100}
    settings = {"audit_log": path, "policy": policy, "admin_key": "admin"}
    with served(engine, **settings) as address, http_client(address) as http:
        with http.stream("POST", CHAT, json=body) as answer:
            for line in answer.iter_lines():
                if '"content":"' in line and '"content":""' not in line:
                    break
        while len(lines(path)) < 3:
            # The test's own limit ends a wait in vain.
            http.get("/health")
        # Scores of a probe that blocks are in the metrics of an admin alone.
        series = http.get("/metrics", headers={"Authorization": "Bearer admin"}).text
    assert 'sidelight_verdicts_total{outcome="unfinished",probe="late"} 1.0' in series
    assert 'sidelight_probe_score_count{label="toxic",probe="late"}' not in series
    (written,) = re.findall(r"^sidelight_completion_tokens_total (.+)$", series, re.MULTILINE)
    assert 0 < float(written) < 100
    with (
        faults(tiny, {5: fail}),
        in_process(TransformersEngine(tiny, [response_probe]), **settings) as http,
    ):
        assert "generation_failed" in http.post(CHAT, json=body).text
    for audited in (lines(path)[2], lines(path)[3]):
        told = audited["probe"], audited["side"], audited["outcome"], audited["action"]
        assert told == ("late", "output", "unfinished", "none")
        # Without a rule that may cut the text, its probes are judged at its end only.
        assert (audited["scores"] is None) == (policy == Policy())


@pytest.mark.parametrize("are_scores_told", [False, True])
def test_unsent_text_is_audited_only_if_scores_were_sent(tiny, path, are_scores_told):
    """All of it is held back by the warm-up when the engine fails."""
    response_probe = untrained_probe(tiny, "late", reads=Reads("response"))
    rule = Rule("block", threshold=1.0, warm_up=100, disclose="scores")
    settings = {"audit_log": path, "policy": Policy(output={"late": rule})}
    body = {**BODY, "stream": True, "stream_options": {"include_scores": are_scores_told}}
    with (
        faults(tiny, {5: fail}),
        in_process(TransformersEngine(tiny, [response_probe]), **settings) as http,
    ):
        answer = http.post(CHAT, json={**body, "max_tokens": 20})
        assert "generation_failed" in answer.text
        series = http.get("/metrics").text
    assert [line["outcome"] for line in lines(path)] == ["unfinished"] * are_scores_told
    # The fourth token was drawn, but gave no text and was not read.
    assert "sidelight_completion_tokens_total 3.0" in series


def test_audit_salt_prefers_option_over_variable_and_rejects_blank(path, monkeypatch):
    def salt_of(**options):
        return read_config(audit_log=path, **options).salt

    assert salt_of() != salt_of()
    monkeypatch.setenv("SIDELIGHT_AUDIT_SALT", "salt")
    assert salt_of(audit_salt="1") == b"1"
    assert salt_of() == b"salt"
    logs = [AuditLog(path, salt=salt) for salt in (b"1", b"2")]
    assert len({log.hash([]) for log in logs}) == 2
    for log in logs:
        log.close()
    with pytest.raises(
        SidelightError, match=wordings.SETTING_IS.format(name="--audit-salt", value="blank")
    ):
        salt_of(audit_salt=" ")


def test_audit_log_reopens_after_rotation(path):
    with closing(AuditLog(path, salt=b"")) as audit:
        audit.write([{"line": 1}])
        os.rename(path, path.with_suffix(".1"))
        audit.write([{"line": 2}])
    assert lines(path.with_suffix(".1")) == [{"line": 1}]
    assert lines(path) == [{"line": 2}]
    with pytest.raises(SidelightError, match=wordings.CANNOT_WRITE.format(what="audit")):
        AuditLog(path.parent / "none" / "audit.jsonl", salt=b"")


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs limits of files")
def test_partial_audit_line_is_completed_by_next_write(path):
    """As on a full disk: the rest of it follows once there is room."""
    audit = AuditLog(path, salt=b"salt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
        for _ in range(2):
            with pytest.raises(RequestError):
                audit.write([{"probe": "torn"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    audit.write([{"probe": "a"}, {"probe": "b"}])
    audit.close()
    assert [line["probe"] for line in lines(path)] == ["torn", "torn", "a", "b"]


# A real device on which every write fails as on a full disk.
FULL = Path("/dev/full")
HOLDING = Policy(output={"late": Rule("block", threshold=1.0, hold_back=100)})


@pytest.mark.skipif(not FULL.exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("policy", [BLOCKING, HOLDING, None])
def test_audit_failure_blocks_requests_only_under_blocking_rules(engine, policy):
    with in_process(engine, audit_log=FULL, policy=policy, admin_key="admin") as http:
        plain, streamed = (http.post(CHAT, json={**BODY, "stream": s}) for s in (False, True))
        checked = http.post("/v1/moderations", json={"input": "zebra"})
        series = http.get("/metrics", headers={"Authorization": "Bearer admin"}).text
    if policy is BLOCKING:
        for answer in (plain, streamed, checked):
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "audit_failed")
    elif policy is HOLDING:
        # Text that is held to its end is not sent either.
        assert "audit_failed" in streamed.text
        assert set(re.findall(r'"content":"([^"]*)"', streamed.text)) <= {""}
    else:
        assert [plain.status_code, streamed.status_code, checked.status_code] == [200] * 3
    (count,) = re.findall(r"^sidelight_audit_failures_total (.+)$", series, re.MULTILINE)
    assert float(count) >= 3


@pytest.mark.parametrize("as_json", [False, True])
def test_block_log_lines_include_time_request_id_and_key_id(engine, capsys, as_json):
    policy = Policy(input={"always": Rule("block")})
    options = {"policy": policy, "api_key": "sk-secret", "json_logs": as_json}
    with served(engine, **options) as address, http_client(address) as http:
        logging.getLogger("sidelight").setLevel(logging.INFO)
        answer = http.post(CHAT, json=BODY, headers=KEY)
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
