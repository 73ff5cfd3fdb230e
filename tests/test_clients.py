"""The installed ``openai`` package over our server; ``tests/matrix/clients`` has other clients."""

from collections.abc import Iterator

import pytest
from openai import APIStatusError, BadRequestError, ContentFilterFinishReasonError, OpenAI

from live import MODEL, openai_client, served
from sidelight.backbone import TransformersBackbone
from sidelight.engines.transformers import TransformersEngine
from sidelight.policy.rules import Policy, Rule
from sidelight.prompts import Reads
from tiny import three_probes, untrained_probe

ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
SETTINGS = {"temperature": 0, "max_tokens": 8}
# Some text is sent before the rule can hold.
CUTTING = Rule("block", threshold=0.0, warm_up=4, hold_back=1)


@pytest.fixture(scope="module")
def address(tiny: TransformersBackbone) -> Iterator[str]:
    late = untrained_probe(tiny, "late", reads=Reads("response"))
    with served(TransformersEngine(tiny, [*three_probes(tiny), late])) as address:
        yield address


def test_openais_client_types_the_verdicts_of_an_answer_and_of_a_moderation(client: OpenAI):
    raw = client.chat.completions.with_raw_response.create(**ASKED, **SETTINGS)
    answer = raw.parse()
    assert answer.choices[0].message.content
    assert answer.moderation is not None
    verdicts = answer.model_extra["sidelight"]["verdicts"]
    assert "toxicity" in raw.headers["x-sidelight-verdicts"]
    moderation = client.moderations.create(input="hello").results[0]
    (toxicity,) = [v for v in verdicts if v["probe"] == "toxicity"]
    (score,) = [s for name, s in moderation.category_scores if name.startswith("toxicity")]
    assert score == pytest.approx(toxicity["probabilities"]["toxic"], abs=1e-4)


def test_openais_stream_and_its_helper_give_the_same_text_and_verdicts(client: OpenAI):
    whole = client.chat.completions.create(**ASKED, **SETTINGS)
    chunks = list(client.chat.completions.create(**ASKED, **SETTINGS, stream=True))
    text = "".join(choice.delta.content or "" for c in chunks for choice in c.choices)
    assert text == whole.choices[0].message.content
    typed = [chunk.moderation for chunk in chunks if chunk.moderation is not None]
    assert typed[-1].to_dict() == whole.moderation.to_dict()
    with client.chat.completions.stream(**ASKED, **SETTINGS) as stream:
        list(stream)
        message = stream.current_completion_snapshot.choices[0].message
    assert message.content == text
    found = [{k: v for k, v in v.items() if k != "index"} for v in message.sidelight["verdicts"]]
    assert found == whole.model_extra["sidelight"]["verdicts"]


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_raises_a_typed_error_with_its_code(client: OpenAI, stream: bool):
    for body, code in (
        ({"extra_body": {"probes": ["no such probe"]}}, "probe_not_found"),
        ({"model": "another"}, "model_not_found"),
    ):
        with pytest.raises(APIStatusError) as refused:
            client.chat.completions.create(**{**ASKED, **body}, stream=stream)
        assert refused.value.code == code


@pytest.mark.slow
def test_openais_client_is_told_of_a_blocked_prompt_and_of_a_cut_text(tiny: TransformersBackbone):
    always = {"toxicity": Rule("block", threshold=0.0)}
    with (
        served(TransformersEngine(tiny, three_probes(tiny)), policy=Policy(input=always)) as at,
        openai_client(at) as client,
        pytest.raises(BadRequestError) as refused,
    ):
        client.chat.completions.create(**ASKED, **SETTINGS)
    assert refused.value.code == "content_filter"
    late = untrained_probe(tiny, "late", reads=Reads("response"))
    with (
        served(TransformersEngine(tiny, [late]), policy=Policy(output={"late": CUTTING})) as at,
        openai_client(at) as client,
    ):
        assert client.chat.completions.create(**ASKED).choices[0].finish_reason == "content_filter"
        with (
            pytest.raises(ContentFilterFinishReasonError),
            client.chat.completions.stream(**ASKED, **SETTINGS) as stream,
        ):
            stream.get_final_completion()
