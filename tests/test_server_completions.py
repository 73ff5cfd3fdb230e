"""Text completions, and several texts of one request."""

import json

import pytest

from live import MODEL, http_client, served
from sidelight.engines import TransformersEngine
from sidelight.prompts import Reads
from tiny import three_probes, tiny_backbone, untrained_probe

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
TEXT = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
PROMPT_PROBES = ["toxicity", "intent", "topics"]


@pytest.fixture(scope="module")
def address():
    backbone = tiny_backbone()
    late = untrained_probe(backbone, "refusal", reads=Reads("response"))
    with served(TransformersEngine(backbone, [*three_probes(backbone), late])) as address:
        yield address


def names(verdicts):
    return [verdict["probe"] for verdict in verdicts]


def test_a_text_is_gone_on_with_without_a_chat_template(client, http):
    answer = client.completions.create(**TEXT)
    tokens = http.post("/tokenize", json={"prompt": TEXT["prompt"]}).json()["count"]
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (tokens, 8)
    assert names(answer.model_extra["sidelight"]["verdicts"]) == [*PROMPT_PROBES, "refusal"]
    assert answer.model_extra["moderation"]["input"]["type"] == "moderation_results"


def test_a_streamed_text_says_what_the_plain_one_says(client):
    plain = client.completions.create(**TEXT)
    chunks = list(
        client.completions.create(**TEXT, stream=True, stream_options={"include_usage": True})
    )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.text for choice in choices) == plain.choices[0].text
    assert choices[-1].finish_reason == plain.choices[0].finish_reason
    assert names(choices[0].model_extra["sidelight"]["verdicts"]) == PROMPT_PROBES
    assert names(choices[-1].model_extra["sidelight"]["verdicts"]) == ["refusal"]
    assert chunks[-1].usage == plain.usage
    assert [chunk.moderation for chunk in chunks if "moderation" in (chunk.model_extra or {})]


def test_the_verdicts_stand_in_the_header_too(client):
    raw = client.completions.with_raw_response.create(**TEXT)
    header = json.loads(raw.headers["x-sidelight-verdicts"])
    assert names(header) == [*PROMPT_PROBES, "refusal"]


def test_several_prompts_are_written_in_their_order(client):
    prompts = ["one", "two, which is longer", "three"]
    together = client.completions.create(**{**TEXT, "prompt": prompts})
    alone = [client.completions.create(**{**TEXT, "prompt": prompt}) for prompt in prompts]
    assert [c.index for c in together.choices] == [0, 1, 2]
    assert [c.text for c in together.choices] == [a.choices[0].text for a in alone]
    assert together.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone)


def test_many_texts_of_many_prompts_fit_into_the_line(client):
    prompts = [f"Once upon a time {i}" for i in range(16)]
    answer = client.completions.create(**{**TEXT, "prompt": prompts, "max_tokens": 1}, n=16)
    assert [choice.index for choice in answer.choices] == list(range(256))


def test_without_a_limit_sixteen_tokens_are_written(client):
    unbounded = {key: value for key, value in TEXT.items() if key != "max_tokens"}
    assert client.completions.create(**unbounded).usage.completion_tokens <= 16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", []),
        ("prompt", [1, 2]),
        ("prompt", None),
        ("echo", True),
        ("best_of", 2),
        ("suffix", "x"),
        ("n", 17),
    ],
)
def test_what_is_not_offered_is_a_400_that_names_the_field(http, field, value):
    refused = http.post("/v1/completions", json={**TEXT, field: value})
    assert refused.status_code == 400
    assert field in refused.json()["error"]["message"]


def test_an_empty_prompt_is_a_400(http):
    refused = http.post("/v1/completions", json={**TEXT, "prompt": ""})
    assert refused.status_code == 400


def test_several_texts_of_one_prompt_differ_and_repeat_with_their_seed(client):
    request = {**CHAT, "n": 3, "seed": 5, "temperature": 1.5}
    first, again = (client.chat.completions.create(**request) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    one = client.chat.completions.create(**{**request, "n": 1})
    assert one.choices[0].message.content == texts[0]
    assert first.usage.prompt_tokens == one.usage.prompt_tokens
    assert first.usage.completion_tokens > one.usage.completion_tokens
    assert names(first.model_extra["sidelight"]["verdicts"]) == [*PROMPT_PROBES, *["refusal"] * 3]


def test_several_streamed_texts_say_what_the_plain_ones_say(client):
    request = {**CHAT, "n": 3, "seed": 5, "temperature": 1.5}
    plain = client.chat.completions.create(**request)
    texts, ends = {}, {}
    chunks = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    )
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                ends[choice.index] = names(choice.delta.sidelight["verdicts"])
    assert texts == {choice.index: choice.message.content for choice in plain.choices}
    assert ends == {index: ["refusal"] for index in range(3)}
    assert chunks[-1].usage == plain.usage


def test_the_judgement_of_a_prompt_counts_once_however_many_texts_follow():
    backbone = tiny_backbone()
    probes = [
        untrained_probe(backbone, "early", threshold=0.0),
        untrained_probe(backbone, "late", reads=Reads("response"), threshold=0.0),
    ]
    with served(TransformersEngine(backbone, probes)) as address, http_client(address) as http:
        http.post("/v1/chat/completions", json={**CHAT, "n": 3, "seed": 1}).raise_for_status()
        series = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines())
    counted = 'sidelight_verdicts_total{outcome="flagged",probe="%s"}'
    assert series[counted % "early"] == "1.0"
    assert series[counted % "late"] == "3.0"


def test_one_prompt_too_long_refuses_all_and_frees_every_place(http):
    refused = http.post("/v1/completions", json={**TEXT, "prompt": ["x", "y" * 300, "z"]})
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    series = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines())
    while series["sidelight_requests_running"] != "0.0":
        series = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines())
    assert http.post("/v1/completions", json=TEXT).status_code == 200
