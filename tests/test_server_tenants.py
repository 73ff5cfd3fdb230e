"""Of several clients with keys of their own, none can keep the others waiting."""

import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from live import MODEL, http_client, openai_client, served
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.policy.rules import Policy, Rule
from sidelight.server.keys import Quota, read_keys
from tiny import three_probes, tiny_backbone

CHAT = "/v1/chat/completions"
PATIENCE_S = 60.0
# A policy that blocks what is not judged in time.
BLOCKING = Policy(input={"toxicity": Rule("block", threshold=1.0)}, timeout_s=10.0)


def chat(text, max_tokens=16):
    message = {"role": "user", "content": text}
    return {"model": MODEL, "messages": [message], "max_tokens": max_tokens, "temperature": 0}


def key(number):
    return {"Authorization": f"Bearer key-{number}"}


def engine():
    backbone = tiny_backbone()
    return TransformersEngine(backbone, three_probes(backbone))


def ask(http, number, **options):
    return http.post(CHAT, json=chat("hi", **options), headers=key(number), timeout=PATIENCE_S)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys"


def test_a_key_has_so_many_requests_a_minute_and_its_answers_tell_how_many(path):
    path.write_text("one key-1 requests_per_minute=2\ntwo key-2\n")
    with served(engine(), api_keys_file=path) as address, http_client(address) as http:
        answers = [ask(http, 1) for _ in range(4)]
        free = [ask(http, 2) for _ in range(4)]
        with openai_client(address, "key-1") as client, pytest.raises(openai.RateLimitError):
            client.models.list()
        assert http.get("/ready", headers=key(1)).status_code == 200
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    assert {answer.status_code for answer in free} == {200}
    assert not any(name.startswith("x-ratelimit") for name in free[0].headers)
    told = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert told == ["1", "0", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
    assert 0 < float(answers[2].headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    error = answers[2].json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert "2 requests per minute" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_tokens_of_a_request_count_once_it_is_over(path, stream):
    path.write_text("one key-1 tokens_per_minute=30\n")
    with served(engine(), api_keys_file=path) as address, http_client(address) as http:
        body = {**chat("hi", max_tokens=40), "stream": stream}
        first = http.post(CHAT, json=body, headers=key(1))
        second = ask(http, 1)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-remaining-tokens"] == "30"
    # Over 40 of 30 are gone, and one comes back every other second.
    assert second.status_code == 429
    assert int(second.headers["retry-after"]) > 10
    assert second.headers["x-ratelimit-remaining-tokens"] == "0"


@pytest.mark.slow
def test_a_key_has_so_many_requests_at_a_time(path):
    path.write_text("one key-1 concurrent=1\ntwo key-2\n")
    one = paced_engine()
    with (
        served(one, api_keys_file=path) as address,
        http_client(address) as http,
        ThreadPoolExecutor(1) as pool,
    ):
        running = pool.submit(ask, http, 1, max_tokens=100)
        while not one.load.running:
            time.sleep(0.01)
        assert ask(http, 1).status_code == 429
        assert ask(http, 2, max_tokens=1).status_code == 200
        assert running.result().status_code == 200
        assert ask(http, 1, max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "words", ["rpm=2", "concurrent", "concurrent=0", "concurrent=x", "concurrent=1 concurrent=2"]
)
def test_a_wrong_quota_is_refused_with_its_line(path, words):
    path.write_text(f"one secret-key {words}\n")
    with pytest.raises(SidelightError, match=r"Line 1 .* tokens_per_minute=N") as raised:
        read_keys(path)
    assert "secret-key" not in str(raised.value)


def test_a_quota_stands_behind_its_key(path):
    path.write_text("one a concurrent=4 requests_per_minute=60\ntwo b\n")
    quotas = [one.quota for one in read_keys(path)]
    assert quotas == [Quota(requests_per_minute=60, concurrent=4), Quota()]


def until(http, number, status):
    """Asks until the answer has this status."""
    end = time.monotonic() + PATIENCE_S
    while (got := http.get("/version", headers=key(number)).status_code) != status:
        assert time.monotonic() < end, got
        time.sleep(0.1)


@pytest.mark.slow
def test_keys_change_while_serving_and_a_broken_file_changes_nothing(path, capsys):
    path.write_text("one key-1\ntwo key-2\n")
    with served(engine(), api_keys_file=path) as address, http_client(address) as http:
        until(http, 1, 200)
        path.write_text("one key-1\nthree key-3\n")
        until(http, 3, 200)
        assert http.get("/version", headers=key(2)).status_code == 401
        path.write_text("three\n")
        end = time.monotonic() + PATIENCE_S
        said = ""
        while "The keys stay as they were" not in said:
            said += capsys.readouterr().err
            assert time.monotonic() < end
            assert http.get("/version", headers=key(3)).status_code == 200
            time.sleep(0.1)
        path.unlink()
        time.sleep(3)
        assert http.get("/version", headers=key(3)).status_code == 200
        assert http.get("/version", headers=key(2)).status_code == 401
        path.write_text("three key-3 requests_per_minute=1\n")
        until(http, 3, 429)
    assert "key-3" not in said + capsys.readouterr().err
