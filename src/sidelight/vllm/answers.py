"""One answer in vLLM: its outputs as the events of an engine, and those that may be sent of it."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, replace
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
from sidelight.engines.marks import AnswerMarks, labels_spans
from sidelight.engines.text import Marker
from sidelight.policy.hold_back import redacted_spans
from sidelight.policy.rules import BoundRule
from sidelight.prompts import EncodedPrompt, Part
from sidelight.types import Judgement, Span
from sidelight.vllm.outputs import OutputListener, StepReport, early_names, without_report


@dataclass(frozen=True)
class OutputDelta(TextDelta):
    """A piece of text as vLLM has written it.

    Attributes:
        output: vLLM's ``RequestOutput``, with one text in it.
        characters: How many the text has with it.
        is_last: Whether the text ends with it.
    """

    output: Any = None
    characters: int = 0
    is_last: bool = False


class TokenQueue:
    """Tokens of an answer that wait until their text is sent: vLLM gives some before it.

    Each has its id and vLLM's log-probabilities.

    Args:
        controls: Ids of control tokens.

    Attributes:
        count: How many have ever waited.
    """

    def __init__(self, controls: Collection[int]):
        self._controls = controls
        self._waiting = deque[tuple[int, Any]]()
        self.count = 0

    def push(self, ids: Sequence[int], logprobs: Sequence[Any] | None) -> None:
        """More tokens. Their alternatives are left out: they may spell a word that is redacted."""
        steps = [None] * len(ids) if logprobs is None else logprobs
        self._waiting += ((i, step and {i: step[i]}) for i, step in zip(ids, steps, strict=True))
        self.count += len(ids)

    def release(
        self, places: Sequence[tuple[int, int]], spans: Sequence[Span], characters: int | None
    ) -> list[tuple[int, Any]]:
        """The tokens within the first characters that are in no span.

        Args:
            places: Where each token stands that has a text.
            spans: What is redacted.
            characters: None at the end: then control tokens without a text stay, and no others.
        """
        released: list[tuple[int, Any]] = []
        while self._waiting:
            number = self.count - len(self._waiting)
            place = places[number] if number < len(places) else None
            if characters is not None and (place is None or place[1] > characters):
                break
            token = self._waiting.popleft()
            if place is None:
                stays = token[0] in self._controls
            else:
                stays = all(span.end <= place[0] or place[1] <= span.start for span in spans)
            if stays:
                released.append(token)
        return released


class GuardedText:
    """One request in vLLM, of one text.

    Args:
        listener: Hears the reports of its steps, and runs it.
        prompt: As vLLM takes it.
        encoded: What its tokens belong to; None: unknown.
        params: Its ``SamplingParams``. If a probe is watched, not for the final output alone.
        request_id: Unique.
        options: As ``AsyncLLM.generate`` takes them.
        identity: That of the probes which judge it.
        rules: Those of all probes.
        watch: Names of the probes that are read after every token.
        tokenizer: The model's.
        controls: Ids of control tokens, which are no part of a text where they end it.
        room: Most tokens of a text that is judged whole.
        mark: Gives a judgement of the prompt its spans; None: nobody knows what it says.

    Attributes:
        is_silent: Whether vLLM leaves out the end of its stream: no token was sent.
    """

    def __init__(
        self,
        listener: OutputListener,
        prompt: Any,
        encoded: EncodedPrompt | None,
        params: Any,
        request_id: str,
        *,
        options: Mapping[str, Any],
        identity: str,
        rules: Sequence[BoundRule],
        watch: Collection[str],
        tokenizer: Any,
        controls: Collection[int],
        room: int,
        mark: Marker | None = None,
    ):
        probes = [bound.probe for bound in rules]
        self._listener, self._options = listener, options
        self._prompt, self._encoded = prompt, encoded
        self._prompt_tokens = 0 if encoded is None else len(encoded)
        self._params, self._id, self._identity = params, request_id, identity
        self._is_delta = params.output_kind.name == "DELTA"
        self._early = early_names(probes)
        self._late = frozenset(probe.name for probe in probes) - self._early
        self._watch, self._controls, self._room = watch, controls, room
        self._mark = mark
        self._rules = rules
        self._is_redacting = any(bound.is_redacting for bound in rules)
        self._judgement = Judgement()
        self._marks: AnswerMarks | None = None
        if labels_spans(probe for probe in probes if probe.name in self._late):
            self._marks = AnswerMarks(probes)
            self._tokenizer = tokenizer.backend_tokenizer
            self._stream = DecodeStream(
                ids=[] if encoded is None else [*encoded.token_ids],
                skip_special_tokens=params.skip_special_tokens,
            )
        # Of the steps: the first, the newest, and, if a probe is watched, those to be scored.
        self._first_step: StepReport | None = None
        self._newest_step: StepReport | None = None
        self._steps = deque[StepReport]()
        self._written: list[int] = []
        self._read = self._heard = self._scored = 0
        self._prompt_s = self._judging_s = 0.0
        # Of the outputs: the first, the newest, and the last that was sent, with its text.
        self._first: Any = None
        self._newest: Any = None
        self._sent: Any = None
        self._text = ""
        self._characters = 0
        # Where words are redacted: the tokens of the last output that was sent.
        self._tokens = TokenQueue(controls)
        self._kept: list[tuple[int, Any]] = []
        self._has_sent_tokens = False
        self.is_silent = True

    async def events(self) -> AsyncGenerator[Event, None]:
        """As those of ``Engine.generate``; each text is an ``OutputDelta``."""
        is_judged = asyncio.get_running_loop().create_future()

        def hear(step: StepReport) -> None:
            self._newest_step = step
            if self._watch:
                self._steps.append(step)
            if self._first_step is None:
                self._first_step = step
                is_judged.set_result(None)

        written = self._listener.generate(self._prompt, self._params, self._id, **self._options)
        with self._listener.to(self._id, self._identity, hear):
            async with aclosing(written) as outputs:
                # The first output may come long after the verdicts.
                first = asyncio.ensure_future(anext(outputs))
                try:
                    await asyncio.wait({first, is_judged}, return_when=asyncio.FIRST_COMPLETED)
                    if self._first_step is None:
                        # It has failed, or was aborted before the prompt was read.
                        first.result()
                    yield self._prompt_judged()
                    output = await first
                finally:
                    first.cancel()
                    await asyncio.gather(first, return_exceptions=True)
                async for event in self._events_of(output):
                    yield event
                async for output in outputs:
                    async for event in self._events_of(output):
                        yield event

    def sent(self, delta: OutputDelta) -> Any:
        """The output to send of text that has passed; None: there is nothing in it."""
        output = delta.output
        (text,) = output.outputs
        if not self._is_delta:
            self._text += delta.text
        # vLLM adds to the same lists what has not been judged.
        tokens = None if self._is_delta or output.finished else delta.tokens
        if self._is_redacting:
            text = self._redacted(text, delta, tokens)
            if not (text.text or text.token_ids or output.finished):
                return None
        elif self._watch and not self._is_delta:
            logprobs = None if text.logprobs is None else text.logprobs[:tokens]
            ids = [*text.token_ids[:tokens]]
            text = replace(text, text=self._text, token_ids=ids, logprobs=logprobs)
        output.outputs = [text]
        self._has_sent_tokens |= bool(text.token_ids)
        self.is_silent = not (self._has_sent_tokens or text.text)
        self._sent = output
        return output

    def _redacted(self, text: Any, delta: OutputDelta, tokens: int | None) -> Any:
        """vLLM's ``CompletionOutput``, with what the rules leave of so many tokens."""
        spans = redacted_spans(self._rules, self._judgement)
        first = 0 if self._is_delta else self._tokens.count
        logprobs = None if text.logprobs is None else text.logprobs[first:tokens]
        self._tokens.push(text.token_ids[first:tokens], logprobs)
        if self._is_delta:
            self._kept.clear()
        self._kept += self._tokens.release(
            self._marks.places if self._marks else (),
            spans,
            None if delta.is_last else delta.characters,
        )
        return replace(
            text,
            text=delta.text if self._is_delta else self._text,
            token_ids=[token for token, _ in self._kept],
            logprobs=None if text.logprobs is None else [step for _, step in self._kept],
            # A client asks by a stop for words that the text may have.
            stop_reason=None if spans else text.stop_reason,
            # What follows tells of tokens that are not sent.
            cumulative_logprob=None,
            routed_experts=None,
            sampling_mask=None,
        )

    def cut(self) -> Any:
        """The output with which the text ends where it is cut."""
        from vllm.outputs import CompletionOutput

        if self._sent is not None and not self._is_delta:
            output = copy(self._sent)
            (text,) = output.outputs
            output.outputs = [replace(text, finish_reason="content_filter")]
        else:
            self.is_silent = not self._has_sent_tokens
            output = copy(self._newest)
            logprobs = None if output.outputs[0].logprobs is None else []
            nothing = CompletionOutput(0, "", [], None, logprobs, finish_reason="content_filter")
            output.outputs = [nothing]
            if self._sent is None:
                # They are the prompt's.
                output.prompt_logprobs = self._first.prompt_logprobs
        output.finished = True
        return output

    def _prompt_judged(self) -> PromptJudged:
        judgement = Judgement()
        if self._first_step is not None:
            judgement, self._prompt_s = self._first_step.judged()
        judgement = judgement.of(self._early)
        return PromptJudged(
            self._mark(judgement) if self._mark else judgement,
            is_plain=self._encoded is not None and self._encoded.is_plain,
            tokens=self._prompt_tokens,
            judging_s=self._prompt_s,
        )

    async def _events_of(self, output: Any) -> AsyncGenerator[Event, None]:
        (completion,) = output.outputs
        reason, tokens = completion.finish_reason, completion.token_ids
        if self._watch and reason in ("abort", "error"):
            raise GenerationError(f"vLLM ended this request: {reason}. Retry.")
        self._first, self._newest = self._first or output, output
        without_report(output)
        if self._is_redacting:
            # Alternatives of the prompt's tokens tell what the model would say there.
            output.prompt_token_id_logprobs = None
            if output.prompt_logprobs:
                pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
                output.prompt_logprobs = [step and {i: step[i]} for i, step in pairs]
        text, before = completion.text, self._read
        if self._is_delta:
            self._written += tokens
        else:
            self._written = tokens
            text = text[self._characters :]
            if self._watch:
                # Many outputs may be held back, so none of them keeps the text before its own.
                completion.text = ""
        written = self._read = len(self._written)
        self._note(self._written[before:written], text)
        # The steps that wrote these tokens; the last one may have written none.
        while self._steps and (self._heard < written or reason is not None):
            step = self._steps.popleft()
            self._heard += step.tokens
            # The newest token has not been read yet.
            if step.tokens and self._heard > 1:
                yield self._score(self._heard - 1, self._judged(step))
        # No probe reads the token that ends a turn, which may be in vLLM's list before the end.
        is_end = reason == "stop" and not isinstance(completion.stop_reason, str)
        may_end = is_end or (reason is None and not self._is_delta)
        readable = written - (may_end and bool(tokens) and tokens[-1] in self._controls)
        yield OutputDelta(
            text,
            tokens=readable,
            output=output,
            characters=self._characters,
            is_last=reason is not None,
        )
        if reason is None:
            return
        judgement = self._judged(self._newest_step)
        if self._watch and self._scored < readable:
            judgement = await self._whole()
            yield self._score(readable, judgement)
        yield Finished(
            reason="length" if reason == "length" else "stop",
            prompt_tokens=self._prompt_tokens,
            completion_tokens=written,
            judgement=self._marked(judgement.of(self._late)),
            judging_s=self._judging_s,
        )

    def _note(self, tokens: Sequence[int], text: str) -> None:
        """Takes new tokens, and the text that vLLM has made of them so far.

        vLLM may hold text back, or end it before that of its tokens ends. Where it says something
        else than its tokens, nobody knows which words they stand for, so there are no spans.
        """
        start, self._characters = self._characters, self._characters + len(text)
        if self._marks is None:
            return
        try:
            for token in tokens:
                self._marks.push(self._stream.step(self._tokenizer, token) or "")
        # The library raises nothing more specific for bytes that are no text.
        except Exception:  # noqa: BLE001
            self._marks = None
        if self._marks is not None and not self._marks.text.startswith(text, start):
            self._marks = None

    def _marked(self, judgement: Judgement) -> Judgement:
        self._judgement = self._marks.mark(judgement) if self._marks else judgement
        return self._judgement

    def _judged(self, step: StepReport | None) -> Judgement:
        judgement, seconds = step.judged() if step else (Judgement(), 0.0)
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

    async def _whole(self) -> Judgement:
        """What the probes say of the text with its last token; the cache has all but the end."""
        written, prompt = tuple(self._written), self._encoded
        if prompt is None or len(prompt) + len(written) > self._room:
            return Judgement()
        whole = replace(
            prompt,
            token_ids=prompt.token_ids + written,
            parts=prompt.parts + (Part.RESPONSE,) * len(written),
        )
        report = await self._listener.read_whole(
            whole,
            f"{self._id}-whole",
            identity=self._identity,
            fields={k: self._prompt[k] for k in ("type", "cache_salt") if k in self._prompt},
            **self._options,
        )
        return report.judged()[0] if report else Judgement()


async def together(
    texts: Sequence[AsyncGenerator[Any, None]], wanted: Any
) -> AsyncGenerator[Any, None]:
    """The outputs of the texts of one request, as vLLM gives them for ``n`` over 1."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.utils.async_utils import merge_async_iterators

    left, ends = len(texts), dict[int, Any]()
    async with aclosing(merge_async_iterators(*texts)) as outputs:
        async for index, output in outputs:
            left -= output.finished
            output.finished = not left
            if wanted == RequestOutputKind.FINAL_ONLY:
                ends[index] = output
            else:
                yield output
    if ends:
        whole = ends[min(ends)]
        whole.outputs = [text for index in sorted(ends) for text in ends[index].outputs]
        whole.finished = True
        yield whole
