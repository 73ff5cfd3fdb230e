"""A call of ``generate`` and its texts, as engine events and as filtered outputs.

vLLM is always asked to stream, regardless of the caller, and the text that has passed is
reassembled here. Only a text that no probe monitors comes in one piece.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from tokenizers.decoders import DecodeStream

from sidelight.engines.annotation import AnswerSpans, annotate_spans, labels_spans
from sidelight.engines.base import (
    Event,
    Finished,
    GenerationError,
    PromptClassified,
    ResponseScored,
    TextDelta,
)
from sidelight.models.conversation import Conversation, EncodedPrompt, PlainText, TokenRole
from sidelight.policy.enforcement import Classified, Enforcement
from sidelight.policy.hold_back import Ended, redacted_spans
from sidelight.policy.request import RequestContext, RequestResult
from sidelight.types import Span, Verdicts
from sidelight_vllm import KEY
from sidelight_vllm.engine import VllmEngine
from sidelight_vllm.outputs import TextReports, prompt_probe_names, without_report
from sidelight_vllm.requests import Report, request_params
from sidelight_vllm.settings import ProbeSet


class GuardedRequest(RequestResult):
    """A client's request and its state.

    Attributes:
        served: Probes that classify it.
        tokenless: Texts that ended before a token was sent; vLLM omits their final chunk.
        decided: Set once each prompt is admitted, one is refused, or generation has ended.
        sent: Original text of each stripped text; None if several originals map to it. Empty if
            nothing was stripped.
    """

    def __init__(self, context: RequestContext, served: ProbeSet):
        super().__init__(context)
        self.served = served
        self.tokenless: list[Enforcement] = []
        self.decided = asyncio.Event()
        self.sent: dict[str, str | None] = {}

    @property
    def cut(self) -> list[bool]:
        """Whether each text was ended by a rule, in the order of choices."""
        ends = [text.ended for text in self.choices]
        return [end is not None and end.reason == "content_filter" for end in ends]


@dataclass(frozen=True)
class OutputDelta(TextDelta):
    """A chunk of text from vLLM.

    Attributes:
        output: vLLM's ``RequestOutput`` with one text.
    """

    output: Any = None


@dataclass(frozen=True)
class Call:
    """The common data of the texts of one call of vLLM's ``generate``.

    Attributes:
        client: The client's request that it belongs to.
        texts: Policy enforcement of each text.
        prompt: Prompt in vLLM's form.
        encoded: Prompt with token roles; None if unknown.
        words: Decoded prompt as the model reads it; empty without an audit log.
        asked: Prompt for judges; None if no judge is asked.
        params: Its ``SamplingParams``.
        options: Arguments of ``AsyncLLM.generate``.
        engine: Engine that runs the texts and receives their reports.
        controls: Ids of control tokens, which are not part of a text that they end.
    """

    client: GuardedRequest
    texts: Sequence[Enforcement]
    prompt: Mapping[str, Any]
    encoded: EncodedPrompt | None
    words: PlainText
    asked: Conversation | None
    params: Any
    options: Mapping[str, Any]
    engine: VllmEngine
    controls: Collection[int]

    @property
    def prompt_tokens(self) -> int:
        return 0 if self.encoded is None else len(self.encoded)

    async def outputs(self, request_id: str, ids: Sequence[str]) -> AsyncGenerator[Any, None]:
        """The outputs of its texts that may be sent, merged as in vLLM for ``n`` above 1.

        Args:
            request_id: Id from the caller.
            ids: A unique name of each text.
        """
        from vllm.sampling_params import RequestOutputKind
        from vllm.utils.async_utils import merge_async_iterators

        texts = [TextOutputs(self, index, name).passed() for index, name in enumerate(ids)]
        left, merged, kind = len(texts), None, self.params.output_kind
        async with aclosing(merge_async_iterators(*texts)) as outputs:
            async for _, output in outputs:
                left -= output.finished
                output.finished = not left
                output.request_id = request_id
                (text,) = output.outputs
                if kind == RequestOutputKind.DELTA:
                    yield output
                    continue
                if merged is None:
                    merged = output
                else:
                    merged.add(output, aggregate=True)
                if kind == RequestOutputKind.CUMULATIVE:
                    delta = copy(merged)
                    delta.outputs = [copy(t) for t in merged.outputs if t.index == text.index]
                    yield delta
        if merged is not None and kind == RequestOutputKind.FINAL_ONLY:
            merged.outputs.sort(key=attrgetter("index"))
            yield merged


class TextEvents:
    """Runs one text in vLLM, and yields engine events.

    Args:
        call: The call that it is part of.
        index: Which of its texts.
        name: A unique name for vLLM.

    Attributes:
        first: vLLM's first output; None until then.
        token_ids: Generated token ids.
        verdicts: Latest verdicts on the response, with spans.
        answer_spans: Spans of the response; None without span probes, or if token positions are
            unknown.
        final_characters: Number of leading characters whose spans are final once the request has
            ended the text; None means all.
    """

    def __init__(self, call: Call, index: int, name: str):
        from vllm.sampling_params import RequestOutputKind

        probes = [bound.probe for bound in call.client.context.rules]
        self._call, self._id = call, name
        self._monitored = frozenset(call.texts[index].monitored)
        self._reports = TextReports(call.client.served.revision, keeps_steps=bool(self._monitored))
        self._params = params_of_text(call.params, index, call.encoded)
        if self._monitored or self._params.output_kind != RequestOutputKind.FINAL_ONLY:
            # Verdicts before the end may be all that is sent.
            self._params.output_kind = RequestOutputKind.DELTA
        if self._monitored:
            # One position is kept free, so that the last token can be classified too.
            room = max(1, call.engine.max_tokens - call.prompt_tokens)
            self._params.max_tokens = min(self._params.max_tokens or room, room)
            self._params.min_tokens = min(self._params.min_tokens, self._params.max_tokens)
            # Rules hold back text even if the caller does not want any.
            self._params.detokenize = True
        self.first: Any = None
        self.token_ids: list[int] = []
        self.verdicts = Verdicts()
        self.answer_spans: AnswerSpans | None = None
        if labels_spans(probe for probe in probes if probe.reads.includes_response):
            self.answer_spans = AnswerSpans(probes)
            self._stream = DecodeStream(
                ids=[] if call.encoded is None else [*call.encoded.token_ids],
                skip_special_tokens=call.params.skip_special_tokens,
            )
        self.final_characters: int | None = None
        self._characters = 0

    async def run(self) -> AsyncGenerator[Event, None]:
        """Yield events as in ``Engine.generate``; each text is an ``OutputDelta``."""
        call, prompt = self._call, self._reports.prompt
        written = call.engine.listener.generate(call.prompt, self._params, self._id, **call.options)
        with call.engine.listener.to(self._id, self._reports):
            async with aclosing(written) as outputs:
                # The first output may come long after the verdicts.
                first = asyncio.ensure_future(anext(outputs))
                try:
                    await asyncio.wait({first, prompt}, return_when=asyncio.FIRST_COMPLETED)
                    if not prompt.done():
                        # The request has failed, or was aborted before the prompt was read.
                        first.result()
                    report = prompt.result() if prompt.done() else Report()
                    # Spans of thousands of messages take seconds.
                    yield await asyncio.to_thread(self._prompt_classified, report)
                    output = await first
                finally:
                    first.cancel()
                    await asyncio.gather(first, return_exceptions=True)
                while output is not None:
                    async for event in self._events_of(output):
                        yield event
                    output = await anext(outputs, None)

    def _prompt_classified(self, report: Report) -> PromptClassified:
        call, probes = self._call, self._call.client.served.probes
        verdicts = report.of(prompt_probe_names(probes))
        prompt = call.encoded or EncodedPrompt((), ())
        verdicts = annotate_spans(verdicts, probes, prompt)
        return PromptClassified(verdicts, prompt, classification_s=report.seconds)

    async def _events_of(self, output: Any) -> AsyncGenerator[Event, None]:
        (text,) = output.outputs
        reason, tokens = text.finish_reason, text.token_ids
        if self._monitored and reason in ("abort", "error"):
            raise GenerationError(f"vLLM ended this request: {reason}. Try again.")
        self.first = self.first or output
        self.token_ids += tokens
        written = len(self.token_ids)
        self._note(tokens, text.text)
        # The steps that wrote these tokens.
        for step_tokens, report in self._reports.take(written if reason is None else None):
            # The newest token has not been read yet.
            if step_tokens > 1:
                yield self._score(step_tokens - 1, report)
        # No probe reads the token that ends a turn.
        is_end = reason == "stop" and not isinstance(text.stop_reason, str)
        readable = written - (is_end and bool(tokens) and tokens[-1] in self._call.controls)
        yield OutputDelta(text.text, tokens=readable, output=output)
        if reason is None:
            return
        report = self._reports.newest
        if self._monitored and max(0, self._reports.taken - 1) < readable:
            report = replace(await self._classify_text(), seconds=report.seconds)
            yield self._score(readable, report)
        is_stopped = readable == written
        if is_stopped and self.answer_spans:
            self.final_characters = self.answer_spans.final_characters(readable)
        response_probes = {
            bound.name for bound in self._call.client.context.rules if bound.side == "output"
        }
        yield Finished(
            reason="length" if reason == "length" else "stop",
            prompt_tokens=self._call.prompt_tokens,
            completion_tokens=written,
            verdicts=self._annotated(report.of(response_probes)),
            classification_s=self._classification_s(report),
            is_stopped=is_stopped,
        )

    def _note(self, tokens: Sequence[int], text: str) -> None:
        """Add new tokens and vLLM's text of them so far.

        vLLM may hold text back, or end it before the last token's text. If the text differs from
        the decoded tokens, their characters are unknown, so there are no spans.
        """
        start, self._characters = self._characters, self._characters + len(text)
        if self.answer_spans is None:
            return
        tokenizer = self._call.engine.encoder.tokenizer.backend_tokenizer
        try:
            for token in tokens:
                self.answer_spans.push(self._stream.step(tokenizer, token) or "")
        # The library raises nothing more specific for invalid bytes.
        except Exception:  # noqa: BLE001
            self.answer_spans = None
        if self.answer_spans is not None and not self.answer_spans.text.startswith(text, start):
            self.answer_spans = None

    def _score(self, tokens: int, report: Report) -> ResponseScored:
        return ResponseScored(
            tokens,
            self._annotated(report.of(self._monitored)),
            final_characters=self.answer_spans and self.answer_spans.final_characters(tokens),
            classification_s=self._classification_s(report),
        )

    def _annotated(self, verdicts: Verdicts) -> Verdicts:
        self.verdicts = self.answer_spans.annotate(verdicts) if self.answer_spans else verdicts
        return self.verdicts

    def _classification_s(self, report: Report) -> float:
        """Time of the probes after the prompt, in seconds."""
        prompt = self._reports.prompt
        return report.seconds - prompt.result().seconds if prompt.done() else 0.0

    async def _classify_text(self) -> Report:
        """Get the report on the text including its last token; the cache has all but the end."""
        call, written, prompt = self._call, tuple(self.token_ids), self._call.encoded
        if prompt is None or len(prompt) + len(written) > call.engine.max_tokens:
            return Report()
        complete = replace(
            prompt,
            token_ids=prompt.token_ids + written,
            token_roles=prompt.token_roles + (TokenRole.RESPONSE,) * len(written),
        )
        return await call.engine.listener.read_text(
            complete,
            f"{self._id}-whole",
            revision=call.client.served.revision,
            fields={k: call.prompt[k] for k in ("type", "cache_salt") if k in call.prompt},
            **call.options,
        )


class TextOutputs:
    """Filters and redacts vLLM's outputs of one text by its rules.

    Args:
        call: The call that it is part of.
        index: Which of its texts.
        name: A unique name for vLLM.
    """

    def __init__(self, call: Call, index: int, name: str):
        self._call, self._index = call, index
        self._text = TextEvents(call, index, name)
        self._redacting = [bound for bound in call.client.context.rules if bound.is_redacting]
        # Log-probabilities of an output of which nothing else was sent.
        self._prompt_logprobs: Any = None
        # With redaction: the tokens whose text is held back, the number of released tokens, and the
        # released characters.
        self._waiting = deque[tuple[int, Any]]()
        self._released = self._characters = 0
        self._has_sent_tokens = False

    async def passed(self) -> AsyncGenerator[Any, None]:
        """Yield the outputs, chunk by chunk."""
        client, last = self._call.client, None
        call = self._call
        guarded = call.texts[self._index].guard(call.words, self._text.run(), asked=call.asked)
        async with aclosing(guarded) as events:
            async for each in events:
                output = None
                match each:
                    case Classified():
                        if client.is_decided:
                            client.decided.set()
                    case Ended("content_filter"):
                        output = self._cut()
                    case Ended():
                        assert last is not None
                        output = self._sent(last)
                    case OutputDelta() if each.output.finished:
                        # Sent with the end, which follows at once.
                        last = each
                    case OutputDelta():
                        output = self._sent(each)
                    case _:
                        raise AssertionError(each)
                if output is not None:
                    yield output

    def _sent(self, delta: OutputDelta) -> Any:
        """The output for released text; None if it is empty."""
        (text,) = delta.output.outputs
        if self._redacting:
            text = self._redacted(text, delta)
        return self._joined(delta.output, text)

    def _cut(self) -> Any:
        """The final output of a text that a rule ends."""
        from vllm.outputs import CompletionOutput

        # It contains the log-probabilities of the prompt.
        output = copy(self._text.first)
        logprobs = None if output.outputs[0].logprobs is None else []
        nothing = CompletionOutput(0, "", [], None, logprobs, finish_reason="content_filter")
        output.finished = True
        return self._joined(output, nothing)

    def _joined(self, output: Any, text: Any) -> Any:
        """An output with this chunk of text; None if it is empty."""
        without_report(output)
        if self._redacting:
            # Alternatives to the prompt's tokens reveal what the model would say there.
            output.prompt_token_id_logprobs = None
            if output.prompt_logprobs:
                pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
                output.prompt_logprobs = [step and {i: step[i]} for i, step in pairs]
        text.index = self._index
        output.outputs = [text]
        self._has_sent_tokens |= bool(text.token_ids)
        is_empty = not (text.text or text.token_ids)
        if output.finished and is_empty and not self._has_sent_tokens:
            self._call.client.tokenless.append(self._call.texts[self._index])
        if is_empty and not output.finished:
            self._prompt_logprobs = self._prompt_logprobs or output.prompt_logprobs
            return None
        output.prompt_logprobs = output.prompt_logprobs or self._prompt_logprobs
        self._prompt_logprobs = None
        return output

    def _redacted(self, text: Any, delta: OutputDelta) -> Any:
        """vLLM's ``CompletionOutput``, redacted by the rules."""
        spans = redacted_spans(self._redacting, self._text.verdicts)
        steps = text.logprobs or [None] * len(text.token_ids)
        # Alternatives to a token may spell a redacted word.
        pairs = zip(text.token_ids, steps, strict=True)
        self._waiting += ((token, step and {token: step[token]}) for token, step in pairs)
        self._characters += len(text.text)
        released = [*self._release(spans, delta)]
        return replace(
            text,
            text=delta.text,
            token_ids=[token for token, _ in released],
            logprobs=None if text.logprobs is None else [step for _, step in released],
            # A stop string can probe for words in the text.
            stop_reason=None if spans else text.stop_reason,
            # The following fields describe tokens that are not sent.
            cumulative_logprob=None,
            routed_experts=None,
            sampling_mask=None,
        )

    def _release(self, spans: Sequence[Span], delta: OutputDelta) -> Iterator[tuple[int, Any]]:
        """Release the tokens up to this chunk that are outside all spans.

        At the end, tokens without text are kept only if they are control tokens, and tokens that a
        later token could have labelled are dropped; this is known before the last held-back text is
        released.
        """
        places = self._text.answer_spans.places if self._text.answer_spans else []
        final_characters = self._text.final_characters
        while self._waiting:
            place = places[self._released] if self._released < len(places) else None
            if not delta.output.finished and (place is None or place[1] > self._characters):
                return
            token = self._waiting.popleft()
            self._released += 1
            if place is None:
                stays = token[0] in self._call.controls
            else:
                stays = final_characters is None or place[1] <= final_characters
                stays &= all(span.end <= place[0] or place[1] <= span.start for span in spans)
            if stays:
                yield token


def params_of_text(params: Any, index: int, encoded: EncodedPrompt | None) -> Any:
    """A copy of ``SamplingParams`` for one text, with the roles of its prompt's tokens."""
    text_params = params.clone()
    text_params.n = 1
    if params.n > 1 and params.seed is not None:
        text_params.seed = params.seed + index
    extra = dict(text_params.extra_args or {})
    transfer = extra.get("kv_transfer_params")
    # Replaces any description from the client.
    transfer_params = (
        {k: v for k, v in transfer.items() if k != KEY} if isinstance(transfer, dict) else {}
    )
    annotation = {} if encoded is None else request_params(encoded)
    text_params.extra_args = {**extra, "kv_transfer_params": transfer_params | annotation}
    return text_params
