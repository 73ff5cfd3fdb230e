"""vLLM's own server under a policy: every route that it has, with each of its options."""

from dataclasses import replace

import httpx
import pytest

from policy_contract import ADMIN, parts_of
from sidelight.artifact import save_probe
from stock_requests import post, posts, requests_of, written_in

pytestmark = pytest.mark.xdist_group("stock")


@pytest.fixture
def sealed(stock, subjects, tmp_path):
    """Every answer is cut before any of it is sent."""

    def reload(path):
        url = f"{stock.address}/admin/probes/leak/reload"
        headers = {"Authorization": f"Bearer {ADMIN}"}
        answer = httpx.post(url, json={"path": str(path)}, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text

    (leak,) = (probe for probe in subjects.probes if probe.name == "leak")
    calibration = replace(leak.calibration, shift=(50.0,))
    reload(save_probe(replace(leak, calibration=calibration), tmp_path / "leak"))
    yield stock.address
    reload(subjects.folders[1])


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
