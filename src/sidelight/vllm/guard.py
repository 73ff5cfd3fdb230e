"""The policy between vLLM's engine client and whatever calls it.

Each ``AsyncLLM`` with probes gets an ``EngineGuard`` when it is made. What calls ``generate``, an
HTTP route, a batch, gRPC or Ray, gets outputs that have passed ``policy.enforcement``: a blocked
prompt is an error, and text comes once it is judged. Other ways to write text are refused.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import asyncio
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from sidelight.errors import SidelightError
from sidelight.policy.decisions import Decision, PolicyError
from sidelight.policy.enforcement import Admitted, Enforcement
from sidelight.policy.hold_back import Ended
from sidelight.policy.rules import BoundRule, require_policy_applies
from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt, Part, PlainText, control_tokens
from sidelight.server.config import ServerConfig
from sidelight.server.metrics import Metrics
from sidelight.server.observe import RequestObserver, Trace, audit_of
from sidelight.server.probes import ProbeRegistry
from sidelight.vllm.engine import VllmEngine
from sidelight.vllm.outputs import Assembly, GuardedText, OutputDelta, together
from sidelight.vllm.requests import listener_of
from sidelight.vllm.settings import (
    KEY,
    Served,
    identity_of,
    model_tokenizer,
    prompt_encoder,
    request_params,
)

# What vLLM's ``StructuredOutputsParams`` takes that can hold words of an answer.
_WORDED = ("json", "regex", "choice", "grammar", "structural_tag")


class RefusedError(SidelightError, ValueError):
    """What vLLM gets for a request that the policy refuses; it answers a ``ValueError`` with 400.

    ``endpoint`` replaces that answer by the one of our own server.
    """


@dataclass
class RequestRecord:
    """What happens to the prompts and texts of one client's request, for its answer.

    Attributes:
        probes: Those that were served when it was made.
        observer: Counts and audits it; None: the guard's own, without a client's key.
        rules: Those that hold for it; None: the policy's.
        refusal: Why it is refused, if it is.
        prompts: What is known of each prompt; None until it is judged.
        ends: How the texts of each prompt have ended; None while one is written.
        silent: The places of texts that were cut before any of them was sent.
        decided: Set once it ``is_decided``, or nothing more is written.
        adapter: The LoRA adapter that writes its texts; None: the model by itself.
    """

    probes: tuple[Probe, ...]
    observer: RequestObserver | None = None
    rules: Sequence[BoundRule] | None = None
    refusal: SidelightError | None = None
    prompts: list[Admitted | None] = field(default_factory=list[Admitted | None])
    ends: list[list[Ended | None]] = field(default_factory=list[list[Ended | None]])
    silent: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    adapter: str | None = None

    def begin(self, texts: int) -> int:
        """Notes a prompt that so many texts follow; returns its index."""
        self.prompts.append(None)
        self.ends.append([None] * texts)
        return len(self.prompts) - 1

    @property
    def is_decided(self) -> bool:
        """Whether each prompt so far is answered, or one is refused."""
        return self.refusal is not None or (bool(self.prompts) and None not in self.prompts)

    @property
    def prompt_decisions(self) -> list[Decision]:
        return [d for prompt in self.prompts if prompt is not None for d in prompt.decisions]

    @property
    def response_decisions(self) -> list[Decision]:
        return [d for ends in self.ends for end in ends if end is not None for d in end.decisions]

    @property
    def places(self) -> list[tuple[int, int]]:
        """The prompt of each text, and its number among those of the prompt, by choice."""
        return [(i, k) for i, ends in enumerate(self.ends) for k in range(len(ends))]

    @property
    def choices(self) -> list[tuple[Sequence[Decision], Ended | None]]:
        """The decisions on its prompt and the end of each text, in the order of choices."""
        prompts = [() if prompt is None else prompt.decisions for prompt in self.prompts]
        return [(prompts[i], self.ends[i][k]) for i, k in self.places]

    @property
    def cut(self) -> list[bool]:
        """Whether each text was cut."""
        return [end is not None and end.reason == "content_filter" for _, end in self.choices]


_record: ContextVar[RequestRecord | None] = ContextVar("sidelight_record", default=None)


@contextmanager
def recorded(record: RequestRecord) -> Any:
    """What the engine does in this context, and in tasks that it starts, goes to the record."""
    token = _record.set(record)
    try:
        yield
    finally:
        _record.reset(token)


def current_record() -> RequestRecord | None:
    return _record.get()


@dataclass(frozen=True)
class _Call:
    """One call of ``generate``.

    Attributes:
        number: That of its prompt in the record.
        identity: That of the probes which judge it.
    """

    record: RequestRecord
    number: int
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
        template: The chat template of the server, if it is not the tokenizer's own, and arguments
            that the operator always gives it.

    Raises:
        SidelightError: The policy does not fit the probes, or the audit log cannot be written.
    """

    def __init__(self, llm: Any, served: Served, config: ServerConfig):
        self._generate, self._encode, self._abort = llm.generate, llm.encode, llm.abort
        self._listener = listener_of(llm.output_processor)
        self._own_ids: dict[str, set[str]] = defaultdict(set)
        model, probes = llm.vllm_config.model_config, served.load()
        names = model.served_model_name
        self._room = model.max_model_len - 1
        self._tokenizer = model_tokenizer(llm.vllm_config)
        self._encoder = prompt_encoder(llm.vllm_config, probes)
        self._controls = control_tokens(self._tokenizer).keys()
        self.engine = VllmEngine(
            llm,
            probes,
            name=names if isinstance(names, str) else names[0],
            encoder=self._encoder,
            tokenizer=self._tokenizer,
            fingerprint=served.fingerprint,
            identity=identity_of(probe.version for probe in probes),
        )
        require_policy_applies(config.loaded_policy, probes)
        sources = {p.name: Path(f) for p, f in zip(probes, served.folders, strict=True)}
        self.registry = ProbeRegistry(self.engine, config.loaded_policy, sources)
        audit = audit_of(config)
        self.observer = RequestObserver(Metrics(self.engine), audit)
        self.template: tuple[str | None, Mapping[str, Any]] = (None, {})
        self._heads: tuple[date | None, Sequence[tuple[int, ...]]] = (None, ())
        llm.generate, llm.encode, llm.abort = self.generate, self.encode, self.abort
        llm.sidelight_guard = self

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """As vLLM's, with the outputs that the policy lets pass.

        Raises:
            RefusedError: The policy refuses the prompt, or something could not be judged.
        """
        record = current_record()
        if record is None:
            await self.engine.settled()
            record = RequestRecord(self.engine.probes)
        try:
            async with self.engine.passing(record.probes) as identity:
                number = record.begin(sampling_params.n)
                call = _Call(record, number, sampling_params, request_id, options, identity)
                async with aclosing(self._outputs(call, prompt)) as outputs:
                    async for output in outputs:
                        yield output
        except SidelightError as error:
            record.refusal = record.refusal or error
            raise RefusedError(str(error)) from error
        finally:
            record.decided.set()

    async def encode(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """As vLLM's; refused where a rule blocks, since what it reads is not judged."""
        self._require_unblocked("Poolings of a prompt")
        async with aclosing(self._encode(*args, **kwargs)) as outputs:
            async for output in outputs:
                yield output

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """As vLLM's, by the ids that callers gave."""
        ids = [request_id] if isinstance(request_id, str) else [*request_id]
        own = ids if internal else [own for given in ids for own in self._own_ids.get(given, ())]
        await self._abort(own, internal=internal)

    def _rules(self) -> Sequence[BoundRule]:
        """Those of the current request."""
        record = current_record()
        own = None if record is None else record.rules
        return self.registry.rules if own is None else own

    def _require_unblocked(self, what: str) -> None:
        if any(bound.is_blocking for bound in self._rules()):
            error = PolicyError(
                f"{what} cannot be judged, and the policy blocks what is not judged. Use "
                "/v1/chat/completions, /v1/completions or /v1/responses.",
                code="not_judged",
            )
            record = current_record()
            if record is not None:
                record.refusal = record.refusal or error
            raise RefusedError(str(error)) from error

    def require_no_beams(self) -> None:
        """Refuses beam search where a rule blocks: it takes candidates that no probe has read."""
        self._require_unblocked("Texts of a beam search")

    async def _outputs(self, call: _Call, prompt: Any) -> AsyncGenerator[Any, None]:
        params, request_id = call.params, call.request_id
        if (adapter := call.options.get("lora_request")) is not None:
            call.record.adapter = adapter.lora_name
        _require_drawable(params)
        self._require_own_words(params)
        prompt = self._tokenized(prompt)
        if not isinstance(prompt, Mapping):
            # Text that arrives while the model writes, or a request that its caller has prepared.
            self._require_unblocked("Prompts that are neither text nor token ids")
            own = self._params(params, 0, None)
            written = self._generate(prompt, own, request_id, **call.options)
            async with aclosing(written) as outputs:
                async for output in outputs:
                    yield output
            return
        encoded = await self._recognised(prompt)
        await asyncio.to_thread(self._require_readable, encoded)
        # Clients may name their requests, and two may choose the same name.
        ids = [f"{request_id}-{uuid.uuid4().hex}" for _ in range(params.n)]
        texts = [self._text(call, prompt, encoded, *each) for each in enumerate(ids)]
        self._own_ids[request_id].update(ids)
        try:
            async with aclosing(together(texts, params.output_kind)) as outputs:
                async for output in outputs:
                    output.request_id = request_id
                    yield output
        finally:
            self._own_ids[request_id].difference_update(ids)
            if not self._own_ids[request_id]:
                del self._own_ids[request_id]

    async def _text(
        self,
        call: _Call,
        prompt: Mapping[str, Any],
        encoded: EncodedPrompt | None,
        index: int,
        own_id: str,
    ) -> AsyncGenerator[Any, None]:
        """The outputs of one text that may be sent, in the form that the caller wants."""
        rules, record, place = self._rules(), call.record, (call.number, index)
        observer = record.observer or replace(self.observer, trace=Trace(request_id=own_id))
        audited = self._as_text(encoded) if observer.audit is not None else PlainText("")
        enforcement = Enforcement(
            rules,
            # The decisions on a prompt are recorded with the first of its texts.
            partial(observer.text, is_prompt_known=index > 0),
            timeout_s=self.registry.policy.timeout_s,
        )
        own = self._params(call.params, index, encoded, is_watched=bool(enforcement.watch))
        text = GuardedText(
            lambda tokens, params, id: self._generate(tokens, params, id, **call.options),
            self._listener,
            prompt,
            encoded,
            own,
            own_id,
            identity=call.identity,
            probes=[bound.probe for bound in rules],
            watch=frozenset(enforcement.watch),
            controls=self._controls,
            room=self._room,
        )
        assembly = Assembly(call.params.output_kind, own.output_kind)
        last: Any = None
        async with aclosing(enforcement.guard(audited, text.events())) as passed:
            async for each in passed:
                output = None
                match each:
                    case Admitted():
                        record.prompts[call.number] = each
                        if record.is_decided:
                            record.decided.set()
                    case Ended():
                        record.ends[call.number][index] = each
                        if each.reason == "content_filter":
                            if not assembly.has_sent:
                                record.silent.add(place)
                            last = text.cut(has_sent=assembly.has_sent)
                        output = assembly.push(last)
                    case OutputDelta() if each.is_last:
                        # Sent with the end, which follows at once.
                        last = each.output
                    case OutputDelta():
                        output = assembly.push(each.output)
                    case _:
                        raise AssertionError(each)
                if output is not None:
                    output.outputs[0].index = index
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

        own = params.clone()
        own.n = 1
        if params.n > 1 and params.seed is not None:
            own.seed = params.seed + index
        extra = dict(own.extra_args or {})
        given = extra.get("kv_transfer_params")
        # Whatever the client says that its tokens belong to.
        transfer = {k: v for k, v in given.items() if k != KEY} if isinstance(given, dict) else {}
        transfer |= {} if encoded is None else request_params(encoded)
        own.extra_args = {**extra, "kv_transfer_params": transfer}
        if is_watched:
            own.output_kind = RequestOutputKind.DELTA
            # A place is kept free, so that the last token can be judged too.
            room = max(1, self._room - len(encoded or ()))
            own.max_tokens = room if own.max_tokens is None else min(own.max_tokens, room)
            own.min_tokens = min(own.min_tokens, own.max_tokens)
        return own

    def _tokenized(self, prompt: Any) -> Any:
        """A prompt with its token ids, as vLLM's own reading of a text gives them."""
        if isinstance(prompt, list):
            return {"prompt_token_ids": prompt}
        given = {"prompt": prompt} if isinstance(prompt, str) else prompt
        if isinstance(given, Mapping) and given.keys() <= {"prompt", "cache_salt"}:
            return {**given, "prompt_token_ids": self._tokenizer(given["prompt"])["input_ids"]}
        return given

    async def _recognised(self, prompt: Mapping[str, Any]) -> EncodedPrompt | None:
        """What the tokens belong to; None: no probe can tell."""
        ids = prompt.get("prompt_token_ids")
        if ids is None or prompt.get("type", "token") != "token":
            return None
        try:
            return await asyncio.to_thread(self._encoder.recognise, ids)
        # Ids that the tokenizer does not take.
        except (OverflowError, TypeError, ValueError):
            return None

    def _require_readable(self, encoded: EncodedPrompt | None) -> None:
        """Refuses what a client can write where no blocking probe reads it.

        Raises:
            PolicyError: There is such text, or nobody can tell.
        """
        refuses_system = self.registry.policy.refuses_system_turns
        blocks_output = any(b.is_blocking and b.side == "output" for b in self._rules())
        if encoded is None and refuses_system:
            raise PolicyError(
                "The prompt is not a list of token ids, so nobody can tell whether it begins with "
                "a system turn, which the server's policy refuses. Send text without images.",
                code="system_turn_refused",
            )
        if encoded is None or encoded.is_plain:
            return
        head = unread_head(encoded)
        is_own = any(own[: len(head)] == head for own in self._own_heads())
        turns = self._encoder.chat_format.turns(encoded.token_ids)
        if refuses_system and not is_own and turns[0].role == "system":
            raise PolicyError(
                "The conversation begins with a system turn that the chat template does not write "
                "by itself: a system or developer message, tools, documents, or arguments of the "
                "template. No probe of chats reads it, so the server's policy refuses it. Leave "
                'them out. If only the operator writes them, set system_turns = "trust" in the '
                "policy.",
                code="system_turn_refused",
            )
        if blocks_output and turns[-1].role == "assistant" and turns[-1].stop == len(encoded):
            raise PolicyError(
                "The conversation ends with an answer to be continued. Probes of answers read only "
                "what the model writes, so the server's policy refuses it. End with a user's turn.",
                code="answer_continued",
            )

    def _require_own_words(self, params: Any) -> None:
        """Refuses an answer that the client words, unless a blocking probe reads it.

        Raises:
            PolicyError: It says what the answer must look like, and so what it says.
        """
        blocking = {bound.side for bound in self._rules() if bound.is_blocking}
        is_read = "output" in blocking or not blocking
        if is_read or not self.registry.policy.refuses_system_turns:
            return
        structure = params.structured_outputs
        is_worded = params.trace_decode_token_ids is not None or any(
            getattr(structure, kind, None) is not None for kind in _WORDED
        )
        if is_worded:
            raise PolicyError(
                "The request says what the answer must look like (a schema, choice, regular "
                "expression, grammar or forced call of a tool), and so what it says. The server's "
                "policy blocks prompts alone, so no probe that blocks would read these words. "
                "Leave it out, or ask for a JSON object. If only the operator writes such "
                'requests, set system_turns = "trust" in the policy, or let a rule block outputs.',
                code="answer_worded",
            )

    def _own_heads(self) -> Sequence[tuple[int, ...]]:
        """What the template writes by itself in front of the first turn, today."""
        if self._heads[0] != date.today():
            found = (self._head(role) for role in ("user", "assistant", "tool"))
            self._heads = date.today(), [head for head in found if head is not None]
        return self._heads[1]

    def _head(self, role: str) -> tuple[int, ...] | None:
        template, arguments = self.template
        turns = [{"role": role, "content": "x"}]
        try:
            text = self._tokenizer.apply_chat_template(
                turns,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                **arguments,
            )
        # Templates refuse conversations in many ways, and read fields of messages as they like.
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return None
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return unread_head(self._encoder.recognise(ids))

    def _as_text(self, encoded: EncodedPrompt | None) -> PlainText:
        """What the audit log hashes: the prompt as the model reads it."""
        return PlainText(self._tokenizer.decode(encoded.token_ids) if encoded else "")


def unread_head(prompt: EncodedPrompt) -> tuple[int, ...]:
    """The ids in front of the first token that may be read."""
    parts = takewhile(lambda part: part == Part.UNREAD, prompt.parts)
    return prompt.token_ids[: len([*parts])]


def _require_drawable(params: Any) -> None:
    """vLLM's CPU backend dies of a seeded draw if the prompt is read in more than one step.

    Raises:
        SidelightError: It would.
    """
    from vllm.platforms import current_platform

    if params.seed is not None and params.temperature > 0 and current_platform.is_cpu():
        raise SidelightError(
            "vLLM's CPU backend cannot draw with a seed. Leave 'seed' out, or set 'temperature' "
            "to 0."
        )
