"""What a rule redacts leaves vLLM's own server in no form, whatever a client asks for."""

import json
import re

import httpx
import pytest

from policy_contract import ADMIN, chat, choices, chunks_of, verdicts
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Message
from sidelight.policy.redaction import redacted
from sidelight.policy.rules import Policy, Rule
from sidelight.types import Span
from worlds.servers import in_process
from worlds.stock import completion, stock_server, unjudged
from worlds.vllm import (
    ANSWER,
    IS_INTERPRETED,
    REDACTED,
    ROUNDING,
    SECRETS,
    TOGETHER,
    reciting_model,
)

pytestmark = pytest.mark.xdist_group("redaction")
# A runner knows nothing of streams.
STREAMED = pytest.mark.parametrize("streamed", [True] if IS_INTERPRETED else [False, True])
WORDS = "Does Quentin Zyxwvut know 4711?"
# A draw without any doubt: vLLM writes one text only at a temperature of 0.
NOT_OF_ANSWERS = ("index", "text_offset", "prompt_token_ids")
TWO = {"n": 2, "temperature": 0.05}


@pytest.fixture(scope="module")
def reciting(tmp_path_factory):
    return reciting_model(tmp_path_factory.mktemp("reciting"))


@pytest.fixture(scope="module")
def server(reciting, tmp_path_factory):
    home = tmp_path_factory.mktemp("stock")
    (home / "policy.toml").write_text('[output.pii]\nmode = "redact"\n')
    options = ["--enable-log-requests", "--enable-log-outputs", "--enable-scale-out"]
    with stock_server(
        reciting.path,
        reciting.folders,
        home,
        *options,
        SIDELIGHT_POLICY=str(home / "policy.toml"),
        SIDELIGHT_AUDIT_LOG=str(home / "audit.jsonl"),
        SIDELIGHT_ADMIN_KEY=ADMIN,
        VLLM_LOGGING_LEVEL="DEBUG",
        VLLM_SERVER_DEV_MODE="1",
        **TOGETHER,
    ) as server:
        yield server


def post(server, path, body, key=None):
    most = {"/v1/responses": "max_output_tokens", "/inference/v1/generate": "sampling"}
    body = {"model": "tiny", "temperature": 0, most.get(path, "max_tokens"): 40, **body}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = httpx.post(f"{server.address}{path}", json=body, timeout=120, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def asked_of(reciting, *, streamed):
    """Ways to have an answer written, with all that can tell of its tokens, and its text."""
    prompt = [*reciting.backbone.tokenizer("Who is he?<|assistant|>")["input_ids"]]
    detailed = {"logprobs": True, "top_logprobs": 5, "return_token_ids": True}
    sampling = {"temperature": 0, "max_tokens": 40, "logprobs": 3}
    text = "Who is he?"
    ways = [
        (chat(text, **detailed), REDACTED),
        (chat(text, **TWO, **detailed), REDACTED),
        (chat(text, stop=["y else"], **detailed), "[CODE], which nobod"),
        (chat(text, stop=["r 47"], **detailed), "[NAME] lives at numbe"),
        (chat(text, stop=["471"], include_stop_str_in_output=True, **detailed), "r [CODE]"),
        # The word ends within its tokens; the last of them, which labels it, is read apart.
        (chat(text, stop=["vut"], **detailed), "customer [NAME]"),
        (chat(text, stop=["wvu"], **detailed), "customer [NAME]"),
        (chat(text, stop_token_ids=[reciting.token("t")], **detailed), "customer [NAME]"),
        (chat(text, max_tokens=5, **detailed), "customer [NAME]"),
        # The word is not labelled yet.
        *((chat(text, max_tokens=m, **detailed), "customer [NAME]") for m in (7, 9, 11)),
        (chat(text, stop=["Zyx"], **detailed), "customer [NAME] "),
        (
            chat(text, stop=["Zyx"], include_stop_str_in_output=True, **detailed),
            "customer [NAME]",
        ),
        (chat(text, stop_token_ids=[reciting.token("x")], **detailed), "customer [NAME]"),
        (("/v1/responses", {"input": text, "max_output_tokens": 9}), "customer [NAME]"),
        (("/v1/messages", {**chat(text)[1], "max_tokens": 9}), "customer [NAME]"),
        (
            chat(text, logprobs=True, return_tokens_as_token_ids=True, skip_special_tokens=False),
            REDACTED,
        ),
        (completion(prompt, **TWO, logprobs=3, return_token_ids=True), REDACTED),
        (completion([prompt, prompt], logprobs=3), REDACTED),
        (("/v1/messages", chat(text)[1]), REDACTED),
        (("/v1/responses", {"input": text}), REDACTED),
        (("/inference/v1/generate", {"token_ids": prompt, "sampling_params": sampling}), ""),
        (
            (
                "/inference/v1/generate",
                {"token_ids": prompt, "sampling_params": {**sampling, "detokenize": False}},
            ),
            "",
        ),
    ]
    if not streamed:
        ways.append((completion(prompt, logprobs=3, prompt_logprobs=3, echo=True), REDACTED))
    return [((path, {"stream": streamed, **body}), end) for (path, body), end in ways]


@STREAMED
def test_echo_includes_log_probabilities_when_a_stop_string_delays_text(server, reciting, streamed):
    prompt = [*reciting.backbone.tokenizer("Who is he?<|assistant|>")["input_ids"]]
    asked = completion(prompt, logprobs=1, echo=True, stop=["know not, or so"], stream=streamed)
    answer = post(server, *asked)
    assert choices(answer)[0][0].endswith(REDACTED)
    logprobs = [
        each.get("logprobs") or {} for chunk in chunks_of(answer) for each in chunk["choices"]
    ]
    tokens = [token for each in logprobs for token in each.get("tokens", ())]
    assert len(tokens) > len(prompt)


def values_of(found, name=""):
    """Every value in some JSON, with the name of the field that it is in."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield "", key
            yield from values_of(value, key)
    elif isinstance(found, list):
        if name == "bytes":
            yield name, bytes(found)
        else:
            for value in found:
                yield from values_of(value, name)
    else:
        yield name, found


@STREAMED
def test_redacted_words_appear_in_no_response_field_or_log(server, reciting, streamed):
    tokenizer = reciting.backbone.tokenizer
    secret = [i for i in reciting.answer if tokenizer.decode([i]).strip() in "Quentin Zyxwvut 4711"]
    assert len(secret) == 10
    token_texts = {tokenizer.decode([i]) for i in secret}
    # A blank stands between other words too.
    hidden = {
        *secret,
        *(token_text.encode() for token_text in token_texts),
        *(f"token_id:{i}" for i in secret),
    }
    hidden |= token_texts - {" "}
    for asked, end in asked_of(reciting, streamed=streamed):
        answer = post(server, *asked)
        assert not secrets_in(f"{[*answer.headers.items()]}{answer.text}"), (asked, answer.text)
        chunks = chunks_of(answer)
        values = [each for chunk in chunks for each in values_of(chunk.get("choices") or [])]
        told = [value for name, value in values if name not in NOT_OF_ANSWERS]
        assert not any(value in hidden for value in told), (asked, answer.text)
        if asked[0] in ("/v1/chat/completions", "/v1/completions"):
            reason = "length" if "max_tokens" in asked[1] else "stop"
            texts = choices(answer).values()
            assert {reason for _, reason in texts} == {reason}
            assert all(text.endswith(end) for text, _ in texts), (asked, answer.text)
        elif asked[0] == "/inference/v1/generate":
            ids = [value for name, value in values if name == "token_ids"]
            assert ids == [i for i in [*reciting.answer, 1] if i not in secret]
        else:
            assert end in "".join(text for text in texts_of(chunks)), (asked, answer.text)
    log, audit = server.log.read_text(), (server.log.parent / "audit.jsonl").read_text()
    # Answers are in it.
    assert REDACTED in log
    assert '"pii"' in audit
    assert not secrets_in(log)
    assert not secrets_in(audit)


def secrets_in(text):
    """With what stands around them. Random ids, ports and processes may hold a secret's digits."""
    return re.findall(rf".*(?<![0-9a-f-])(?:{'|'.join(SECRETS)})(?![0-9a-f-]).*", text)


def texts_of(chunks):
    """What the routes say that have other formats than OpenAI's chunks."""
    return [
        value
        for chunk in chunks
        for name, value in values_of(chunk)
        if name in ("text", "delta") and isinstance(value, str)
    ]


def spans_of(entry):
    return [(s["start"], s["end"], s["label"], s["probability"]) for s in entry["spans"]]


@STREAMED
def test_redacted_texts_and_spans_match_our_engine(server, reciting, streamed):
    rules = {"pii": Rule("redact")}
    engine = TransformersEngine(reciting.backbone, reciting.probes)
    ways = [chat(WORDS), chat(WORDS, stop=["y else"]), chat(WORDS, stop=["vut"])]
    ways += [chat(WORDS, max_tokens=most) for most in (4, 5, 8, 12, 13, 16)]
    with in_process(engine, policy=Policy(output=rules), admin_key=ADMIN) as http:
        for path, body in ways:
            body = {"max_tokens": 40, "temperature": 0, "stream": streamed, **body}
            theirs = post(server, path, body, ADMIN)
            headers = {"Authorization": f"Bearer {ADMIN}"}
            ours = http.post(path, json={**body, "model": "tiny/reciting"}, headers=headers)
            assert choices(theirs) == choices(ours)
            for name, entry in verdicts(ours).items():
                theirs_of_probe = verdicts(theirs)[name]
                assert entry["spans"] or body["max_tokens"] == 4
                for mine, his in zip(spans_of(entry), spans_of(theirs_of_probe), strict=True):
                    assert mine[:3] == his[:3]
                    assert mine[3] == pytest.approx(his[3], abs=ROUNDING)
            if body["max_tokens"] == 40 and "stop" not in body:
                spans = [Span(*span) for span in spans_of(verdicts(theirs)["pii"])]
                assert choices(theirs)[0][0] == redacted(ANSWER, spans) == REDACTED


def test_prompt_spans_have_positions_only_where_the_text_is_known(server, reciting):
    name, code = WORDS.index("Quentin"), WORDS.index("4711")
    places = [(name, name + len("Quentin Zyxwvut"), "NAME"), (code, code + 4, "CODE")]
    ids = [*reciting.backbone.encoder.encode([Message("user", WORDS)]).token_ids]
    turns = [*chat(WORDS)[1]["messages"], {"role": "assistant", "content": "No."}]
    for asked, message in (
        (chat(WORDS), None),
        (completion(WORDS), None),
        (("/v1/responses", {"input": WORDS}), None),
        ((chat(WORDS)[0], {"messages": [*turns, {"role": "user", "content": "Why?"}]}), 0),
    ):
        entry = verdicts(post(server, *asked, ADMIN))["asked"]
        assert [span[:3] for span in spans_of(entry)] == places
        assert {span.get("message") for span in entry["spans"]} == {message}
    # The text of these ids is unknown.
    assert "spans" not in verdicts(post(server, *completion(ids), ADMIN))["asked"]


def test_classification_routes_return_the_spans_of_our_engine(server, reciting):
    texts = [WORDS, "Who is Quentin?", "Nobody."]
    engine = TransformersEngine(reciting.backbone, reciting.probes)
    with in_process(engine, policy=Policy(output={"pii": Rule("redact")})) as http:
        for path, body in (
            ("/v1/redact", {"input": texts}),
            ("/v1/moderations", {"input": texts}),
            ("/beta/litellm_basic_guardrail_api", {"input_type": "response", "texts": texts}),
        ):
            theirs = httpx.post(f"{server.address}{path}", json=body, timeout=60)
            ours = http.post(path, json=body)
            assert theirs.status_code == 200, theirs.text
            for name in ("results", "texts", "action"):
                assert undigested(ours.json().get(name)) == rounded(theirs.json().get(name))
            assert "NAME" in ours.text


def rounded(found):
    """Numbers that may differ in their last digits, equal to those that are near."""
    if isinstance(found, dict):
        return {name: rounded(value) for name, value in undigested(found).items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    if isinstance(found, float):
        return pytest.approx(found, abs=ROUNDING)
    return found


def undigested(found):
    """Without the digests of saved probes."""
    return json.loads(re.sub(r'("version": )"[0-9a-f]*"', r'\1""', json.dumps(found)))


def test_response_without_a_verdict_contains_no_text(server, reciting):
    with unjudged(server.address, reciting.folders):
        for streamed in (False, True):
            answer = post(server, *chat("Who is he?", stream=streamed, **TWO))
            assert choices(answer) == {0: ("", "content_filter"), 1: ("", "content_filter")}
    assert choices(post(server, *chat("Who is he?")))[0][0] == REDACTED
