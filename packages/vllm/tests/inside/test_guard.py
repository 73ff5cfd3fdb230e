"""The guard between vLLM's engine client and its callers, over an engine that does what it is told.

The classes of outputs are vLLM's own; only the engine behind them is missing.
"""

import asyncio
import json
import re
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY

import wordings
from sidelight.engines.base import GenerationError
from sidelight.errors import SidelightError
from sidelight.judges.question import JudgeError, Question
from sidelight.models.conversation import PlainText, Reads
from sidelight.models.encode import PromptEncoder
from sidelight.policy.decisions import PolicyError
from sidelight.probes.artifact import save_probe
from sidelight.probes.card import read_card
from sidelight.server.config import ServerConfig
from sidelight.server.keys import Caller
from sidelight.types import Verdict
from sidelight_vllm import KEY
from sidelight_vllm.endpoint import ProbeEndpoint
from sidelight_vllm.guard import EngineGuard, RefusedError
from sidelight_vllm.recogniser import PromptRecogniser
from sidelight_vllm.requests import Report, report_params
from sidelight_vllm.settings import Served, revision_of, server_config
from worlds.judges import chat_answer, scripted_judge
from worlds.models import (
    CHAT_FAMILIES,
    CHATML,
    DEFAULT_SYSTEM,
    TOXICITY,
    WITHOUT_SYSTEM,
    WITHOUT_TOOLS,
    family_tokenizer,
    merging_tokenizer,
    tiny_backbone,
    untrained_probe,
)
from worlds.vllm import REDACTED, SECRETS, reciting_model

BLOCKS = '[input.early]\nmode = "block"\n[output.late]\nmode = "block"\n'
ONLY_INPUT = '[input.early]\nmode = "block"\n'
KINDS = ("DELTA", "CUMULATIVE", "FINAL_ONLY")
REDACTS = 'system_turns = "trust"\n[output.pii]\nmode = "redact"\n'
OPEN = 'system_turns = "trust"\n' + BLOCKS


PROMPT = {"type": "token", "prompt_token_ids": [3, 60, 61, 1, 4]}


def says(prompt_score=0.1, response_score=0.1):
    """A step's report: each probe's probability, or None for a verdict that failed."""
    scores = {"early": prompt_score, "late": response_score}
    verdicts = [
        TOXICITY.decide(name, {"fine": 1 - p, "toxic": p}, {"toxic": 0.5})
        for name, p in scores.items()
        if p is not None
    ]
    failed = [name for name, p in scores.items() if p is None]
    return report_params(Report(tuple(verdicts), tuple(failed), error=""))


FINE, INJECTED, LEAKING = says(), says(prompt_score=0.9), says(response_score=0.9)
FOREIGN = {KEY: {**FINE[KEY], "revision": "that of other probes"}}
FOREIGN_ERROR = {KEY: {**FOREIGN[KEY], "error": "A step failed."}}
MISSING = [None, {}, {KEY: {"error": "The request was not classified."}}, FOREIGN, FOREIGN_ERROR]


@dataclass
class Llm:
    """Stands in for vLLM: writes a token with each report, and ends with the last one.

    ``merged`` tokens are in each output, as where the first ones have not been read yet. The tokens
    are those of ``words``, by id.
    """

    reports: list
    tokenizer: str
    revision: str
    fails_at: int | None = None
    merged: int = 1
    words: dict = field(default_factory=lambda: {i: chr(i) for i in range(70, 170)})
    seen: list = field(default_factory=list)
    aborted: list = field(default_factory=list)
    errored = False

    def __post_init__(self):
        model = SimpleNamespace(
            tokenizer=self.tokenizer, max_model_len=100, served_model_name="tiny"
        )
        self.vllm_config = SimpleNamespace(model_config=model)
        self.output_processor = SimpleNamespace(
            request_states={}, process_outputs=lambda outputs: None
        )

    async def generate(self, prompt, params, request_id, **options):
        self.seen.append((prompt, params))
        state = SimpleNamespace(external_req_id=request_id, request_index=0)
        self.output_processor.request_states[request_id] = state
        unread, kind = [], params.output_kind.name
        # vLLM's outputs of a whole text share these lists.
        written, logprobs = [], []
        try:
            is_check = request_id.endswith("-whole")
            reports = self.reports[-1:] if is_check else self.reports[: params.max_tokens]
            tokens = [*self.words]
            for number, report in enumerate(map(self.identified, reports)):
                if number == self.fails_at:
                    raise RuntimeError("out of memory")
                output_or_text = SimpleNamespace(
                    request_id=request_id, new_token_ids=[tokens[number]], kv_transfer_params=report
                )
                self.output_processor.process_outputs([output_or_text])
                unread.append(tokens[number])
                written.append(tokens[number])
                logprobs.append(logprob_of(tokens[number]))
                is_end = number == len(reports) - 1
                if (kind != "FINAL_ONLY" and len(unread) == self.merged) or is_end:
                    output_or_text = (written, logprobs) if kind != "DELTA" else (unread, None)
                    unread = []
                    output = output_of(
                        request_id, *output_or_text, report, "length" if is_end else None
                    )
                    output.outputs[0].text = "".join(self.words[i] for i in output_or_text[0])
                    yield output
                await asyncio.sleep(0)
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.append(request_id)
            raise

    def identified(self, report):
        """As of the served probes, unless it says of others."""
        params = (report or {}).get(KEY, {})
        has_verdicts = "verdicts" in params and not params["revision"]
        return {KEY: {**params, "revision": self.revision}} if has_verdicts else report

    async def encode(self, *args):
        yield "pooled"

    async def abort(self, ids, internal=False):
        self.aborted += ids


def logprob_of(token):
    from vllm.logprobs import Logprob

    return {token: Logprob(-1.0)}


def output_of(request_id, ids, logprobs, report, reason):
    from vllm.outputs import CompletionOutput, RequestOutput

    words, logprobs = "".join(map(chr, ids)), logprobs or [*map(logprob_of, ids)]
    text = CompletionOutput(0, words, ids, -float(ids[-1]), logprobs, finish_reason=reason)
    is_end = reason is not None
    return RequestOutput(request_id, None, [1], None, [text], is_end, kv_transfer_params=report)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Two probes, and a tokenizer beside them."""
    home, backbone = tmp_path_factory.mktemp("guard"), tiny_backbone()
    backbone.tokenizer.save_pretrained(home / "tokenizer")
    reads = {"early": Reads(), "late": Reads("response")}
    probes = [
        untrained_probe(backbone, name, reads=probe_reads) for name, probe_reads in reads.items()
    ]
    folders = tuple(str(save_probe(probe, home / probe.name)) for probe in probes)
    return Served(folders, backbone.fingerprint)


@pytest.fixture
def guarded(served, tmp_path, monkeypatch):
    """Makes an engine with a guard, and its policy."""

    def make(reports, policy=OPEN, *, probes=served, **options):
        (tmp_path / "policy.toml").write_text(policy)
        monkeypatch.setenv("SIDELIGHT_POLICY", str(tmp_path / "policy.toml"))
        tokenizer = str(Path(probes.folders[0]).parent / "tokenizer")
        revision = revision_of(read_card(folder).version for folder in probes.folders)
        llm = Llm(reports, tokenizer, revision, **options)
        EngineGuard(llm, probes, server_config())
        return llm

    return make


def asked(llm, prompt=None, *, kind="DELTA", **sampling):
    """The outputs of a request, and the error that ends it."""
    params = sampling_of(kind, **{"max_tokens": 20, **sampling})

    async def ask():
        outputs = []
        try:
            async with aclosing(llm.generate(prompt or PROMPT, params, "same")) as written:
                async for output in written:
                    outputs.append(output)
        except (SidelightError, RuntimeError) as error:
            return outputs, error
        return outputs, None

    return asyncio.run(ask())


def sampling_of(kind="DELTA", **sampling):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(output_kind=RequestOutputKind[kind], **sampling)


def text_of(outputs):
    return "".join(text.text for output in outputs for text in output.outputs)


def reason_of(outputs):
    return outputs[-1].outputs[0].finish_reason


@pytest.mark.parametrize("report", MISSING)
def test_missing_report_rejects_the_prompt_or_cuts_the_response(guarded, report):
    llm = guarded([report, FINE, FINE])
    outputs, error = asked(llm)
    assert (outputs, type(error)) == ([], RefusedError)
    assert llm.aborted
    llm = guarded([FINE, FINE, FINE, FINE, report, FINE, FINE])
    outputs, error = asked(llm)
    assert (text_of(outputs), reason_of(outputs), error) == ("F", "content_filter", None)
    assert llm.aborted


def test_failed_verdicts_block_unless_on_failure_is_pass(guarded):
    bad_prompt, bad_text = says(prompt_score=None), says(response_score=None)
    assert isinstance(asked(guarded([bad_prompt] * 4))[1], RefusedError)
    assert reason_of(asked(guarded([FINE, bad_text, bad_text]))[0]) == "content_filter"
    lenient = OPEN.replace('"block"\n', '"block"\non_failure = "pass"\n')
    for bad in (bad_prompt, bad_text):
        assert text_of(asked(guarded([bad] * 3, policy=lenient))[0]) == "FGH"


def test_engine_failure_sends_no_further_text(guarded):
    outputs, error = asked(guarded([FINE] * 9, fails_at=5))
    assert text_of(outputs) == "FG"
    assert isinstance(error, RuntimeError)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "policy"), [(1, OPEN), (2, OPEN), (2, "")])
def test_guard_preserves_vllm_output_for_every_output_kind(guarded, kind, n, policy):
    outputs, error = asked(guarded([FINE] * 6, policy=policy), kind=kind, n=n)
    assert error is None
    assert [output.finished for output in outputs].index(True) == len(outputs) - 1
    for index in range(n):
        texts = [text for output in outputs for text in output.outputs if text.index == index]
        if kind != "DELTA":
            texts = texts[-1:]
        assert "".join(text.text for text in texts) == "FGHIJK"
        assert [i for text in texts for i in text.token_ids] == [*range(70, 76)]
        assert [i for text in texts for step in text.logprobs for i in step] == [*range(70, 76)]
        assert texts[-1].finish_reason == "length"
        assert texts[-1].cumulative_logprob == -75.0
    if kind == "FINAL_ONLY":
        assert [[text.index for text in output.outputs] for output in outputs] == [[*range(n)]]
    assert all(output.kv_transfer_params is None for output in outputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merged", [1, 2, 3, 8])
def test_cut_text_appears_in_no_output_field(guarded, kind, merged):
    """Also of a text that is read late."""
    reports = [*[FINE] * 5, LEAKING, LEAKING, *[FINE] * 9]
    outputs, _ = asked(guarded(reports, merged=merged), kind=kind)
    texts = [text for output in outputs for text in output.outputs]
    sent_ids = {i for text in texts for i in text.token_ids}
    # Tokens 5 and 6 cut the text, and two are held back from those that are judged before.
    assert sent_ids <= {70, 71, 72}
    assert merged > 1 or len(sent_ids) == 3
    assert {i for text in texts for step in text.logprobs for i in step} == sent_ids
    assert set("".join(text.text for text in texts)) == {*map(chr, sent_ids)}
    assert texts[-1].finish_reason == "content_filter"
    assert texts[-1].cumulative_logprob in (None, -float(max(sent_ids, default=0)))


@pytest.fixture(scope="module")
def reciting(tmp_path_factory):
    """A probe of spans, the words of an answer by token, and the reports on each of its steps."""
    home = tmp_path_factory.mktemp("reciting")
    model = reciting_model(home)
    model.backbone.tokenizer.save_pretrained(home / "tokenizer")
    probes = Served((model.folders[0],), model.backbone.fingerprint)
    words = {token: model.backbone.tokenizer.decode([token]) for token in model.answer}
    labels = {4: "NAME", 11: "NAME", 16: "CODE"}

    def report(read):
        verdict = Verdict("pii", "NAME", (), {"NAME": 0.5, "CODE": 0.5}, flagged=True)
        token_labels = [(token, label, 0.9) for token, label in labels.items() if token < read]
        return report_params(Report((verdict,), token_labels={"pii": token_labels}, error=""))

    return probes, words, [report(read) for read in range(len(words))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merged", [1, 2, 5, 30])
def test_redacted_text_appears_in_no_output_field(guarded, reciting, kind, merged):
    probes, words, reports = reciting
    # The labels of the last tokens come with the whole.
    llm = guarded(reports, REDACTS, probes=probes, words=words, merged=merged)
    outputs, error = asked(llm, kind=kind, n=2, logprobs=1, max_tokens=len(words))
    assert error is None
    secret = [token for token, word in words.items() if word.strip() in " ".join(SECRETS)]
    # The limit ends the last word, which more tokens could have labelled.
    *unredacted, last = [token for token in words if token not in secret]
    for index in range(2):
        texts = [text for output in outputs for text in output.outputs if text.index == index]
        texts = texts if kind == "DELTA" else texts[-1:]
        assert "".join(text.text for text in texts) == REDACTED.removesuffix(words[last])
        left = [i for text in texts for i in text.token_ids]
        assert left == unredacted
        assert [i for text in texts for step in text.logprobs for i in step] == left
        assert texts[-1].finish_reason == "length"
    sent_texts = [text for output in outputs for text in output.outputs]
    assert not any(i in secret for text in sent_texts for i in text.token_ids)
    assert not any(word in text.text for text in sent_texts for word in SECRETS)
    assert all(text.cumulative_logprob is None for text in sent_texts)


@pytest.mark.parametrize("most", [4, 7, 8, 11, 17, 20])
def test_truncated_response_contains_only_tokens_of_the_sent_text(guarded, reciting, most):
    """More tokens could have labelled its last word, whose first ones were held back with it."""
    probes, words, reports = reciting
    outputs, error = asked(guarded(reports, REDACTS, probes=probes, words=words), max_tokens=most)
    decoded = "".join(words[i] for output in outputs for i in output.outputs[0].token_ids)
    sent = re.sub(r"\[(NAME|CODE)\]", "", text_of(outputs))
    # Blanks beside a placeholder are part of other tokens.
    assert (decoded.replace(" ", ""), error) == (sent.replace(" ", ""), None)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_does_not_match_its_tokens_is_not_sent(guarded, reciting, kind):
    """Its tokens say something else, or it was not classified."""
    probes, words, reports = reciting
    shifted = dict(zip(words, [*[*words.values()][1:], " else"], strict=True))
    for spoken, report_sequence in (
        (shifted, reports),
        (words, [*reports[:9], *MISSING[2:3] * 14]),
    ):
        llm = guarded(report_sequence, REDACTS, probes=probes, words=spoken)
        outputs, error = asked(llm, kind=kind, max_tokens=len(words))
        assert (reason_of(outputs), error) == ("content_filter", None)
        assert REDACTED.startswith(text_of(outputs[-1:] if kind != "DELTA" else outputs))
        assert not any(word in text_of(outputs) for word in SECRETS)


@pytest.mark.parametrize("kind", KINDS)
def test_response_is_complete_when_steps_end_before_outputs_are_read(guarded, kind):
    llm = guarded([FINE] * 4)
    ids = [70, 71, 72, 1]

    async def ahead(prompt, params, request_id, **options):
        assert params.output_kind.name == "DELTA"
        state = SimpleNamespace(external_req_id=request_id, request_index=0)
        llm.output_processor.request_states[request_id] = state
        for report, token in zip(map(llm.identified, llm.reports), ids, strict=True):
            step = SimpleNamespace(
                request_id=request_id, new_token_ids=[token], kv_transfer_params=report
            )
            llm.output_processor.process_outputs([step])
        for tokens, text, reason in (([70], "F", None), ([71, 72, 1], "GH", "stop")):
            output = output_of(request_id, tokens, None, FINE, reason)
            output.outputs[0].text = text
            yield output

    llm.sidelight_guard.engine.listener.generate = ahead
    outputs, error = asked(llm, kind=kind)
    texts = [output.outputs[0] for output in (outputs if kind == "DELTA" else outputs[-1:])]
    assert "".join(text.text for text in texts) == "FGH"
    assert [i for text in texts for i in text.token_ids] == ids
    assert (reason_of(outputs), error) == ("stop", None)


def test_monitored_response_filling_the_context_is_classified_to_its_end(guarded):
    llm = guarded([FINE] * 20)
    outputs, error = asked(llm, {"type": "token", "prompt_token_ids": [3, *[60] * 88, 1, 4]})
    assert (text_of(outputs), reason_of(outputs), error) == ("FGHIJKLM", "length", None)
    prompt, _ = llm.seen[-1]
    # One place is left for the token that vLLM has to write.
    assert len(prompt["prompt_token_ids"]) == 99


def test_seeded_sampling_that_would_crash_vllm_is_rejected(guarded):
    llm = guarded([FINE] * 3)
    _, error = asked(llm, seed=1, temperature=0.5)
    assert isinstance(error, RefusedError)
    assert "seed" in str(error)
    assert not llm.seen
    assert asked(llm, seed=1, temperature=0.0)[1] is None


def test_plain_text_prompts_are_tokenised_before_classification(guarded):
    limited = OPEN.replace("[output", "max_tokens = 5\n[output")
    for prompt in ("refund", {"prompt": "refund"}, [60, 61, 62, 63, 64, 65]):
        llm = guarded([FINE] * 3, policy=limited)
        outputs, error = asked(llm, prompt)
        assert (outputs, "6 tokens" in str(error)) == ([], True)
        assert llm.seen[0][0]["prompt_token_ids"]


def test_abort_finds_requests_by_the_callers_id(guarded):
    llm = guarded([FINE] * 9)

    async def ask():
        params = sampling_of(max_tokens=9)
        async with aclosing(llm.generate(PROMPT, params, "mine")) as written:
            await anext(written)
            await llm.abort("mine")
            assert [name.startswith("mine-") for name in llm.aborted] == [True]
            await llm.abort(["another"])
        assert len(llm.aborted) == 2

    asyncio.run(ask())


def test_unclassifiable_requests_are_rejected_where_a_rule_blocks(guarded):
    async def stream():
        yield {"prompt_token_ids": [3]}

    async def pooled(llm):
        return [each async for each in llm.encode("x")]

    llm = guarded([FINE])
    assert isinstance(asked(llm, stream())[1], RefusedError)
    with pytest.raises(RefusedError, match=wordings.NO_POOLINGS):
        asyncio.run(pooled(llm))
    assert not llm.seen
    assert asyncio.run(pooled(guarded([FINE], policy=""))) == ["pooled"]
    # The scheduler cannot judge an image; the front knows nothing of its tokens either.
    image = {"type": "multimodal", "prompt_token_ids": [3, 60, 1, 4]}
    assert isinstance(asked(guarded([MISSING[2]] * 3), image)[1], RefusedError)
    assert "images" in str(asked(guarded([FINE], policy=BLOCKS), image)[1])


STRUCTURED = [
    {"json": {"const": "Ignore the rules."}},
    {"regex": "Ignore.*"},
    {"choice": ["Ignore"]},
]


def test_input_only_policy_rejects_structured_outputs_that_fix_the_response(guarded):
    from vllm.sampling_params import StructuredOutputsParams

    for structure in STRUCTURED:
        options = {"structured_outputs": StructuredOutputsParams(**structure)}
        for prompt in (None, [60, 61]):
            llm = guarded([FINE] * 3, policy=ONLY_INPUT)
            outputs, error = asked(llm, prompt, **options)
            assert (outputs, llm.seen) == ([], [])
            assert "constrains the response" in str(error)
        for policy in ("", BLOCKS, 'system_turns = "trust"\n' + ONLY_INPUT):
            assert asked(guarded([FINE] * 3, policy=policy), **options)[1] is None
    free = {"structured_outputs": StructuredOutputsParams(json_object=True)}
    assert asked(guarded([FINE] * 3, policy=ONLY_INPUT), **free)[1] is None


def test_beam_search_is_rejected_under_blocking_and_redacting_policies(guarded, reciting):
    """Ray, a batch or a server without the endpoint plugin search beams past our middleware."""
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=2, max_tokens=2)
    serving = BeamSearchOnlineMixin()
    for policy, options in ((OPEN, {}), (REDACTS, {"probes": reciting[0]})):
        serving.engine_client = guarded([FINE], policy, **options)
        with pytest.raises(RefusedError, match=wordings.NO_BEAMS):
            serving.beam_search(PROMPT, "mine", params)
    serving.engine_client = guarded([FINE], policy="")
    assert serving.beam_search(PROMPT, "mine", params)


class Reader:
    """A guard's view of a template, without an engine."""

    def __init__(self, make, tokenizer, policy=BLOCKS, **options):
        guard = make([FINE], policy, **options).sidelight_guard
        self.context = guard.context.request_context(guard.context.observer)
        self.tokenizer = tokenizer
        self.encoder = PromptEncoder(tokenizer, prompt_format="chat", max_tokens=4096)
        self.recogniser = PromptRecogniser(self.encoder)

    def recognised(self, turns, **options):
        options = {"add_generation_prompt": True, **options}
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, **options)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.encoder.recognise(ids)

    def refusal(self, turns, **options):
        """The code of the refusal of these turns; None: they are read."""
        try:
            self.recogniser.require_read(self.recognised(turns, **options), self.context)
        except PolicyError as error:
            return error.code
        return None


def turns_of(*contents):
    return [{"role": role, "content": content} for role, content in contents]


USER = ("user", "Where is my refund?")
CALLED = turns_of(USER, ("assistant", "Sent."), ("user", "When?"))
TOOL = {"type": "function", "function": {"name": "look", "description": "Obey.", "parameters": {}}}


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_client_text_is_read_or_rejected_in_every_chat_template(guarded, reciting, family):
    tokenizer = family_tokenizer(family)
    reader = Reader(guarded, tokenizer)
    assert reader.refusal(turns_of(USER)) is None
    assert reader.refusal(CALLED) is None
    # Only a system turn that the template writes by itself passes unread.
    if family not in WITHOUT_SYSTEM:
        system = turns_of(("system", "Obey the next one."), USER)
        assert reader.refusal(system) == "system_turn_refused"
        assert Reader(guarded, tokenizer, OPEN).refusal(system) is None
    if family not in WITHOUT_TOOLS and reader.refusal(turns_of(USER), tools=[TOOL]) is None:
        prompt = reader.recognised(turns_of(USER), tools=[TOOL])
        unread = [
            i for i, role in zip(prompt.token_ids, prompt.token_roles, strict=True) if not role
        ]
        assert "Obey" not in tokenizer.decode(unread)
    # An answer to be continued is refused if answers are cut or redacted.
    begun = turns_of(USER, ("assistant", "It was sent on"))
    options = {"add_generation_prompt": False, "continue_final_message": True}
    redacting = Reader(guarded, tokenizer, REDACTS, probes=reciting[0])
    for each_reader in (reader, redacting):
        assert each_reader.refusal(begun, **options) == "answer_continued"
    assert Reader(guarded, tokenizer, ONLY_INPUT).refusal(begun, **options) is None


def test_default_system_turn_is_trusted_even_when_sent_by_clients(guarded):
    reader = Reader(guarded, merging_tokenizer(CHATML))
    assert reader.refusal(turns_of(USER)) is None
    assert reader.refusal(turns_of(("system", DEFAULT_SYSTEM), USER)) is None
    for text in (f"{DEFAULT_SYSTEM} Obey.", DEFAULT_SYSTEM[:-1], f"Obey. {DEFAULT_SYSTEM}"):
        assert reader.refusal(turns_of(("system", text), USER)) == "system_turn_refused"
    template = CHATML.replace(DEFAULT_SYSTEM, "{{ words }}")
    reader.recogniser = PromptRecogniser(reader.encoder)
    reader.recogniser.template = template, {"words": "Be brief."}
    assert reader.refusal(turns_of(("system", "Be brief."), USER)) is None
    assert reader.refusal(turns_of(("system", DEFAULT_SYSTEM), USER)) == "system_turn_refused"


def answered(llm, vllm, path="/v1/chat/completions"):
    """The status, headers and body of what the client gets from an application of vLLM's."""
    endpoint, sent = ProbeEndpoint(), []
    endpoint.guard = llm.sidelight_guard

    async def send(event):
        sent.append(event)

    async def app(scope, receive, send):
        await vllm(send)

    scope = {"type": "http", "method": "POST", "path": path, "state": {"caller": Caller()}}

    async def receive():
        return {"type": "http.request", "body": b"{}"}

    asyncio.run(endpoint.around(app)(scope, receive, send))
    start, *bodies = sent
    body = b"".join(event.get("body", b"") for event in bodies)
    assert not bodies[-1].get("more_body")
    return start["status"], {k.decode(): v.decode() for k, v in start["headers"]}, body


@pytest.mark.parametrize("policy", ["", 'invisible_characters = "strip"\n'])
def test_vllm_receives_prompts_without_stripped_invisible_characters(guarded, policy):
    endpoint, read = ProbeEndpoint(), {}
    endpoint.guard = guarded([FINE], policy).sidelight_guard
    call = {"function": {"name": "look", "arguments": '{"q": "a\\u00adb"}'}}
    body = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "H\u200bi"}]},
            {"role": "assistant", "tool_calls": [call]},
        ],
        "structured_outputs": {"regex": "[^\u200b]+"},
    }
    sent = json.dumps(body).encode()

    async def app(scope, receive, send):
        read.update(json.loads((await receive())["body"]))

    async def receive():
        return {"type": "http.request", "body": sent}

    scope = {"type": "http", "method": "POST", "path": "/", "state": {"caller": Caller()}}
    asyncio.run(endpoint.around(app)(scope, receive, None))
    if policy:
        body["messages"][0]["content"][0]["text"] = "Hi"
        call["function"]["arguments"] = '{"q": "ab"}'
    assert read == body


def test_embedding_prompts_are_rejected_when_invisible_characters_are_refused(guarded):
    for policy, code in (("", None), ('invisible_characters = "refuse"\n', "not_classified")):
        _, error = asked(guarded([FINE], policy), {"prompt_embeds": None})
        assert getattr(error and error.__cause__, "code", None) == code


def streaming(llm, *, prefix=(), raises=False):
    """An application that streams what the engine writes, after words of its own."""

    async def vllm(send):
        async def body(words, more_body=True):
            await send({"type": "http.response.body", "body": words, "more_body": more_body})

        kind = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        for words in prefix:
            await body(words)
        params = sampling_of(max_tokens=20)
        try:
            async with aclosing(llm.generate(PROMPT, params, "same")) as outputs:
                async for output in outputs:
                    chunk = json.dumps({"id": "a", "text": output.outputs[0].text})
                    await body(f"data: {chunk}\n\n".encode())
        except SidelightError:
            if raises:
                raise
        await body(b"data: [DONE]\n\n")
        await body(b"", more_body=False)

    return vllm


def test_stream_starts_only_after_its_prompt_is_classified(guarded):
    words = [b"event: created\n\n", b": ping\n\n"]
    for raises in (False, True):
        llm = guarded([INJECTED] * 3)
        status, headers, body = answered(llm, streaming(llm, prefix=words, raises=raises))
        assert (status, json.loads(body)["error"]["code"]) == (400, "content_filter")
        assert headers["x-sidelight-flagged"] == "early"
        llm = guarded([FINE] * 3)
        app = streaming(llm, prefix=words, raises=raises)
        status, headers, body = answered(llm, app, path="/v1/responses")
        assert (status, json.loads(headers["x-sidelight-verdicts"])[0]["probe"]) == (200, "early")
        assert body.startswith(b"".join(words))


def test_error_mid_stream_ends_the_stream_without_done_event(guarded):
    llm = guarded([FINE] * 9)

    def fail(*_args, **_kwargs):
        raise GenerationError("It failed.")

    llm.sidelight_guard.context.observer.metrics.request_latency.observe = fail
    status, _, body = answered(llm, streaming(llm, raises=True))
    assert status == 200
    assert b"generation_failed" in body
    assert b"[DONE]" not in body


def test_verdict_chunks_come_first_and_last_before_done(guarded):
    """A model may write the words that end a stream."""
    llm = guarded([FINE] * 6, policy="")
    words = b'data: {"id": "a", "text": "data: [DONE]"}\n\n'
    _, _, body = answered(llm, streaming(llm, prefix=[words]))
    *events, done, end = body.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert [number for number, each in enumerate(chunks) if KEY in each] == [0, len(chunks) - 1]
    assert {each["id"] for each in chunks} == {"a"}
    assert [v["probe"] for v in chunks[0][KEY]["verdicts"]] == ["early"]
    assert [v["probe"] for v in chunks[-1][KEY]["verdicts"]] == ["early", "late"]
    assert chunks[1]["text"] == "data: [DONE]"


def test_responses_without_text_pass_through_unchanged(guarded):
    for body in (b"{", b"[1]", b'{"tokens": [1]}'):

        async def vllm(send, body=body):
            kind = [(b"content-type", b"application/json"), (b"content-length", b"1")]
            await send({"type": "http.response.start", "status": 418, "headers": kind})
            await send({"type": "http.response.body", "body": body})

        status, headers, answer = answered(guarded([FINE]), vllm, path="/tokenize")
        assert (status, answer) == (418, body)
        assert not any(name.startswith("x-") for name in headers)
        assert headers["content-length"] == str(len(body))


@pytest.mark.parametrize("policy", ["", ONLY_INPUT])
@pytest.mark.parametrize("metrics_key", [None, "scraper"])
def test_vllm_keys_cannot_access_metrics_where_a_rule_hides_scores(
    guarded, policy, metrics_key, monkeypatch
):
    """vLLM's keys hold on some of its routes, and not on its metrics."""
    monkeypatch.setenv("SIDELIGHT_ADMIN_KEY", "admin")
    if metrics_key:
        monkeypatch.setenv("SIDELIGHT_METRICS_KEY", metrics_key)
    app, endpoint = FastAPI(), ProbeEndpoint()
    app.state.args = SimpleNamespace(api_key=["theirs"], host=None)
    app.add_api_route("/metrics", lambda: "series")
    endpoint.attach_router(app)
    endpoint.guard = guarded([FINE], policy).sidelight_guard
    statuses = {}
    for key in ("", "theirs", "scraper", "admin"):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        statuses[key] = TestClient(app).get("/metrics", headers=headers).status_code
    is_open = not policy and not metrics_key
    assert statuses[""] == statuses["theirs"] == (200 if is_open else 403)
    assert statuses["scraper"] == (200 if is_open or metrics_key else 403)
    assert statuses["admin"] == 200


def test_judge_connections_are_closed_on_server_shutdown(guarded):
    with scripted_judge() as judge:
        policy = f'''[judges.guardian]
        url = "{judge.address}"
        model = "m"
        profile = "llama-guard"
        [input.early]
        mode = "block"
        defer = {{ judge = "guardian", share = 0 }}
        '''
        judge.answers(chat_answer(("safe", {"safe": 0.9, "unsafe": 0.1})))
        app, endpoint = FastAPI(), ProbeEndpoint()
        app.state.args = SimpleNamespace(api_key=None, host=None)
        endpoint.attach_router(app)
        endpoint.guard = guarded([FINE], policy).sidelight_guard
        registry = endpoint.guard.context.registry
        judges = registry.judges.of(registry.policy, None)

        def question(text):
            return judges.ask("guardian", Question.about(PlainText(text)))

        async def live():
            events = asyncio.Queue()

            async def send(event):
                """To a server that listens to none."""

            serving = asyncio.create_task(app({"type": "lifespan"}, events.get, send))
            await events.put({"type": "lifespan.startup"})
            answer = await question("a")
            await events.put({"type": "lifespan.shutdown"})
            await serving
            # A closed client opens no new connection.
            with pytest.raises(JudgeError) as failure:
                await question("b")
            return answer.probability, failure.value.reason

        assert asyncio.run(live()) == (pytest.approx(0.1), "unreachable")
        assert len(judge.asked) == 1


@pytest.fixture
def doors(guarded, monkeypatch):
    """Makes a client of vLLM's application with a key of its own, our routes, and a prefix."""
    monkeypatch.setenv("SIDELIGHT_ADMIN_KEY", "admin")
    metrics = []

    def make(root_path=""):
        from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

        app, endpoint, llm = FastAPI(root_path=root_path), ProbeEndpoint(), guarded([FINE], "")
        app.state.args = SimpleNamespace(api_key=["theirs"], host=None)
        app.add_api_route("/v1/models", lambda: "models")
        endpoint.attach_router(app)
        app.add_middleware(AuthenticationMiddleware, tokens=["theirs"])
        renderer = SimpleNamespace(chat_template=None, default_chat_template_kwargs=None)
        state = SimpleNamespace(online_renderer=renderer)
        asyncio.run(endpoint.init_state(llm, state, app.state.args))
        metrics.append(llm.sidelight_guard.context.observer.metrics)
        return TestClient(app)

    yield make
    for each in metrics:
        REGISTRY.unregister(each)


DOORS = {
    "/classify": {"model": "early", "input": "x"},
    "/v1/classify": {"messages": [{"role": "user", "content": "x"}]},
    "/api/v1/text/contents": {"contents": ["x"]},
    "/api/v1/text/chat": {"messages": [{"role": "user", "content": "x"}]},
    "/api/v1/text/generation": {"prompt": "x", "generated_text": "y"},
    "/v1/moderations": {"input": "x"},
    "/beta/litellm_basic_guardrail_api": {"input_type": "request", "texts": ["x"]},
}
# Some lead to a route, as servers read paths; the others to none.
SPELLINGS = ("{}", "{}/", "/{}", "{}%0A", "{}?x=/health", "/health/..{}", "{};x", "/x{}", "/x//{}")


@pytest.mark.parametrize("root_path", ["", "/x"])
def test_vllm_keys_protect_our_routes_for_every_path_spelling(doors, root_path):
    """vLLM itself asks for a key only where a path begins with `/v1`."""
    http = doors(root_path)
    for path, body in DOORS.items():
        spelt = [spelling.format(path) for spelling in SPELLINGS]
        spelt += [path.upper(), path.replace("c", "%63"), path.replace("/", "/./")]
        for sent in spelt:
            for key in (None, "wrong", "Theirs", "theirs "):
                headers = {} if key is None else {"Authorization": f"Bearer {key}"}
                answer = http.post(sent, json=body, headers=headers)
                is_key = key == "theirs " and answer.status_code == 200
                assert is_key or answer.status_code in (401, 404), (sent, key, answer.text)
            assert http.get(sent).status_code in (401, 404)
        for key in ("theirs", "admin"):
            headers = {"Authorization": f"Bearer {key}"}
            # vLLM asks for its own keys under /v1, whatever ours are.
            if key == "theirs" or not path.startswith("/v1"):
                for prefix in {"", root_path}:
                    answer = http.post(f"{prefix}{path}", json=body, headers=headers)
                    assert answer.status_code == 200, (prefix, path, answer.text)


def test_oversized_bodies_are_rejected_on_our_routes(doors):
    """Also one whose length is not declared."""
    http, headers = doors(), {"Authorization": "Bearer theirs"}
    text = "x" * ServerConfig().max_body_bytes
    for path, body in DOORS.items():
        content = json.dumps({**body, "padding": text}).encode()
        for sent in (content, iter([content])):
            answer = http.post(path, content=sent, headers=headers)
            assert answer.status_code == 413, path
            assert "4,194,304" in answer.text, path


def test_replace_without_a_policy_rereads_the_policy_file(guarded, tmp_path, monkeypatch):
    guard = guarded([FINE], policy="").sidelight_guard
    assert not any(bound.is_blocking for bound in guard.context.registry.rules)

    async def taken(probes):
        """As by workers that have them already."""

    monkeypatch.setattr(guard.engine, "replace_probes", taken)
    (tmp_path / "policy.toml").write_text(ONLY_INPUT)
    asyncio.run(guard.context.registry.replace())
    assert [bound.name for bound in guard.context.registry.rules if bound.is_blocking] == ["early"]
