"""Text completions, and several texts of one request.

Probes of raw texts and of both judge them; probes of chats alone do not.
"""

import json
from dataclasses import replace

import pytest

from engine_runs import ROUNDING, probabilities, run
from live import MODEL, http_client, served
from sidelight.engines.base import Finished, PromptJudged, Sampling, TextDelta
from sidelight.engines.transformers import TransformersEngine
from sidelight.policy.rules import Policy, Rule
from sidelight.prompts import Message, PlainText, Reads
from tiny import three_probes, tiny_backbone, untrained_probe

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
TEXT = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
PROMPT_PROBES = ["toxicity", "intent", "topics"]


@pytest.fixture(scope="module")
def address():
    backbone = tiny_backbone(prompt_format="raw")
    late = untrained_probe(backbone, "refusal", reads=Reads("response"))
    with served(TransformersEngine(backbone, [*three_probes(backbone), late])) as address:
        yield address


def names(verdicts):
    return [verdict["probe"] for verdict in verdicts]


def test_a_text_is_continued_without_a_chat_template(client, http):
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


def test_the_verdicts_are_in_the_header_too(client):
    raw = client.completions.with_raw_response.create(**TEXT)
    header = json.loads(raw.headers["x-sidelight-verdicts"])
    assert names(header) == [*PROMPT_PROBES, "refusal"]


@pytest.mark.slow
def test_several_prompts_are_written_in_their_order(client):
    prompts = ["one", "two, which is longer", "three"]
    together = client.completions.create(**{**TEXT, "prompt": prompts})
    alone = [client.completions.create(**{**TEXT, "prompt": prompt}) for prompt in prompts]
    assert [c.index for c in together.choices] == [0, 1, 2]
    assert [c.text for c in together.choices] == [a.choices[0].text for a in alone]
    assert together.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone)


@pytest.mark.slow
def test_many_texts_of_many_prompts_fit_into_the_queue(client):
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
def test_an_unsupported_field_is_a_400_that_names_it(http, field, value):
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


def test_a_prompt_is_counted_once_however_many_texts_follow():
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


def test_one_prompt_that_is_too_long_refuses_all_and_frees_every_place(http):
    refused = http.post("/v1/completions", json={**TEXT, "prompt": ["x", "y" * 300, "z"]})
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    series = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines())
    while series["sidelight_requests_running"] != "0.0":
        series = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines())
    assert http.post("/v1/completions", json=TEXT).status_code == 200


NEVER = Rule("block", threshold=1.0)
"""Blocks nothing but what could not be judged."""


@pytest.fixture(scope="module")
def chat_probes():
    backbone = tiny_backbone()
    return backbone, [
        untrained_probe(backbone, "early"),
        untrained_probe(backbone, "late", reads=Reads("response")),
    ]


def chat_of(text):
    """The chat template written out: the very token ids of a chat, but for the special ones."""
    return f"<|user|>{text}<|end|>\n<|assistant|>"


@pytest.mark.parametrize("prompt", ["Once upon a time", chat_of("hello")])
@pytest.mark.parametrize("watch", [(), ("late",)])
def test_probes_of_chats_give_no_verdict_on_plain_text(chat_probes, prompt, watch):
    backbone, probes = chat_probes
    asked = []

    def admits(judged):
        asked.append(judged)
        return True

    async def written(engine):
        sampling = Sampling(max_tokens=4, temperature=0.0)
        events = engine.generate(PlainText(prompt), sampling, watch=watch, admits=admits)
        return [event async for event in events]

    events = run(backbone, written, probes=probes)
    judged, finished = events[0], events[-1]
    assert isinstance(judged, PromptJudged)
    assert isinstance(finished, Finished)
    assert (judged.judgement.verdicts, judged.judgement.failed, judged.is_plain) == (
        (),
        ("early",),
        True,
    )
    assert asked == [judged]
    for event in (*events[1:-1], finished):
        assert getattr(event, "verdicts", ()) == ()
    assert finished.judgement.failed == ("late",)


@pytest.fixture(scope="module")
def mixed_probes(chat_probes):
    backbone, probes = chat_probes
    both = [
        untrained_probe(backbone, "early-both", reads=Reads(scope="each_turn")),
        untrained_probe(backbone, "late-both", reads=Reads("response")),
        untrained_probe(backbone, "later-both", reads=Reads("both"), mechanism="gate"),
    ]
    return backbone, [*probes, *(replace(probe, prompt_format="both") for probe in both)]


@pytest.mark.parametrize("prompt", ["Once upon a time", chat_of("hello")])
def test_probes_of_both_judge_plain_text_as_probes_of_raw_texts_do(mixed_probes, prompt):
    backbone, probes = mixed_probes
    raw = tiny_backbone(prompt_format="raw")
    as_raw = [
        replace(probe, prompt_format="raw", fingerprint=raw.fingerprint)
        for probe in probes
        if probe.prompt_format == "both"
    ]

    async def judgements(engine):
        watch = [probe.name for probe in engine.probes if probe.reads.includes_response]
        sampling = Sampling(max_tokens=4, temperature=0.0)
        events = engine.generate(PlainText(prompt), sampling, watch=watch)
        return [event.judgement async for event in events if not isinstance(event, TextDelta)]

    mixed = run(backbone, judgements, probes=probes)
    wanted = run(raw, judgements, probes=as_raw)
    assert len(mixed) == 6
    assert [judgement.failed for judgement in mixed] == [("early",), *[("late",)] * 5]
    assert [judgement.failed for judgement in wanted] == [()] * 6
    for mine, theirs in zip(mixed, wanted, strict=True):
        assert [v.probe for v in mine.verdicts] == [v.probe for v in theirs.verdicts]
        assert probabilities(mine.verdicts) == pytest.approx(
            probabilities(theirs.verdicts), abs=ROUNDING
        )


def test_probes_of_both_judge_chats_as_probes_of_chats_do(mixed_probes):
    backbone, probes = mixed_probes
    as_chat = [replace(probe, prompt_format="chat") for probe in probes]
    chat = [Message("user", "hello"), Message("assistant", "go away")]
    mixed, alone = (
        run(backbone, lambda engine: engine.judge([chat]), probes=served)
        for served in (probes, as_chat)
    )
    assert mixed == alone
    assert len(mixed[0].judgement.verdicts) == 5


def test_a_probe_of_both_lets_plain_text_through_unless_one_of_chats_blocks_too(mixed_probes):
    backbone, probes = mixed_probes
    blocking = {"early-both": NEVER}
    for rules, status in ((blocking, 200), ({**blocking, "early": NEVER}, 400)):
        engine = TransformersEngine(backbone, probes)
        policy = Policy(input=rules, output={"late-both": NEVER})
        with served(engine, policy=policy) as address, http_client(address) as http:
            answer = http.post("/v1/completions", json=TEXT)
        assert answer.status_code == status
    message = answer.json()["error"]["message"]
    assert message.startswith("No verdict from early: probes that were trained on chats")


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Once upon a time", chat_of("hello")])
def test_a_blocking_rule_refuses_plain_text_that_its_probe_cannot_judge(
    chat_probes, prompt, stream
):
    backbone, probes = chat_probes
    body = {**TEXT, "prompt": prompt, "stream": stream}
    for on_failure, status in (("block", 400), ("pass", 200)):
        rule = Rule("block", threshold=1.0, on_failure=on_failure)
        engine = TransformersEngine(backbone, probes)
        with (
            served(engine, policy=Policy(input={"early": rule})) as address,
            http_client(address) as http,
        ):
            answer = http.post("/v1/completions", json=body)
            series = http.get("/metrics").text
            chat = http.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == status
        action = {"block": "fail_closed", "pass": "fail_open"}[on_failure]
        assert f'{{action="{action}",probe="early",side="input"}} 1.0' in series
        assert chat.status_code == 200
        if status == 400:
            error = answer.json()["error"]
            assert error["code"] == "verdict_failed"
            assert "early" in error["message"]
            assert "trained on chats" in error["message"]
            assert "Once" not in error["message"]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_sent_of_plain_text_whose_response_probe_blocks(chat_probes, stream):
    backbone, probes = chat_probes
    engine = TransformersEngine(backbone, probes)
    with (
        served(engine, policy=Policy(output={"late": NEVER})) as address,
        http_client(address) as http,
    ):
        answer = http.post("/v1/completions", json={**TEXT, "stream": stream})
        chat = http.post("/v1/chat/completions", json=CHAT).json()
    assert answer.status_code == 200
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == ""
    assert choices[-1]["finish_reason"] == "content_filter"
    assert '"code":"verdict_failed"' in answer.text.replace(" ", "")
    assert chat["choices"][0]["finish_reason"] != "content_filter"


def test_without_a_rule_plain_text_is_answered_and_reported_as_not_judged(chat_probes):
    backbone, probes = chat_probes
    with served(TransformersEngine(backbone, probes)) as address, http_client(address) as http:
        answer = http.post("/v1/completions", json=TEXT).json()
    failed = [{"probe": name, "error": "verdict_failed"} for name in ("early", "late")]
    assert answer["sidelight"]["verdicts"] == failed
    for side in ("input", "output"):
        assert answer["moderation"][side]["code"] == "verdict_failed"
        assert "trained on chats" in answer["moderation"][side]["message"]
