"""One call of ``generate``, and each of its texts: as events of an engine, and what may be sent.

vLLM is asked for pieces of a text, whatever the caller wants, and what has passed is put together
here. Only a whole text that nobody watches comes in one piece.
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

from sidelight.engines.base import (
    Event,
    Finished,
    GenerationError,
    PromptJudged,
    ResponseScored,
    TextDelta,
)
from sidelight.engines.marks import AnswerSpans, labels_spans, mark_text
from sidelight.policy.enforcement import Enforcement, Judged
from sidelight.policy.hold_back import Ended, redacted_spans
from sidelight.policy.request import Outcome, Terms
from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt, Part, PlainText
from sidelight.types import Judgement, Span
from sidelight.vllm.engine import VllmEngine
from sidelight.vllm.outputs import early_names, without_report
from sidelight.vllm.requests import judgement_of, request_params
from sidelight.vllm.settings import KEY


class GuardedRequest(Outcome):
    """One client's request, and what has come of it.

    Attributes:
        probes: Those that were served when it was made.
        tokenless: The texts that end without a token, whose end vLLM leaves out of its streams.
        decided: Set once each prompt is answered, or one is refused, or nothing more is written.
    """

    def __init__(self, terms: Terms, probes: tuple[Probe, ...]):
        super().__init__(terms)
        self.probes = probes
        self.tokenless: list[Enforcement] = []
        self.decided = asyncio.Event()

    @property
    def cut(self) -> list[bool]:
        """Whether each text was cut, in the order of choices."""
        ends = [text.ended for text in self.choices]
        return [end is not None and end.reason == "content_filter" for end in ends]


@dataclass(frozen=True)
class OutputDelta(TextDelta):
    """A piece of text as vLLM has written it.

    Attributes:
        output: vLLM's ``RequestOutput``, with one text in it.
        characters: How many the text has with it.
    """

    output: Any = None
    characters: int = 0


@dataclass(frozen=True)
class Call:
    """One call of vLLM's ``generate``: what its texts have in common.

    Attributes:
        client: Whose request it is part of.
        texts: What enforces the policy on each of its texts.
        prompt: As vLLM takes it.
        encoded: What its tokens belong to; None: unknown.
        words: The prompt as the model reads it; empty if nobody audits it.
        params: Its ``SamplingParams``.
        options: As ``AsyncLLM.generate`` takes them.
        identity: That of the probes which judge it.
        engine: Runs the texts, hears the reports of their steps, and knows the tokenizer.
        controls: Ids of control tokens, which are no part of a text where they end it.
    """

    client: GuardedRequest
    texts: Sequence[Enforcement]
    prompt: Mapping[str, Any]
    encoded: EncodedPrompt | None
    words: PlainText
    params: Any
    options: Mapping[str, Any]
    identity: str
    engine: VllmEngine
    controls: Collection[int]

    async def outputs(self, request_id: str, ids: Sequence[str]) -> AsyncGenerator[Any, None]:
        """The outputs of its texts that may be sent, merged as vLLM merges ``n`` over 1.

        Args:
            request_id: The caller's name for it.
            ids: A unique name of each text.
        """
        from vllm.sampling_params import RequestOutputKind
        from vllm.utils.async_utils import merge_async_iterators

        texts = [GuardedText(self, index, name).outputs() for index, name in enumerate(ids)]
        left, whole, kind = len(texts), None, self.params.output_kind
        async with aclosing(merge_async_iterators(*texts)) as outputs:
            async for _, output in outputs:
                left -= output.finished
                output.finished = not left
                output.request_id = request_id
                (piece,) = output.outputs
                if kind == RequestOutputKind.DELTA:
                    yield output
                    continue
                if whole is None:
                    whole = output
                else:
                    whole.add(output, aggregate=True)
                if kind == RequestOutputKind.CUMULATIVE:
                    shown = copy(whole)
                    shown.outputs = [copy(t) for t in whole.outputs if t.index == piece.index]
                    yield shown
        if whole is not None and kind == RequestOutputKind.FINAL_ONLY:
            whole.outputs.sort(key=attrgetter("index"))
            yield whole


class GuardedText:
    """One text of a call.

    Args:
        call: The call.
        index: Which of its texts.
        name: A unique name for vLLM.
    """

    def __init__(self, call: Call, index: int, name: str):
        from vllm.sampling_params import RequestOutputKind

        self._call, self._index, self._id = call, index, name
        self._enforcement = call.texts[index]
        self._watch = frozenset(self._enforcement.watch)
        self._rules = call.client.terms.rules
        self._is_redacting = any(bound.is_redacting for bound in self._rules)
        probes = [bound.probe for bound in self._rules]
        self._early = early_names(probes)
        self._late = frozenset(probe.name for probe in probes) - self._early
        self._prompt_tokens = 0 if call.encoded is None else len(call.encoded)
        self._params = own_params(call.params, index, call.encoded)
        if self._watch or self._params.output_kind != RequestOutputKind.FINAL_ONLY:
            # What is judged before the end may be all that is sent.
            self._params.output_kind = RequestOutputKind.DELTA
        if self._watch:
            # A place is kept free, so that the last token can be judged too.
            room = max(1, call.engine.max_tokens - self._prompt_tokens)
            self._params.max_tokens = min(self._params.max_tokens or room, room)
            self._params.min_tokens = min(self._params.min_tokens, self._params.max_tokens)
            # Text is what rules hold back, whether or not the caller wants any.
            self._params.detokenize = True
        self._judgement = Judgement()
        self._marks: AnswerSpans | None = None
        if labels_spans(probe for probe in probes if probe.name in self._late):
            self._marks = AnswerSpans(probes)
            self._stream = DecodeStream(
                ids=[] if call.encoded is None else [*call.encoded.token_ids],
                skip_special_tokens=call.params.skip_special_tokens,
            )
        # The newest report, and, if a probe is watched, those of steps to be scored, with how many
        # tokens each has written.
        self._newest: Mapping[str, Any] | None = None
        self._steps = deque[tuple[int, Mapping[str, Any]]]()
        self._written: list[int] = []
        self._characters = self._heard = self._scored = 0
        # Characters that keep their spans, whatever follows; None: all of them.
        self._settled: int | None = None
        self._prompt_s = self._judging_s = 0.0
        self._first: Any = None
        # Those of an output of which nothing else was sent.
        self._prompt_logprobs: Any = None
        # Where words are redacted: tokens whose text is held back, and how many were not.
        self._waiting = deque[tuple[int, Any]]()
        self._released = 0
        self._has_sent_tokens = False

    async def outputs(self) -> AsyncGenerator[Any, None]:
        """The outputs of it that may be sent, piece by piece."""
        client, last = self._call.client, None
        guarded = self._enforcement.guard(self._call.words, self.events())
        async with aclosing(guarded) as passed:
            async for each in passed:
                output = None
                match each:
                    case Judged():
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

    async def events(self) -> AsyncGenerator[Event, None]:
        """As those of ``Engine.generate``; each text is an ``OutputDelta``."""
        call, is_judged = self._call, asyncio.get_running_loop().create_future()

        def hear(tokens: int, report: Mapping[str, Any]) -> None:
            self._newest = report
            if self._watch:
                self._steps.append((tokens, report))
            if not is_judged.done():
                is_judged.set_result(report)

        written = call.engine.listener.generate(call.prompt, self._params, self._id, **call.options)
        with call.engine.listener.to(self._id, call.identity, hear):
            async with aclosing(written) as outputs:
                # The first output may come long after the verdicts.
                first = asyncio.ensure_future(anext(outputs))
                try:
                    await asyncio.wait({first, is_judged}, return_when=asyncio.FIRST_COMPLETED)
                    if not is_judged.done():
                        # It has failed, or was aborted before the prompt was read.
                        first.result()
                    yield self._prompt_judged(is_judged.result() if is_judged.done() else None)
                    output = await first
                finally:
                    first.cancel()
                    await asyncio.gather(first, return_exceptions=True)
                while output is not None:
                    async for event in self._events_of(output):
                        yield event
                    output = await anext(outputs, None)

    def _sent(self, delta: OutputDelta) -> Any:
        """The output to send of text that has passed; None: there is nothing in it."""
        (piece,) = delta.output.outputs
        if self._is_redacting:
            piece = self._redacted(piece, delta)
        return self._joined(delta.output, piece)

    def _cut(self) -> Any:
        """The output with which the text ends where it is cut."""
        from vllm.outputs import CompletionOutput

        logprobs = None if self._first.outputs[0].logprobs is None else []
        nothing = CompletionOutput(0, "", [], None, logprobs, finish_reason="content_filter")
        # It has the log-probabilities of the prompt.
        output = copy(self._first)
        output.finished = True
        return self._joined(output, nothing)

    def _joined(self, output: Any, piece: Any) -> Any:
        """An output with this piece of the text; None: there is nothing in it."""
        piece.index = self._index
        output.outputs = [piece]
        self._has_sent_tokens |= bool(piece.token_ids)
        is_empty = not (piece.text or piece.token_ids)
        if output.finished and is_empty and not self._has_sent_tokens:
            self._call.client.tokenless.append(self._enforcement)
        if is_empty and not output.finished:
            self._prompt_logprobs = self._prompt_logprobs or output.prompt_logprobs
            return None
        output.prompt_logprobs = output.prompt_logprobs or self._prompt_logprobs
        self._prompt_logprobs = None
        return output

    def _redacted(self, piece: Any, delta: OutputDelta) -> Any:
        """vLLM's ``CompletionOutput``, with what the rules leave of it."""
        spans = redacted_spans(self._rules, self._judgement)
        steps = piece.logprobs or [None] * len(piece.token_ids)
        # Alternatives of a token may spell a word that is redacted.
        pairs = zip(piece.token_ids, steps, strict=True)
        self._waiting += ((token, step and {token: step[token]}) for token, step in pairs)
        kept = [*self._release(spans, None if delta.output.finished else delta.characters)]
        return replace(
            piece,
            text=delta.text,
            token_ids=[token for token, _ in kept],
            logprobs=None if piece.logprobs is None else [step for _, step in kept],
            # A client asks by a stop for words that the text may have.
            stop_reason=None if spans else piece.stop_reason,
            # What follows tells of tokens that are not sent.
            cumulative_logprob=None,
            routed_experts=None,
            sampling_mask=None,
        )

    def _release(self, spans: Sequence[Span], characters: int | None) -> Iterator[tuple[int, Any]]:
        """The tokens within the first characters that are in no span.

        At the end, where ``characters`` is None, those without a text stay only if they control,
        and no others that a later token could have labelled.
        """
        places = self._marks.places if self._marks else []
        while self._waiting:
            place = places[self._released] if self._released < len(places) else None
            if characters is not None and (place is None or place[1] > characters):
                return
            token = self._waiting.popleft()
            self._released += 1
            if place is None:
                stays = token[0] in self._call.controls
            else:
                stays = self._settled is None or place[1] <= self._settled
                stays &= all(span.end <= place[0] or place[1] <= span.start for span in spans)
            if stays:
                yield token

    def _prompt_judged(self, report: Mapping[str, Any] | None) -> PromptJudged:
        judgement, self._prompt_s = _judged_by(report)
        judgement = judgement.of(self._early)
        encoded = self._call.encoded
        return PromptJudged(
            mark_text(judgement, self._call.client.probes, encoded or EncodedPrompt((), ())),
            is_plain=encoded is not None and encoded.is_plain,
            tokens=self._prompt_tokens,
            judging_s=self._prompt_s,
        )

    async def _events_of(self, output: Any) -> AsyncGenerator[Event, None]:
        (piece,) = output.outputs
        reason, tokens = piece.finish_reason, piece.token_ids
        if self._watch and reason in ("abort", "error"):
            raise GenerationError(f"vLLM ended this request: {reason}. Retry.")
        self._first = self._first or output
        without_report(output)
        if self._is_redacting:
            # Alternatives of the prompt's tokens tell what the model would say there.
            output.prompt_token_id_logprobs = None
            if output.prompt_logprobs:
                pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
                output.prompt_logprobs = [step and {i: step[i]} for i, step in pairs]
        self._written += tokens
        written = len(self._written)
        self._note(tokens, piece.text)
        # The steps that wrote these tokens; the last one may have written none.
        while self._steps and (self._heard < written or reason is not None):
            step_tokens, report = self._steps.popleft()
            self._heard += step_tokens
            # The newest token has not been read yet.
            if step_tokens and self._heard > 1:
                yield self._score(self._heard - 1, self._judged(report))
        # No probe reads the token that ends a turn.
        is_end = reason == "stop" and not isinstance(piece.stop_reason, str)
        readable = written - (is_end and bool(tokens) and tokens[-1] in self._call.controls)
        yield OutputDelta(
            piece.text,
            tokens=readable,
            output=output,
            characters=self._characters,
        )
        if reason is None:
            return
        judgement = self._judged(self._newest)
        if self._watch and self._scored < readable:
            judgement = await self._judged_whole()
            yield self._score(readable, judgement)
        is_stopped = readable == written
        if is_stopped and self._marks:
            self._settled = self._marks.settled(readable)
        yield Finished(
            reason="length" if reason == "length" else "stop",
            prompt_tokens=self._prompt_tokens,
            completion_tokens=written,
            judgement=self._marked(judgement.of(self._late)),
            judging_s=self._judging_s,
            is_stopped=is_stopped,
        )

    def _note(self, tokens: Sequence[int], text: str) -> None:
        """Takes new tokens, and the text that vLLM has made of them so far.

        vLLM may hold text back, or end it before that of its tokens ends. Where it says something
        else than its tokens, nobody knows which words they stand for, so there are no spans.
        """
        start, self._characters = self._characters, self._characters + len(text)
        if self._marks is None:
            return
        tokenizer = self._call.engine.encoder.tokenizer.backend_tokenizer
        try:
            for token in tokens:
                self._marks.push(self._stream.step(tokenizer, token) or "")
        # The library raises nothing more specific for bytes that are no text.
        except Exception:  # noqa: BLE001
            self._marks = None
        if self._marks is not None and not self._marks.text.startswith(text, start):
            self._marks = None

    def _marked(self, judgement: Judgement) -> Judgement:
        self._judgement = self._marks.mark(judgement) if self._marks else judgement
        return self._judgement

    def _judged(self, report: Mapping[str, Any] | None) -> Judgement:
        judgement, seconds = _judged_by(report)
        self._judging_s = seconds - self._prompt_s
        return judgement

    def _score(self, tokens: int, judgement: Judgement) -> ResponseScored:
        self._scored = tokens
        return ResponseScored(
            tokens,
            self._marked(judgement.of(self._watch)),
            settled=self._marks and self._marks.settled(tokens),
            judging_s=self._judging_s,
        )

    async def _judged_whole(self) -> Judgement:
        """The judgement of the text with its last token; the cache has all but the end."""
        call, written, prompt = self._call, tuple(self._written), self._call.encoded
        if prompt is None or len(prompt) + len(written) > call.engine.max_tokens:
            return Judgement()
        whole = replace(
            prompt,
            token_ids=prompt.token_ids + written,
            parts=prompt.parts + (Part.RESPONSE,) * len(written),
        )
        report = await call.engine.listener.read_whole(
            whole,
            f"{self._id}-whole",
            identity=call.identity,
            fields={k: call.prompt[k] for k in ("type", "cache_salt") if k in call.prompt},
            **call.options,
        )
        return _judged_by(report)[0]


def _judged_by(report: Mapping[str, Any] | None) -> tuple[Judgement, float]:
    """As ``judgement_of``; without verdicts, no probe has said anything."""
    try:
        return judgement_of(report)
    except GenerationError:
        return Judgement(), 0.0


def own_params(params: Any, index: int, encoded: EncodedPrompt | None) -> Any:
    """A copy of ``SamplingParams`` for one text, with what its prompt's tokens belong to."""
    own = params.clone()
    own.n = 1
    if params.n > 1 and params.seed is not None:
        own.seed = params.seed + index
    extra = dict(own.extra_args or {})
    transfer = extra.get("kv_transfer_params")
    # Whatever the client says that its tokens belong to.
    kept = {k: v for k, v in transfer.items() if k != KEY} if isinstance(transfer, dict) else {}
    described = {} if encoded is None else request_params(encoded)
    own.extra_args = {**extra, "kv_transfer_params": kept | described}
    return own
