"""Policies in vLLM's own server: what is cut, refused, told, counted and judged."""

import json
import time

import httpx
import numpy as np
import openai
import psutil
import pytest

from live import openai_client
from stock_requests import (
    ADMIN,
    GREEDY,
    LEAK,
    TOKENS,
    chat,
    completion,
    cut_at,
    parts_of,
    post,
    served,
    token_ids,
)


@pytest.fixture(scope="module")
def open_server(subjects, tmp_path_factory):
    with served(subjects, tmp_path_factory.mktemp("open"), "open") as server:
        yield server


@pytest.fixture
def address(open_server):
    return open_server.address


def one_of(subjects, holds):
    return next(text for text in subjects.quiet if holds(*cut_at(subjects, text)))


@pytest.fixture(scope="module")
def leaking(subjects):
    """A text whose answer is cut midway, after some of it is sent."""
    return one_of(subjects, lambda ids, cut: cut is not None and cut > 4)


@pytest.fixture(scope="module")
def passing(subjects):
    """One whose answer passes, although a single token of it is over the threshold."""

    def holds(ids, cut):
        return cut is None and len(ids) == TOKENS

    texts = [text for text in subjects.quiet if holds(*cut_at(subjects, text))]
    return next(t for t in texts if (subjects.written(t)[1][3:-1] >= LEAK).any())


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_is_cut_where_a_probe_flags_it_and_others_pass(
    address, subjects, leaking, passing, streamed
):
    for text in (leaking, passing):
        ids, cut = cut_at(subjects, text)
        # Two tokens are held back from those that are judged before the cut.
        wanted = [ids, "length"] if cut is None else [ids[: cut - 3], "content_filter"]
        same = list(subjects.chat(text).token_ids)
        sampling = {"temperature": 0, "max_tokens": TOKENS}
        for path, body in (
            chat(text),
            completion(same, add_special_tokens=False),
            chat(text, logprobs=True, top_logprobs=2),
            ("/inference/v1/generate", {"token_ids": same, "sampling_params": sampling}),
        ):
            response = post(address, path, {**GREEDY, "stream": streamed, **body})
            found = token_ids(response)
            if streamed and path == "/inference/v1/generate":
                # vLLM 0.29 leaves out the end of a stream that has no token.
                found[1] = found[1] or wanted[1]
            assert found == wanted, (path, response.text)
            if body.get("logprobs"):
                chosen = [choice for part in parts_of(response) for choice in part["choices"]]
                counted = [
                    own for c in chosen for own in (c.get("logprobs") or {}).get("content", ())
                ]
                assert len(counted) == len(wanted[0])
        body = {"model": "tiny", "temperature": 0, "max_output_tokens": TOKENS, "input": text}
        answer = post(address, "/v1/responses", {**body, "stream": streamed})
        end = parts_of(answer)[-1]
        whole = end["response"] if streamed else end
        said = "".join(part["text"] for item in whole["output"] for part in item["content"])
        assert subjects.backbone.tokenizer.decode(ids).startswith(said.rstrip("\ufffd"))
        assert bool(said)
        why = "max_output_tokens" if cut is None else "content_filter"
        assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": why})


def test_the_last_token_is_judged_however_the_text_ends(address, subjects, passing):
    ids, scores = subjects.written(passing)
    over = int(np.flatnonzero(scores[3:] >= LEAK)[0]) + 4
    for options in ({"max_tokens": over}, {"stop_token_ids": [ids[over - 1]]}):
        body = {**GREEDY, **chat(passing)[1], **options}
        if "stop_token_ids" in options and ids.index(ids[over - 1]) != over - 1:
            continue
        found, reason = token_ids(post(address, "/v1/chat/completions", body))
        assert reason == "content_filter"
        assert found == ids[: len(found)]
        assert len(found) <= over - 2
    # One token less is harmless.
    body = {**GREEDY, **chat(passing)[1], "max_tokens": over - 1}
    assert token_ids(post(address, "/v1/chat/completions", body)) == [ids[: over - 1], "length"]


def test_each_text_of_several_is_judged_by_itself(address, subjects, leaking, passing):
    ids = [cut_at(subjects, text) for text in (passing, leaking)]
    prompts = [list(subjects.chat(text).token_ids) for text in (passing, leaking)]
    body = {**GREEDY, "prompt": prompts, "add_special_tokens": False}
    choices = post(address, "/v1/completions", body).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length", "content_filter"]
    assert choices[0]["token_ids"] == ids[0][0]
    assert choices[1]["token_ids"] == ids[1][0][: ids[1][1] - 3]
    # Clients may give two requests the same name.
    with openai_client(address) as client:
        named = {"extra_headers": {"X-Request-Id": "same"}, "extra_body": {"request_id": "same"}}
        streams = [
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": text}], stream=True,
                max_tokens=TOKENS, temperature=0, **named,
            )
            for text in (passing, leaking)
        ]  # fmt: skip
        reasons = [[c.choices[0].finish_reason for c in s if c.choices][-1] for s in streams]
    assert reasons == ["length", "content_filter"]


def test_blocked_prompts_cost_at_most_the_token_in_flight(address, subjects):
    def written():
        lines = httpx.get(f"{address}/metrics").text.splitlines()
        (line,) = [line for line in lines if line.startswith("vllm:generation_tokens_total")]
        return float(line.rsplit(" ", 1)[1])

    before = written()
    for number in range(10):
        path, body = chat(subjects.injected, stream=number % 2 == 1)
        assert post(address, path, {"model": "tiny", "max_tokens": 500, **body}).status_code == 400
    assert written() - before <= 2 * 10


def test_what_is_written_in_the_background_is_judged_too(address, subjects, leaking):
    body = {"model": "tiny", "background": True, "store": True, "temperature": 0}
    body |= {"max_output_tokens": TOKENS}
    refused = post(address, "/v1/responses", {**body, "input": subjects.injected})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "content_filter")
    queued = post(address, "/v1/responses", {**body, "input": leaking}).json()
    for _ in range(100):
        found = httpx.get(f"{address}/v1/responses/{queued['id']}").json()
        if found["status"] != "queued":
            break
        time.sleep(0.1)
    assert found["incomplete_details"] == {"reason": "content_filter"}


def test_what_a_client_writes_where_no_probe_reads_is_refused(address, subjects):
    turns = chat(subjects.benign)[1]["messages"]
    system = [{"role": "system", "content": "Obey."}, *turns]
    begun = [*turns, {"role": "assistant", "content": "Sure, "}]
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    for body, code in (
        ({"messages": system}, "system_turn_refused"),
        ({"messages": begun, **continued}, "answer_continued"),
    ):
        for streamed in (False, True):
            body = {"model": "tiny", "stream": streamed, **body}
            response = post(address, "/v1/chat/completions", body)
            assert (response.status_code, response.json()["error"]["code"]) == (400, code)
    beams = {"model": "tiny", "messages": turns, "use_beam_search": True, "n": 2}
    response = post(address, "/v1/chat/completions", beams)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "not_judged")


def test_answers_tell_labels_and_an_admin_the_scores(address, subjects, passing):
    with openai_client(address) as client, openai_client(address, ADMIN) as admin:
        for asking, sees in ((client, False), (admin, True)):
            raw = asking.chat.completions.with_raw_response.create(
                model="tiny", messages=[{"role": "user", "content": passing}], max_tokens=3
            )
            answer = raw.parse()
            verdicts = answer.model_extra["sidelight"]["verdicts"]
            assert [verdict["probe"] for verdict in verdicts] == ["injection", "leak"]
            assert all(("probabilities" in verdict) == sees for verdict in verdicts)
            assert ("probabilities" in raw.headers["x-sidelight-verdicts"]) == sees
            assert answer.moderation.input.results[0].flagged is False
            chunks = list(
                asking.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": passing}],
                    max_tokens=3, stream=True,
                )
            )  # fmt: skip
            said = [c.model_extra["sidelight"] for c in chunks if "sidelight" in c.model_extra]
            assert [v["probe"] for v in said[-1]["verdicts"]] == ["injection", "leak"]
            assert ("probabilities" in json.dumps(said)) == sees
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="tiny", prompt=subjects.injected, max_tokens=3)
    assert refused.value.code == "content_filter"
    body = post(address, "/v1/completions", {**GREEDY, **completion(subjects.benign)[1]}).json()
    assert "probabilities" not in json.dumps(body)
    assert body["moderation"]["input"]["results"][0]["flagged"] is False


def test_a_request_cannot_ask_for_less(address, subjects):
    loose = {"moderation": {"model": "probes", "policy": {"output": {"mode": "score"}}}}
    body = {"model": "tiny", **chat(subjects.benign)[1], **loose}
    answer = post(address, "/v1/chat/completions", body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_parameter")


def test_texts_are_judged_at_the_routes_of_our_own_server(address, subjects):
    with openai_client(address, ADMIN) as client:
        found = client.moderations.create(input=[subjects.injected, subjects.benign])
    score = subjects.scores([subjects.chat(subjects.injected)], 0)[0]
    first, second = (each.model_extra["sidelight"]["verdicts"] for each in found.results)
    assert first[0]["probabilities"]["toxic"] == pytest.approx(score, abs=1e-4)
    assert [first[0]["flagged"], second[0]["flagged"]] == [True, False]
    key = {"headers": {"Authorization": f"Bearer {ADMIN}"}, "timeout": 60}
    classified = httpx.post(
        f"{address}/classify", json={"model": "injection", "input": subjects.injected}, **key
    ).json()
    assert classified["data"][0]["label"] == "toxic"
    body = {"input_type": "response", "texts": ["Here is the secret."]}
    guarded = httpx.post(f"{address}/beta/litellm_basic_guardrail_api", json=body, **key).json()
    assert [verdict["probe"] for verdict in guarded["sidelight"]["verdicts"]] == ["leak"]
    if "/v1/decisions" in httpx.get(f"{address}/openapi.json").json()["paths"]:
        # It is vLLM's own, from 0.33 on.
        return
    question = {"type": "predicate", "name": "injection", "instructions": "Is it an attack?"}
    body = {"model": "tiny", "input": subjects.injected, "questions": [question]}
    decided = httpx.post(f"{address}/v1/decisions", json=body, **key).json()
    assert decided["answers"][0]["probability"] == pytest.approx(score, abs=1e-4)


def test_decisions_are_counted_and_audited(address, open_server, subjects):
    audit = open_server.log.parent / "audit.jsonl"
    before = len(audit.read_text().splitlines()) if audit.exists() else 0
    body = {"model": "tiny", **chat(subjects.injected)[1]}
    response = post(address, "/v1/messages", body)
    lines = [json.loads(line) for line in audit.read_text().splitlines()][before:]
    assert [(line["probe"], line["action"]) for line in lines] == [("injection", "block")]
    assert lines[0]["request_id"] == response.headers["x-request-id"]
    metrics = httpx.get(f"{address}/metrics").text
    assert 'sidelight_actions_total{action="block",probe="injection",side="input"}' in metrics
    # What the policy withholds from answers cannot be read there.
    assert "sidelight_probe_score_bucket" not in metrics


def test_a_killed_worker_ends_answers_and_passes_nothing(open_server, subjects):
    """Must be the last one: the server ends."""
    harmless = min(subjects.quiet, key=lambda text: subjects.written(text)[1][1:].max())
    body = {**GREEDY, **chat(harmless)[1], "max_tokens": 900, "ignore_eos": True, "stream": True}
    address, sent = open_server.address, b""
    try:
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
            for chunk in response.iter_bytes():
                if not sent:
                    for child in psutil.Process(open_server.process.pid).children(recursive=True):
                        child.kill()
                sent += chunk
    except httpx.HTTPError:
        pass
    assert b'"finish_reason":"length"' not in sent
    try:
        later = post(address, "/v1/chat/completions", {**GREEDY, **chat(harmless)[1]})
    except httpx.HTTPError:
        return
    assert later.status_code >= 500
