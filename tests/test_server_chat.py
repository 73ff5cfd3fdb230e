"""Chat completions as the real ``openai`` client sees them."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from live import MODEL, http_client, openai_client, served
from sidelight.engines.queue import Limits
from sidelight.engines.transformers import TransformersEngine
from sidelight.prompts import Reads
from sidelight.server.errors import RequestError, as_request_error
from tiny import three_probes, tiny_backbone, untrained_probe

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 12}
# Batches of other shapes add in another order: float32 rounding over three layers.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def address(backbone):
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    with served(TransformersEngine(backbone, [*three_probes(backbone), late])) as address:
        yield address


@pytest.fixture
def early_client(backbone):
    """Of a server whose probes read the prompt only."""
    with (
        served(TransformersEngine(backbone, three_probes(backbone))) as address,
        openai_client(address) as client,
    ):
        yield client


@pytest.mark.slow
def test_every_lane_carries_every_verdict(client):
    raw = client.chat.completions.with_raw_response.create(**GREEDY)
    answer = raw.parse()
    names = ["toxicity", "intent", "topics", "late"]
    in_field = answer.model_extra["sidelight"]["verdicts"]
    in_header = json.loads(raw.headers["x-sidelight-verdicts"])
    assert [verdict["probe"] for verdict in in_field] == names
    for full, short in zip(in_field, in_header, strict=True):
        assert short["probabilities"] == pytest.approx(full["probabilities"], abs=1e-6)
        assert {k: short[k] for k in ("probe", "label", "flagged")}.items() <= full.items()
    assert [result.model for result in answer.moderation.input.results] == names[:3]
    assert [result.model for result in answer.moderation.output.results] == names[3:]


def test_the_moderation_field_is_typed(client):
    answer = client.chat.completions.create(**GREEDY)
    toxicity, intent, topics = answer.moderation.input.results
    verdicts = {v["probe"]: v for v in answer.model_extra["sidelight"]["verdicts"]}
    # The late probe shares the category, so both are told apart by their probe.
    score = verdicts["toxicity"]["probabilities"]["toxic"]
    assert toxicity.category_scores == {"toxicity/toxic": score}
    assert toxicity.categories == {"toxicity/toxic": toxicity.flagged}
    assert toxicity.category_applied_input_types == {"toxicity/toxic": ["text"]}
    assert intent.category_scores == verdicts["intent"]["probabilities"]
    assert not any(intent.categories.values())
    assert [name for name, holds in topics.categories.items() if holds] == verdicts["topics"][
        "labels"
    ]


def test_a_completion_has_openais_fields(client):
    answer = client.chat.completions.create(**GREEDY)
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


@pytest.mark.slow
def test_a_stream_says_what_the_plain_answer_says(client):
    plain = client.chat.completions.create(**GREEDY)
    stream = client.chat.completions.create(
        **GREEDY, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(d.delta.content or "" for d in deltas) == plain.choices[0].message.content
    assert deltas[0].delta.role == "assistant"
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == plain.choices[0].finish_reason
    assert chunks[-1].usage == plain.usage
    assert chunks[-1].choices == []
    early, late = [chunk for chunk in chunks if chunk.moderation]
    assert early.moderation.input == late.moderation.input
    assert early.moderation.output.code == "pending"
    for side in ("input", "output"):
        assert getattr(late.moderation, side).to_dict() == getattr(plain.moderation, side).to_dict()
    verdicts = plain.model_extra["sidelight"]["verdicts"]
    numbered = [{"index": place, **verdict} for place, verdict in enumerate(verdicts)]
    assert deltas[0].delta.sidelight["verdicts"] == numbered[:3]
    assert deltas[-1].delta.sidelight["verdicts"] == numbered[3:]


def test_a_stream_has_its_verdicts_before_the_first_byte(client):
    with client.chat.completions.with_streaming_response.create(**GREEDY, stream=True) as answer:
        header = json.loads(answer.headers["x-sidelight-verdicts"])
        lines = list(answer.iter_lines())
    assert [verdict["probe"] for verdict in header] == ["toxicity", "intent", "topics"]
    assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"


@pytest.mark.slow
def test_without_probes_of_the_response_the_output_was_not_run(early_client):
    answer = early_client.chat.completions.create(**GREEDY)
    assert answer.moderation.output.code == "not_run"
    assert "toxic" in answer.moderation.input.results[0].categories
    chunks = list(early_client.chat.completions.create(**GREEDY, stream=True))
    (moderated,) = [chunk for chunk in chunks if chunk.moderation]
    assert moderated.moderation.to_dict() == answer.moderation.to_dict()


@pytest.mark.slow
def test_requests_at_once_get_their_own_verdicts(address, client):
    texts = [f"{'word ' * (i % 5)}{i}" for i in range(16)]

    def verdicts(text):
        request = {**GREEDY, "messages": [{"role": "user", "content": text}]}
        answer = client.chat.completions.create(**request)
        verdicts = answer.model_extra["sidelight"]["verdicts"]
        scores = [p for v in verdicts for p in v["probabilities"].values()]
        return answer.choices[0].message.content, scores

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(verdicts, texts))
    for text, (content, scores) in zip(texts, together, strict=True):
        expected_content, expected_scores = verdicts(text)
        assert content == expected_content
        assert scores == pytest.approx(expected_scores, abs=ROUNDING)


@pytest.mark.slow
def test_probes_add_no_forward_pass_to_a_served_completion(backbone):
    def passes(probes):
        shapes: list[tuple[int, ...]] = []

        def note(_module, _args, kwargs):
            shapes.append(tuple(kwargs["input_ids"].shape))

        hook = backbone.model.register_forward_pre_hook(note, with_kwargs=True)
        with (
            served(TransformersEngine(backbone, probes)) as address,
            openai_client(address) as client,
        ):
            answer = client.chat.completions.create(**GREEDY)
        hook.remove()
        return shapes, answer

    with_probes, judged = passes(three_probes(backbone))
    without, plain = passes([])
    assert with_probes == without
    assert with_probes == [(1, judged.usage.prompt_tokens)] + [(1, 1)] * 11
    assert len(judged.model_extra["sidelight"]["verdicts"]) == 3
    assert judged.choices == plain.choices
    assert plain.moderation is None


@pytest.mark.slow
def test_a_seed_gives_the_same_text(client):
    request = {**GREEDY, "temperature": 1.2, "top_p": 0.95, "seed": 11}
    first, again = (client.chat.completions.create(**request) for _ in range(2))
    other = client.chat.completions.create(**{**request, "seed": 12})
    texts = [answer.choices[0].message.content for answer in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.slow
@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_string_ends_the_text(client, as_list):
    whole = client.chat.completions.create(**GREEDY).choices[0].message.content
    stop = whole[3:5]
    answer = client.chat.completions.create(**GREEDY, stop=[stop] if as_list else stop)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_content_may_come_in_text_parts(client):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    in_parts = {**GREEDY, "messages": [{"role": "user", "content": parts}]}
    whole = {**GREEDY, "messages": [{"role": "user", "content": "one\ntwo"}]}
    first, second = (client.chat.completions.create(**r) for r in (in_parts, whole))
    assert first.choices == second.choices
    assert first.usage == second.usage


def test_a_developer_turn_is_read_as_a_system_turn(client):
    answers = [
        client.chat.completions.create(
            **{**GREEDY, "messages": [{"role": r, "content": "x"}, *HELLO]}
        )
        for r in ("developer", "system")
    ]
    assert answers[0].usage == answers[1].usage
    assert answers[0].choices == answers[1].choices


def test_the_newer_name_of_the_limit_counts(client):
    answer = client.chat.completions.create(**GREEDY, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3


def test_only_named_probes_are_reported(client):
    answer = client.chat.completions.create(**GREEDY, extra_body={"probes": ["intent"]})
    assert [v["probe"] for v in answer.model_extra["sidelight"]["verdicts"]] == ["intent"]
    assert len(answer.moderation.input.results) == 1
    assert answer.moderation.output.code == "not_run"


@pytest.mark.slow
def test_a_failed_verdict_is_an_error_in_every_lane(backbone):
    broken = untrained_probe(backbone, "broken")
    broken.mechanism.bias.fill_(float("nan"))
    probes = [broken, untrained_probe(backbone, "sound")]
    with (
        served(TransformersEngine(backbone, probes)) as address,
        openai_client(address) as client,
    ):
        raw = client.chat.completions.with_raw_response.create(**GREEDY)
        answer = raw.parse()
        assert answer.moderation.input.code == "verdict_failed"
        assert "broken" in answer.moderation.input.message
        in_field = answer.model_extra["sidelight"]["verdicts"]
        assert [v.get("error") for v in in_field] == [None, "verdict_failed"]
        assert json.loads(raw.headers["x-sidelight-verdicts"])[1] == {
            "probe": "broken",
            "error": "verdict_failed",
        }
        with http_client(address) as http:
            moderation = http.post("/v1/moderations", json={"input": "x"})
            failed = 'sidelight_verdicts_total{outcome="failed",probe="broken"} 2.0'
            assert failed in http.get("/metrics").text
    assert moderation.status_code == 500
    assert moderation.json()["error"]["code"] == "verdict_failed"


def test_a_failure_midway_ends_the_stream_with_an_error(backbone):
    def fail_third(_module, _args, _kwargs):
        passes.append(1)
        if len(passes) == 3:
            raise RuntimeError("a secret")

    passes: list[int] = []
    hook = backbone.model.register_forward_pre_hook(fail_third, with_kwargs=True)
    with served(TransformersEngine(backbone, [])) as address, http_client(address) as http:
        text = http.post("/v1/chat/completions", json={**GREEDY, "stream": True}).text
    hook.remove()
    last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "generation_failed"
    assert "secret" not in text
    assert "[DONE]" not in text


def test_an_error_during_a_stream_keeps_its_code():
    error = RequestError("no", status=503, code="audit_failed", param="x")
    assert as_request_error(error).body == error.body


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(backbone, stream):
    engine = TransformersEngine(backbone, [], limits=Limits(running=1))
    passes: list[int] = []
    hook = backbone.model.register_forward_pre_hook(lambda *_: passes.append(1))
    with served(engine) as address, http_client(address) as http:
        body = {**GREEDY, "max_tokens": 200, "stream": stream}
        leave_early(address, body, until=lambda: len(passes) >= 2)
        # The only place is free again well before the first text would have been complete.
        http.post("/v1/chat/completions", json=GREEDY).raise_for_status()
    hook.remove()
    assert len(passes) < 150


def leave_early(address, body, until):
    """Asks, and closes the connection before the answer is complete."""
    host, port = address.removeprefix("http://").split(":")
    payload = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + payload)
        while not until():
            time.sleep(0.001)
