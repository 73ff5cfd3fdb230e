"""Text completions: probes of raw texts and of both judge them, probes of chats alone do not."""

import json
from dataclasses import replace

import pytest

from policy_contract import choices
from sidelight.engines.base import Sampling, TextDelta
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import PlainText, Reads
from sidelight.policy.rules import Policy, Rule
from worlds.models import three_probes, tiny_backbone, untrained_probe
from worlds.servers import MODEL, in_process, require_alike, run_engine, served

PATH = "/v1/completions"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
TEXT = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
PROMPT_PROBES = ["toxicity", "intent", "topics"]
NEVER = Rule("block", threshold=1.0)
"""Blocks nothing but what could not be judged."""
# The second is the chat template written out: the very tokens of a chat, but for special ones.
PROMPTS = ["Once upon a time", "<|user|>hello<|end|>\n<|assistant|>"]


@pytest.fixture(scope="module")
def raw():
    return tiny_backbone(prompt_format="raw")


@pytest.fixture(scope="module")
def address(raw):
    response_probe = untrained_probe(raw, "refusal", reads=Reads("response"))
    with served(TransformersEngine(raw, [*three_probes(raw), response_probe])) as address:
        yield address


def names(verdicts):
    return [verdict["probe"] for verdict in verdicts]


def series(http):
    text = http.get("/metrics", headers={"Authorization": "Bearer scraper"}).text
    return dict(line.rsplit(" ", 1) for line in text.splitlines())


def test_completion_continues_text_without_chat_template(client):
    raw = client.completions.with_raw_response.create(**TEXT)
    answer = raw.parse()
    # The tiny tokenizer has a token for each byte.
    tokens = len(TEXT["prompt"].encode())
    assert answer.object == "text_completion"
    assert (answer.choices[0].finish_reason, answer.choices[0].logprobs) == ("length", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (tokens, 8)
    assert names(answer.model_extra["sidelight"]["verdicts"]) == [*PROMPT_PROBES, "refusal"]
    header = json.loads(raw.headers["x-sidelight-verdicts"])
    assert names(header) == [*PROMPT_PROBES, "refusal"]
    assert answer.model_extra["moderation"]["input"]["type"] == "moderation_results"
    # Without a limit.
    assert client.completions.create(**{**TEXT, "max_tokens": None}).usage.completion_tokens <= 16


def test_streamed_completion_matches_plain_one(client):
    plain = client.completions.create(**TEXT)
    usage = {"stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(**TEXT, stream=True, **usage))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.text for choice in choices) == plain.choices[0].text
    assert choices[-1].finish_reason == plain.choices[0].finish_reason
    assert names(choices[0].model_extra["sidelight"]["verdicts"]) == PROMPT_PROBES
    assert names(choices[-1].model_extra["sidelight"]["verdicts"]) == ["refusal"]
    assert chunks[-1].usage == plain.usage
    assert [chunk.moderation for chunk in chunks if "moderation" in (chunk.model_extra or {})]


def test_several_prompts_are_completed_in_order(client):
    prompts = ["one", "two, which is longer", "three"]
    together = client.completions.create(**{**TEXT, "prompt": prompts})
    separate = [client.completions.create(**{**TEXT, "prompt": prompt}) for prompt in prompts]
    assert [c.index for c in together.choices] == [0, 1, 2]
    assert [c.text for c in together.choices] == [a.choices[0].text for a in separate]
    assert together.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in separate)

    # As many texts as one request may ask for fit into the queue.
    most = {"prompt": [f"text {i}" for i in range(16)], "max_tokens": 1, "n": 16}
    answer = client.completions.create(**{**TEXT, **most})
    assert [choice.index for choice in answer.choices] == list(range(256))


def test_overlong_prompt_rejects_entire_request_and_frees_slots(http):
    refused = http.post(PATH, json={**TEXT, "prompt": ["x", "y" * 300, "z"]})
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    while series(http)["sidelight_requests_running"] != "0.0":
        pass
    assert http.post(PATH, json=TEXT).status_code == 200


def test_prompt_verdict_is_counted_once_for_several_choices(tiny):
    probes = [
        untrained_probe(tiny, "early", threshold=0.0),
        untrained_probe(tiny, "late", reads=Reads("response"), threshold=0.0),
    ]
    with in_process(TransformersEngine(tiny, probes)) as http:
        http.post("/v1/chat/completions", json={**CHAT, "n": 3, "seed": 1}).raise_for_status()
        counts = series(http)
    counted = 'sidelight_verdicts_total{outcome="flagged",probe="%s"}'
    assert (counts[counted % "early"], counts[counted % "late"]) == ("1.0", "3.0")


@pytest.fixture(scope="module")
def chat_probes(tiny):
    return [untrained_probe(tiny, "early"), untrained_probe(tiny, "late", reads=Reads("response"))]


@pytest.fixture(scope="module")
def mixed_probes(tiny, chat_probes):
    kinds = {"early": Reads(scope="each_turn"), "late": Reads("response"), "later": Reads("both")}
    both = [untrained_probe(tiny, f"{name}-both", reads=reads) for name, reads in kinds.items()]
    return [*chat_probes, *(probe.changed(prompt_format="both") for probe in both)]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_probes_for_both_formats_classify_plain_text_like_raw_probes(
    tiny, raw, mixed_probes, prompt
):
    as_raw = [
        probe.changed(prompt_format="raw", backbone=raw.fingerprint)
        for probe in mixed_probes
        if probe.card.prompt_format == "both"
    ]

    async def all_verdicts(engine):
        monitored = [probe.name for probe in engine.probes if probe.reads.includes_response]
        sampling = Sampling(max_tokens=4, temperature=0.0)
        events = engine.generate(PlainText(prompt), sampling, monitored=monitored)
        return [event.verdicts async for event in events if not isinstance(event, TextDelta)]

    mixed = run_engine(tiny, all_verdicts, probes=mixed_probes)
    wanted = run_engine(raw, all_verdicts, probes=as_raw)
    assert [verdicts.failed for verdicts in mixed] == [("early",), *[("late",)] * 5]
    assert [verdicts.failed for verdicts in wanted] == [()] * 6
    for mine, theirs in zip(mixed, wanted, strict=True):
        assert [v.probe for v in mine.verdicts] == [v.probe for v in theirs.verdicts]
        require_alike(mine.verdicts, theirs.verdicts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "status"),
    [
        ({"early": NEVER}, 400),
        ({"early": replace(NEVER, on_failure="pass")}, 200),
        ({"early-both": NEVER}, 200),
        ({"early-both": NEVER, "early": NEVER}, 400),
    ],
)
def test_blocking_rule_rejects_plain_text_its_probe_cannot_classify(
    tiny, mixed_probes, rules, status
):
    policy = Policy(input=rules, output={"late-both": NEVER})
    engine = TransformersEngine(tiny, mixed_probes)
    with in_process(engine, policy=policy, metrics_key="scraper") as http:
        answers = [
            http.post(PATH, json={**TEXT, "prompt": prompt, "stream": stream})
            for prompt, stream in zip(PROMPTS, (False, True), strict=True)
        ]
        counts = series(http)
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert [answer.status_code for answer in answers] == [status] * 2
    if "early" in rules:
        action = {400: "fail_closed", 200: "fail_open"}[status]
        counted = f'{{action="{action}",probe="early",side="input"}}'
        assert [n for name, n in counts.items() if name.endswith(counted)] == ["2.0"]
    for answer in answers if status == 400 else ():
        error = answer.json()["error"]
        assert error["code"] == "verdict_failed"
        assert "early: probes that were trained only on chats" in error["message"]
        assert "Once" not in error["message"]


def test_chat_only_response_probe_with_block_rule_sends_no_text(tiny, chat_probes):
    engine = TransformersEngine(tiny, chat_probes)
    with in_process(engine, policy=Policy(output={"late": NEVER})) as http:
        answers = [http.post(PATH, json={**TEXT, "stream": stream}) for stream in (False, True)]
        chat = http.post("/v1/chat/completions", json=CHAT).json()
    for answer in answers:
        assert choices(answer) == {0: ("", "content_filter")}
        assert '"code":"verdict_failed"' in answer.text.replace(" ", "")
    assert chat["choices"][0]["finish_reason"] != "content_filter"
