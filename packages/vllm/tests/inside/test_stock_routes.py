"""vLLM's own server under a policy: every route that it has, with each of its options."""

from dataclasses import replace

import pytest

from policy_contract import STREAMED, chunks_of, refusal
from sidelight.probes.artifact import save_probe
from worlds.stock import post, posts, replace_probe, requests_of, written_in

pytestmark = pytest.mark.xdist_group("stock")


@pytest.fixture
def sealed(stock, subjects, tmp_path):
    """Every answer is cut before any of it is sent."""
    leak = subjects.by_name["leak"]
    leak = leak.changed(calibration=replace(leak.calibration, shift=(50.0,)))
    for path in (save_probe(leak, tmp_path / "leak"), subjects.folder_of["leak"]):
        answer = replace_probe(stock.address, "leak", str(path))
        assert answer.status_code == 200, answer.text
        if path != subjects.folder_of["leak"]:
            yield stock.address


def answers(address, subjects, text, *, streamed):
    """What each way to have a text written is answered with."""
    known = posts(address)
    for path, body in requests_of(subjects, text, streamed=streamed):
        if path in known:
            yield path, body, post(address, path, body)


@STREAMED
def test_no_route_answers_an_injected_prompt(stock, subjects, streamed):
    for path, body, response in answers(
        stock.address, subjects, subjects.injected, streamed=streamed
    ):
        # /v1/systemone writes a prompt of its own around the text.
        if path != "/v1/systemone":
            assert refusal(response) == (400, "content_filter"), (path, body)
            assert "injection" in response.headers["x-sidelight-flagged"]


@STREAMED
def test_no_route_sends_any_of_an_immediately_cut_response(sealed, subjects, streamed):
    for path, body, response in answers(sealed, subjects, subjects.benign, streamed=streamed):
        chunks = chunks_of(response)
        if body.get("echo"):
            assert response.status_code == 200
        else:
            found = [each for chunk in chunks for each in written_in(chunk)]
            assert response.status_code >= 400 or not found, (path, body, found, response.text)
        if response.status_code == 200 and path in ("/v1/chat/completions", "/v1/completions"):
            reasons = {
                choice["index"]: choice["finish_reason"]
                for chunk in chunks
                for choice in chunk.get("choices", ())
            }
            texts = body.get("n", 1) * (2 if isinstance(body.get("prompt"), list) else 1)
            assert reasons.keys() == {*range(texts)}, (body, response.text)
            # An empty answer has nothing to cut.
            assert set(reasons.values()) <= {"content_filter", "stop"}, (body, response.text)
