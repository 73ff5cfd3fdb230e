"""vLLM's own server under a policy that lets nothing pass: each route, with each option."""

import pytest

from stock_requests import parts_of, post, posts, requests_of, served, written_in


@pytest.fixture(scope="module")
def sealed(subjects, tmp_path_factory):
    with served(subjects, tmp_path_factory.mktemp("sealed"), "sealed") as server:
        yield server.address


@pytest.mark.parametrize("streamed", [False, True])
def test_no_route_answers_an_injected_prompt(sealed, subjects, streamed):
    # /v1/systemone writes a prompt of its own around the text.
    tried = posts(sealed) - {"/v1/systemone"}
    for path, body in requests_of(subjects, subjects.injected, streamed=streamed):
        if path not in tried:
            continue
        response = post(sealed, path, body)
        assert response.status_code == 400, (path, body, response.text)
        assert response.json()["error"]["code"] == "content_filter", (path, body, response.text)
        assert response.headers["x-sidelight-flagged"] == "injection"
        assert "probabilities" not in response.headers["x-sidelight-verdicts"]


@pytest.mark.parametrize("streamed", [False, True])
def test_no_route_sends_anything_of_a_text_that_is_cut_at_once(sealed, subjects, streamed):
    for path, body in requests_of(subjects, subjects.benign, streamed=streamed):
        if path not in posts(sealed):
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


def test_every_route_that_takes_a_post_is_known(sealed):
    """A route that a version of vLLM adds has to be looked at."""
    tried = {path for path, _ in requests_of(None, "x", streamed=False)}
    writes_nothing = {
        *("/tokenize", "/detokenize", "/ping", "/v1/messages/count_tokens"),
        *("/scale_elastic_ep", "/is_scaling_elastic_ep", "/inference/v1/abort_requests"),
        "/v1/responses/{response_id}/cancel",
        # By the same reads as /v1/systemone, from vLLM 0.33 on.
        "/v1/decisions",
        *(f"/v1/{kind}/{step}" for kind in ("chat/completions", "completions", "responses",
          "messages") for step in ("render", "derender")),
    }  # fmt: skip
    assert posts(sealed) - tried <= writes_nothing
