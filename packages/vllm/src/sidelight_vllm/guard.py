"""The policy between vLLM's engine client and its callers.

Each ``AsyncLLM`` with probes gets an ``EngineGuard`` on creation. Callers of ``generate``, such as
an HTTP route, a batch, gRPC or Ray, get outputs that have passed ``policy.enforcement``: a blocked
prompt is an error, and text is sent once it is classified. Other ways to generate text are refused.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import asyncio
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

from sidelight.engines.annotation import labels_spans
from sidelight.errors import SidelightError
from sidelight.models.control_tokens import control_tokens
from sidelight.models.conversation import Conversation, Message, PlainText
from sidelight.models.invisible import reject_disguises
from sidelight.policy.decisions import PolicyError
from sidelight.policy.enforcement import Enforcement
from sidelight.policy.request import RequestContext
from sidelight.server.config import ServerConfig
from sidelight.server.requests import ServerContext
from sidelight_vllm import KEY
from sidelight_vllm.answers import Call, GuardedRequest, params_of_text
from sidelight_vllm.engine import VllmEngine
from sidelight_vllm.internals import wrap
from sidelight_vllm.outputs import without_report
from sidelight_vllm.recogniser import PromptRecogniser, refuse_structured_outputs, require_drawable
from sidelight_vllm.settings import Served, prompt_encoder


class RefusedError(SidelightError, ValueError):
    """The error for a request that the policy refuses; vLLM responds to a ``ValueError`` with 400.

    ``endpoint`` replaces this response with that of our own server.
    """


# Engine calls in a context, and in tasks started there, belong to its request.
client_request: ContextVar[GuardedRequest | None] = ContextVar("sidelight_request", default=None)


class EngineGuard:
    """Classifies each request of one engine client, and enforces the policy.

    Args:
        llm: vLLM's ``AsyncLLM``. Its ``generate``, ``encode`` and ``abort`` are replaced.
        served: Probes in its workers.
        config: Configuration with the policy, the audit log, and the keys.

    Attributes:
        engine: Classifies texts with the same workers, for routes without generation.
        context: Context of its server.
        recogniser: Recogniser of the turns in prompts.

    Raises:
        SidelightError: The policy does not fit the probes, or the audit log cannot be written.
    """

    def __init__(self, llm: Any, served: Served, config: ServerConfig):
        from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
        from vllm.renderers import BaseRenderer

        self._encode, self._abort = llm.encode, llm.abort
        self._text_ids: dict[str, set[str]] = defaultdict(set)
        loaded, names = served.load(), llm.vllm_config.model_config.served_model_name
        self.engine = VllmEngine(
            llm,
            loaded,
            name=names if isinstance(names, str) else names[0],
            encoder=prompt_encoder(llm.vllm_config, loaded.probes),
            fingerprint=served.fingerprint,
        )
        self.recogniser = PromptRecogniser(self.engine.encoder)
        self._tokenizer = self.engine.encoder.tokenizer
        self._controls = control_tokens(self._tokenizer).keys()
        folders = {"probe": tuple(map(Path, served.folders))}
        self.context = ServerContext(self.engine, config.model_copy(update=folders))
        llm.generate, llm.encode, llm.abort = self.generate, self.encode, self.abort
        llm.sidelight_guard = self
        # Whatever calls them.
        wrap(BeamSearchOnlineMixin, "beam_search", _search_beams)
        wrap(BaseRenderer, "render_chat_async", _render_chats)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """As vLLM's method, with the outputs that the policy allows.

        Raises:
            RefusedError: The policy refuses the prompt, or something could not be classified.
        """
        client = client_request.get()
        try:
            async with self.engine.serving(client.served if client else None) as served:
                if client is None:
                    observer = self.context.observer.of(_unique(request_id))
                    client = GuardedRequest(
                        self.context.request_context(observer, for_text=True), served
                    )
                # Before anything is awaited, so that prompts are in the order of their calls.
                texts = client.begin(sampling_params.n)
                written = self._outputs(prompt, client, texts, sampling_params, request_id, options)
                async with aclosing(written) as outputs:
                    async for output in outputs:
                        yield output
        except SidelightError as error:
            if client is not None:
                client.refusal = client.refusal or error
            raise RefusedError(str(error)) from error
        finally:
            if client is not None:
                client.decided.set()

    async def encode(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """As vLLM's method; refused if a rule blocks, because no probe reads the text."""
        self.require_unblocked("Poolings of a prompt")
        async with aclosing(self._encode(*args, **kwargs)) as outputs:
            async for output in outputs:
                yield output

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """As vLLM's method, with the ids from callers."""
        ids = [request_id] if isinstance(request_id, str) else [*request_id]
        if not internal:
            ids = [text_id for name in ids for text_id in self._text_ids.get(name, ())]
        await self._abort(ids, internal=internal)

    def require_unblocked(self, what: str) -> None:
        """Refuse what no probe reads if a rule blocks or redacts."""
        client = client_request.get()
        rules = self.context.registry.rules if client is None else client.context.rules
        if any(bound.is_enforced for bound in rules):
            error = PolicyError(
                f"{what} cannot be classified, and the policy blocks text without a verdict. Use "
                "/v1/chat/completions, /v1/completions or /v1/responses.",
                code="not_classified",
            )
            if client is not None:
                client.refusal = client.refusal or error
            raise RefusedError(str(error)) from error

    async def _outputs(
        self,
        prompt: Any,
        client: GuardedRequest,
        texts: Sequence[Enforcement],
        params: Any,
        request_id: str,
        options: Mapping[str, Any],
    ) -> AsyncGenerator[Any, None]:
        if (adapter := options.get("lora_request")) is not None:
            client.adapter = adapter.lora_name
        require_drawable(params)
        refuse_structured_outputs(params, client.context)
        if isinstance(prompt, list):
            prompt = {"prompt_token_ids": prompt}
        elif isinstance(prompt, str):
            prompt = {"prompt": prompt}
        if not isinstance(prompt, Mapping):
            # Text that arrives during generation, or a request prepared by its caller.
            self.require_unblocked("Prompts that are neither text nor token ids")
            self._reject_disguises({}, client.context)
            call_params = params_of_text(params, 0, None)
            written = self.engine.listener.generate(prompt, call_params, request_id, **options)
            async with aclosing(written) as outputs:
                async for output in outputs:
                    yield without_report(output)
            return
        call = await self._call(prompt, client, texts, params, options)
        ids = [_unique(request_id) for _ in texts]
        self._text_ids[request_id].update(ids)
        try:
            async with aclosing(call.outputs(request_id, ids)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            self._text_ids[request_id].difference_update(ids)
            if not self._text_ids[request_id]:
                del self._text_ids[request_id]

    async def _call(
        self,
        prompt: Mapping[str, Any],
        client: GuardedRequest,
        texts: Sequence[Enforcement],
        params: Any,
        options: Mapping[str, Any],
    ) -> Call:
        """The call for a prompt, which may be answered once blocking probes have read it."""
        if prompt.keys() <= {"prompt", "cache_salt"}:
            # As vLLM's own reading of a text gives them.
            prompt = {**prompt, "prompt_token_ids": self._tokenizer(prompt["prompt"])["input_ids"]}
        is_labelled = labels_spans(p for p in client.served.probes if not p.reads.includes_response)
        messages = prompt.get(KEY)
        prompt = {name: value for name, value in prompt.items() if name != KEY}
        await asyncio.to_thread(self._reject_disguises, prompt, client.context)
        encoded = await asyncio.to_thread(
            self.recogniser.recognise, prompt, messages, with_places=is_labelled
        )
        if encoded is not None and client.sent:
            sent = [client.sent.get(text) if text else "" for text in encoded.texts]
            if None in sent:
                # Without the original text, span offsets would be wrong.
                encoded = replace(encoded, texts=(), places=())
            else:
                encoded = encoded.read_from([Message("", text or "") for text in sent])
        await asyncio.to_thread(self.recogniser.require_read, encoded, client.context)
        words = ""
        if encoded is not None and self.context.observer.audit is not None:
            # The audit log hashes the prompt as the model reads it.
            words = self._tokenizer.decode(encoded.token_ids)
        return Call(
            client,
            texts,
            prompt,
            encoded,
            words=PlainText(words),
            asked=self._asked(prompt, messages, client),
            params=params,
            options=options,
            engine=self.engine,
            controls=self._controls,
        )

    def _asked(
        self,
        prompt: Mapping[str, Any],
        messages: Sequence[Message] | None,
        client: GuardedRequest,
    ) -> Conversation | None:
        """The prompt for judges: its messages, or else its text."""
        if client.context.judges is None:
            return None
        if messages:
            sent = client.sent
            # Spans refer to the texts as sent.
            return [
                replace(turn, content=sent.get(turn.content) or turn.content) for turn in messages
            ]
        text = prompt.get("prompt")
        ids = prompt["prompt_token_ids"]
        return PlainText(text if isinstance(text, str) else self._tokenizer.decode(ids))

    def _reject_disguises(self, prompt: Mapping[str, Any], context: RequestContext) -> None:
        """Check a prompt after ``endpoint`` has stripped the body, if the request has one.

        Raises:
            DisguisedTextError: The prompt still contains invisible characters.
            PolicyError: The prompt has no token ids to check.
        """
        invisible = context.policy.invisible_characters
        if invisible == "off":
            return
        ids = prompt.get("prompt_token_ids")
        if ids is None:
            raise PolicyError(
                "The prompt has no token ids, so it cannot be checked for invisible characters, "
                "which the server's policy strips or refuses. Send text.",
                code="not_classified",
            )
        reject_disguises(self._tokenizer.decode(ids), invisible, can_strip=False)


def _search_beams(original: Callable[..., Any], serving: Any, *args: Any, **kwargs: Any) -> Any:
    guard = getattr(serving.engine_client, "sidelight_guard", None)
    if guard is not None:
        # Beam search uses candidates that no probe has read.
        guard.require_unblocked("Texts of a beam search")
    return original(serving, *args, **kwargs)


async def _render_chats(
    original: Callable[..., Any], renderer: Any, *args: Any, **kwargs: Any
) -> Any:
    """As vLLM's method, but prompts of every route keep their original messages."""
    conversations, prompts = await original(renderer, *args, **kwargs)
    for turns, prompt in zip(conversations, prompts, strict=True):
        prompt[KEY] = [Message(turn["role"], str(turn.get("content") or "")) for turn in turns]
    return conversations, prompts


def _unique(request_id: str) -> str:
    """A unique id, because two clients may choose the same name."""
    return f"{request_id}-{uuid.uuid4().hex}"
