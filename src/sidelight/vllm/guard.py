"""The policy between vLLM's engine client and whatever calls it.

Each ``AsyncLLM`` with probes gets an ``EngineGuard`` when it is made. What calls ``generate``, an
HTTP route, a batch, gRPC or Ray, gets outputs that have passed ``policy.enforcement``: a blocked
prompt is an error, and text comes once it is judged. Other ways to write text are refused.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import asyncio
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidelight.engines.text import Marker
from sidelight.errors import SidelightError
from sidelight.policy.decisions import PolicyError
from sidelight.policy.enforcement import Admitted, Enforcement
from sidelight.policy.hold_back import Ended
from sidelight.policy.request import Outcome, Terms
from sidelight.policy.rules import require_policy_applies
from sidelight.probe import Probe
from sidelight.prompts import Conversation, EncodedPrompt, PlainText, control_tokens
from sidelight.server.config import ServerConfig
from sidelight.server.metrics import Metrics
from sidelight.server.observe import RequestObserver, audit_of
from sidelight.server.probes import ProbeRegistry
from sidelight.vllm.answers import GuardedText, OutputDelta, together
from sidelight.vllm.engine import VllmEngine
from sidelight.vllm.internals import wrap
from sidelight.vllm.outputs import without_report
from sidelight.vllm.recogniser import PromptRecogniser, require_drawable, require_own_words
from sidelight.vllm.requests import request_params
from sidelight.vllm.settings import (
    KEY,
    Served,
    identity_of,
    model_tokenizer,
    prompt_encoder,
)


class RefusedError(SidelightError, ValueError):
    """What vLLM gets for a request that the policy refuses; it answers a ``ValueError`` with 400.

    ``endpoint`` replaces that answer by the one of our own server.
    """


class GuardedRequest(Outcome):
    """One client's request, and what has come of it.

    Attributes:
        probes: Those that were served when it was made.
        conversations: What its prompts say, in order, as far as that is known.
        silent: The texts whose last output says nothing, of which no token was sent before.
        decided: Set once each prompt is answered, or one is refused, or nothing more is written.
    """

    def __init__(
        self, terms: Terms, probes: tuple[Probe, ...], conversations: Sequence[Conversation] = ()
    ):
        super().__init__(terms)
        self.probes = probes
        self.conversations = conversations
        self.silent: list[Enforcement] = []
        self.decided = asyncio.Event()

    def conversation(self, texts: Sequence[Enforcement]) -> Conversation | None:
        """What the prompt of these texts says; None: nobody knows."""
        number = self.texts.index([*texts])
        return self.conversations[number] if number < len(self.conversations) else None

    @property
    def cut(self) -> list[bool]:
        """Whether each text was cut, in the order of choices."""
        ends = [text.ended for text in self.choices]
        return [end is not None and end.reason == "content_filter" for end in ends]

    def refuse(self, error: SidelightError) -> None:
        self.refusal = self.refusal or error


_request: ContextVar[GuardedRequest | None] = ContextVar("sidelight_request", default=None)
current_request = _request.get


@contextmanager
def requested(request: GuardedRequest) -> Any:
    """What the engine does in this context, and in tasks that it starts, belongs to the request."""
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)


@dataclass(frozen=True)
class _Call:
    """One call of ``generate``: its arguments, the texts to write, and which probes judge them."""

    client: GuardedRequest
    texts: Sequence[Enforcement]
    params: Any
    request_id: str
    options: Mapping[str, Any]
    identity: str


class EngineGuard:
    """Judges each request of one engine client, and enforces the policy on it.

    Args:
        llm: vLLM's ``AsyncLLM``. Its ``generate``, ``encode`` and ``abort`` are replaced.
        served: The probes in its workers.
        config: The policy, the audit log, and the keys.

    Attributes:
        engine: Judges texts by the same workers, for the routes that write none.
        recogniser: Finds the turns in prompts.

    Raises:
        SidelightError: The policy does not fit the probes, or the audit log cannot be written.
    """

    def __init__(self, llm: Any, served: Served, config: ServerConfig):
        from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

        self._encode, self._abort = llm.encode, llm.abort
        self._text_ids: dict[str, set[str]] = defaultdict(set)
        model, probes = llm.vllm_config.model_config, served.load()
        names = model.served_model_name
        self._room = model.max_model_len - 1
        self._tokenizer = model_tokenizer(llm.vllm_config)
        encoder = prompt_encoder(llm.vllm_config, probes)
        self.recogniser = PromptRecogniser(encoder, self._tokenizer)
        self._controls = control_tokens(self._tokenizer).keys()
        self.engine = VllmEngine(
            llm,
            probes,
            name=names if isinstance(names, str) else names[0],
            encoder=encoder,
            tokenizer=self._tokenizer,
            fingerprint=served.fingerprint,
            identity=identity_of(probe.version for probe in probes),
        )
        require_policy_applies(config.loaded_policy, probes)
        sources = {p.name: Path(f) for p, f in zip(probes, served.folders, strict=True)}
        self.registry = ProbeRegistry(self.engine, config.loaded_policy, sources, config.policy)
        audit = audit_of(config)
        self.observer = RequestObserver(Metrics(self.engine), audit)
        llm.generate, llm.encode, llm.abort = self.generate, self.encode, self.abort
        llm.sidelight_guard = self
        # Whatever calls them.
        wrap(BeamSearchOnlineMixin, "beam_search", _search_beams)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """As vLLM's, with the outputs that the policy lets pass.

        Raises:
            RefusedError: The policy refuses the prompt, or something could not be judged.
        """
        client = current_request()
        if client is None:
            await self.engine.settled()
            client = self.request(self.observer.of(_unique(request_id)))
        try:
            async with self.engine.passing(client.probes) as identity:
                # Before anything is awaited, so that prompts are in the order of their calls.
                texts = client.begin(sampling_params.n)
                call = _Call(client, texts, sampling_params, request_id, options, identity)
                async with aclosing(self._outputs(call, prompt)) as outputs:
                    async for output in outputs:
                        yield output
        except SidelightError as error:
            client.refuse(error)
            raise RefusedError(str(error)) from error
        finally:
            client.decided.set()

    def request(
        self,
        observer: RequestObserver,
        *,
        probes: Sequence[str] | None = None,
        sees_all: bool = False,
        conversations: Sequence[Conversation] = (),
    ) -> GuardedRequest:
        """A request that begins now, and keeps the served probes and their rules.

        Args:
            observer: Its own.
            probes: Those that the client chooses to be told of.
            sees_all: Whether the client sees what rules do not disclose.
            conversations: What its prompts say, as far as that is known.

        Raises:
            PolicyError: There is no such probe.
        """
        policy, rules = self.registry.policy, self.registry.rules
        terms = Terms(self.engine.model, policy, rules, (), observer.text, sees_all=sees_all)
        terms = terms.choose(probes, for_text=True)
        return GuardedRequest(terms, self.engine.probes, conversations)

    async def encode(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """As vLLM's; refused where a rule blocks, since what it reads is not judged."""
        self.require_unblocked("Poolings of a prompt")
        async with aclosing(self._encode(*args, **kwargs)) as outputs:
            async for output in outputs:
                yield output

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """As vLLM's, by the ids that callers gave."""
        ids = [request_id] if isinstance(request_id, str) else [*request_id]
        if not internal:
            ids = [text_id for name in ids for text_id in self._text_ids.get(name, ())]
        await self._abort(ids, internal=internal)

    def require_unblocked(self, what: str) -> None:
        """Refuses what no probe reads where a rule blocks or redacts."""
        client = current_request()
        rules = self.registry.rules if client is None else client.terms.rules
        if any(bound.is_enforced for bound in rules):
            error = PolicyError(
                f"{what} cannot be judged, and the policy blocks what is not judged. Use "
                "/v1/chat/completions, /v1/completions or /v1/responses.",
                code="not_judged",
            )
            if client is not None:
                client.refuse(error)
            raise RefusedError(str(error)) from error

    async def _outputs(self, call: _Call, prompt: Any) -> AsyncGenerator[Any, None]:
        params, request_id, terms = call.params, call.request_id, call.client.terms
        if (adapter := call.options.get("lora_request")) is not None:
            call.client.adapter = adapter.lora_name
        require_drawable(params)
        require_own_words(params, terms)
        if isinstance(prompt, list):
            prompt = {"prompt_token_ids": prompt}
        elif isinstance(prompt, str):
            prompt = {"prompt": prompt}
        if not isinstance(prompt, Mapping):
            # Text that arrives while the model writes, or a request that its caller has prepared.
            self.require_unblocked("Prompts that are neither text nor token ids")
            sampling = self._params(params, 0, None)
            written = self.engine.listener.generate(prompt, sampling, request_id, **call.options)
            async with aclosing(written) as outputs:
                async for output in outputs:
                    yield without_report(output)
            return
        if prompt.keys() <= {"prompt", "cache_salt"}:
            # As vLLM's own reading of a text gives them.
            prompt = {**prompt, "prompt_token_ids": self._tokenizer(prompt["prompt"])["input_ids"]}
        encoded = await self.recogniser.recognise(prompt)
        await asyncio.to_thread(self.recogniser.require_read, encoded, terms)
        mark = await self._marker(call, encoded)
        ids = [_unique(request_id) for _ in range(params.n)]
        texts = [self._text(call, prompt, encoded, mark, *each) for each in enumerate(ids)]
        self._text_ids[request_id].update(ids)
        try:
            async with aclosing(together(texts, params.output_kind)) as outputs:
                async for output in outputs:
                    output.request_id = request_id
                    yield output
        finally:
            self._text_ids[request_id].difference_update(ids)
            if not self._text_ids[request_id]:
                del self._text_ids[request_id]

    async def _marker(self, call: _Call, encoded: EncodedPrompt | None) -> Marker | None:
        """Gives a judgement of the prompt its spans; None: nobody knows what the prompt says."""
        probes = [p for p in call.client.probes if p.spans and not p.reads.includes_response]
        text = call.client.conversation(call.texts) if probes else None
        if encoded is None or text is None:
            return None
        return await asyncio.to_thread(self.recogniser.marker, encoded, text, probes)

    async def _text(
        self,
        call: _Call,
        prompt: Mapping[str, Any],
        encoded: EncodedPrompt | None,
        mark: Marker | None,
        index: int,
        text_id: str,
    ) -> AsyncGenerator[Any, None]:
        """The outputs of one text that may be sent, in the form that the caller wants."""
        from vllm.sampling_params import RequestOutputKind

        client, enforcement = call.client, call.texts[index]
        audited = PlainText("")
        if encoded is not None and self.observer.audit is not None:
            # The audit log hashes the prompt as the model reads it.
            audited = PlainText(self._tokenizer.decode(encoded.token_ids))
        sampling = self._params(call.params, index, encoded, is_watched=bool(enforcement.watch))
        text = GuardedText(
            self.engine.listener,
            prompt,
            encoded,
            sampling,
            text_id,
            options=call.options,
            identity=call.identity,
            rules=client.terms.rules,
            watch=frozenset(enforcement.watch),
            tokenizer=self._tokenizer,
            controls=self._controls,
            room=self._room,
            mark=mark,
        )
        is_final_only = call.params.output_kind == RequestOutputKind.FINAL_ONLY
        last: OutputDelta | None = None
        async with aclosing(enforcement.guard(audited, text.events())) as passed:
            async for each in passed:
                output = None
                match each:
                    case Admitted():
                        if client.is_decided:
                            client.decided.set()
                    case Ended("content_filter"):
                        output = text.cut()
                    case Ended():
                        assert last is not None
                        output = text.sent(last)
                    case OutputDelta() if each.is_last:
                        # Sent with the end, which follows at once.
                        last = each
                    case OutputDelta():
                        output = text.sent(each)
                    case _:
                        raise AssertionError(each)
                if output is not None and (output.finished or not is_final_only):
                    output.outputs[0].index = index
                    if output.finished and text.is_silent:
                        client.silent.append(enforcement)
                    yield output

    def _params(
        self,
        params: Any,
        index: int,
        encoded: EncodedPrompt | None,
        *,
        is_watched: bool = False,
    ) -> Any:
        """The caller's sampling, for one text, with what its prompt's tokens belong to."""
        from vllm.sampling_params import RequestOutputKind

        sampling = params.clone()
        sampling.n = 1
        if params.n > 1 and params.seed is not None:
            sampling.seed = params.seed + index
        extra = dict(sampling.extra_args or {})
        client_params = extra.get("kv_transfer_params")
        transfer = dict(client_params) if isinstance(client_params, dict) else {}
        # Whatever the client says that its tokens belong to.
        transfer.pop(KEY, None)
        transfer |= {} if encoded is None else request_params(encoded)
        sampling.extra_args = {**extra, "kv_transfer_params": transfer}
        if is_watched:
            if params.output_kind == RequestOutputKind.FINAL_ONLY:
                # What is judged before the end may be all that is sent.
                sampling.output_kind = RequestOutputKind.CUMULATIVE
            # A place is kept free, so that the last token can be judged too.
            room = max(1, self._room - len(encoded or ()))
            sampling.max_tokens = (
                room if sampling.max_tokens is None else min(sampling.max_tokens, room)
            )
            sampling.min_tokens = min(sampling.min_tokens, sampling.max_tokens)
            # Text is what rules hold back, whether or not the caller wants any.
            sampling.detokenize = True
        return sampling


def _search_beams(original: Callable[..., Any], serving: Any, *args: Any, **kwargs: Any) -> Any:
    guard = getattr(serving.engine_client, "sidelight_guard", None)
    if guard is not None:
        # It takes candidates that no probe has read.
        guard.require_unblocked("Texts of a beam search")
    return original(serving, *args, **kwargs)


def _unique(request_id: str) -> str:
    """A name of its own: clients may name their requests, and two may choose the same name."""
    return f"{request_id}-{uuid.uuid4().hex}"
