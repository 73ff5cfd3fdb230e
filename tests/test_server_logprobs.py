"""Log-probabilities as the real ``openai`` client gets them, against a forward pass."""

import pytest
import torch
from transformers import LlamaConfig

from live import MODEL, http_client, openai_client, served
from sidelight.engines.text import Speller
from sidelight.engines.transformers import TransformersEngine
from sidelight.policy.rules import Policy, Rule
from sidelight.prompts import Message, PlainText, Reads
from tiny import SIZES, three_probes, tiny_backbone, tiny_tokenizer, untrained_probe

# One pass over a whole text and one pass per token add in another order: float32, three layers.
ROUNDING = 1e-4
HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": MODEL, "messages": HELLO, "max_tokens": 20, "logprobs": True}
TEXT = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 20}
# Both change what is drawn; neither may change what is told.
DRAWN = {"temperature": 1.3, "top_p": 0.8, "seed": 7}


@pytest.fixture(scope="module")
def backbone():
    """Every id of this model is a token of its tokenizer's."""
    return tiny_backbone(LlamaConfig(**{**SIZES, "vocab_size": len(tiny_tokenizer())}))


@pytest.fixture(scope="module")
def late(backbone):
    return untrained_probe(backbone, "late", reads=Reads("response"))


@pytest.fixture(scope="module")
def address(backbone, late):
    with served(TransformersEngine(backbone, [*three_probes(backbone), late])) as address:
        yield address


@pytest.fixture(scope="module")
def ids(backbone):
    """Token ids by their spelling."""
    spell = Speller(backbone.tokenizer)
    return {spell(token).text: token for token in range(len(backbone.tokenizer))}


def reference(backbone, prompt, written):
    """Log-probabilities after each token but the last, from one pass over prompt and text."""
    whole = torch.tensor([[*prompt, *written]])
    with torch.inference_mode():
        logits = backbone.model(input_ids=whole).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)


@pytest.mark.slow
def test_a_chat_has_the_models_own_log_probabilities(client, backbone, ids):
    answer = client.chat.completions.create(**CHAT, **DRAWN, top_logprobs=20)
    told = answer.choices[0].logprobs.content
    written = [ids[token.token] for token in told]
    prompt = backbone.encoder.encode([Message("user", "hello")]).token_ids
    wanted = reference(backbone, prompt, written)
    assert answer.choices[0].finish_reason == "length"
    assert len(told) == answer.usage.completion_tokens == CHAT["max_tokens"]
    for token, drawn, row in zip(told, written, wanted, strict=True):
        assert token.logprob == pytest.approx(row[drawn].item(), abs=ROUNDING)
        best = row.topk(20).values.tolist()
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(best, abs=ROUNDING)
        for top in token.top_logprobs:
            own = row[ids[top.token]].item()
            assert top.logprob == pytest.approx(own, abs=ROUNDING)


@pytest.mark.slow
def test_a_text_has_the_same_in_its_older_format(client, backbone, ids):
    answer = client.completions.create(**TEXT, **DRAWN, logprobs=5)
    choice = answer.choices[0]
    told = choice.logprobs
    written = [ids[name.removeprefix("bytes:")] for name in told.tokens]
    prompt = backbone.encoder.encode(PlainText(TEXT["prompt"])).token_ids
    wanted = reference(backbone, prompt, written)
    drawn = wanted[range(len(written)), written]
    assert told.token_logprobs == pytest.approx(drawn.tolist(), abs=ROUNDING)
    for name, token, row, top in zip(told.tokens, written, wanted, told.top_logprobs, strict=True):
        best = [*row.topk(5).indices.tolist(), token]
        assert top == pytest.approx(
            {_name(ids, other): row[other].item() for other in best}, abs=ROUNDING
        )
        assert name in top
    for name, offset in zip(told.tokens, told.text_offset, strict=True):
        is_text = not name.startswith(("bytes:", "<|"))
        assert not is_text or choice.text[offset:].startswith(name)


def _name(ids, token):
    spelled = next(text for text, own in ids.items() if own == token)
    return f"bytes:{spelled}" if spelled.startswith("\\x") else spelled


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_has_the_log_probabilities_of_the_plain_answer(client, n):
    request = {**CHAT, **DRAWN, "top_logprobs": 3, "n": n}
    plain = client.chat.completions.create(**request)
    told = {index: [] for index in range(n)}
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            assert choice.delta.content or choice.finish_reason or choice.logprobs is None
            told[choice.index] += choice.logprobs.content if choice.logprobs else []
    # A batch of another shape adds in another order, so the numbers are compared roughly.
    for choice in plain.choices:
        assert [t.bytes for t in told[choice.index]] == [t.bytes for t in choice.logprobs.content]
        assert [t.logprob for t in told[choice.index]] == pytest.approx(
            [t.logprob for t in choice.logprobs.content], abs=ROUNDING
        )


@pytest.mark.slow
def test_a_streamed_text_has_the_log_probabilities_of_the_plain_one(client):
    request = {**TEXT, **DRAWN, "logprobs": 2, "n": 2}
    plain = client.completions.create(**request)
    told = {0: [], 1: []}
    for chunk in client.completions.create(**request, stream=True):
        for choice in chunk.choices:
            if choice.logprobs:
                pairs = zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
                told[choice.index] += pairs
    assert told == {
        choice.index: list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))
        for choice in plain.choices
    }


@pytest.mark.slow
def test_openais_stream_helper_merges_them(client):
    plain = client.chat.completions.create(**CHAT, temperature=0, top_logprobs=1)
    with client.chat.completions.stream(**CHAT, temperature=0, top_logprobs=1) as stream:
        list(stream)
        whole = stream.current_completion_snapshot
    assert whole.choices[0].logprobs.content == plain.choices[0].logprobs.content


@pytest.mark.slow
def test_without_a_request_for_them_there_are_none(client):
    chat = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3, logprobs=False)
    text = client.completions.create(**{**TEXT, "max_tokens": 3})
    assert chat.choices[0].logprobs is None
    assert text.choices[0].logprobs is None
    bare = client.chat.completions.create(**CHAT, temperature=0)
    assert [token.top_logprobs for token in bare.choices[0].logprobs.content] == [[]] * 20


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": 5}, "logprobs"),
        ("/v1/completions", {"logprobs": 6}, "logprobs"),
        ("/v1/completions", {"logprobs": -1}, "logprobs"),
        ("/v1/completions", {"logprobs": True}, "logprobs"),
    ],
)
def test_a_wrong_number_of_log_probabilities_is_a_400_that_names_the_field(
    address, path, fields, param
):
    body = {"model": MODEL, "messages": HELLO, "prompt": "x", "max_tokens": 2, **fields}
    with http_client(address) as http:
        refused = http.post(path, json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("stream", [False, True])
def test_withheld_text_has_no_log_probabilities(backbone, late, threshold, stream):
    """What is told of a text that a policy cuts is what was sent of it."""
    request = {**CHAT, "temperature": 0, "top_logprobs": 2}
    rule = Rule("block", threshold=threshold, warm_up=4, hold_back=1)
    policy = Policy(output={"late": rule})
    with (
        served(TransformersEngine(backbone, [late]), policy=policy) as address,
        openai_client(address) as client,
    ):
        answer = client.chat.completions.create(**request, stream=stream)
        choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
    parts = [c.delta.content or "" if stream else c.message.content for c in choices]
    told = [token for c in choices for token in (c.logprobs.content if c.logprobs else [])]
    is_cut = choices[-1].finish_reason == "content_filter"
    assert is_cut == (threshold == 0.0)
    spelled = b"".join(bytes(token.bytes or ()) for token in told).decode(errors="replace")
    assert spelled == "".join(parts) if is_cut else spelled.startswith("".join(parts))
    assert (len(told) < CHAT["max_tokens"]) == is_cut
