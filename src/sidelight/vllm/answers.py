"""One answer in vLLM: its outputs as the events of an engine, and those that may be sent of it."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from sidelight.engines.base import (
    Event,
    Finished,
    GenerationError,
    PromptJudged,
    ResponseScored,
    TextDelta,
)
from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt, Part
from sidelight.types import Judgement
from sidelight.vllm.outputs import OutputListener, StepReport, early_names, without_report


@dataclass(frozen=True)
class OutputDelta(TextDelta):
    """A piece of text as vLLM has written it.

    Attributes:
        output: vLLM's ``RequestOutput``, with one text in it.
        is_last: Whether the text ends with it.
    """

    output: Any = None
    is_last: bool = False


class GuardedText:
    """One request in vLLM, of one text.

    Args:
        listener: Hears the reports of its steps, and runs it.
        prompt: As vLLM takes it.
        encoded: What its tokens belong to; None: unknown.
        params: Its ``SamplingParams``. If a probe is watched, not for the final output alone.
        request_id: Unique.
        options: As ``AsyncLLM.generate`` takes them.
        identity: That of ``probes``, which judge it.
        watch: Names of the probes that are read after every token.
        controls: Ids of control tokens, which are no part of a text where they end it.
        room: Most tokens of a text that is judged whole.
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
        probes: Sequence[Probe],
        watch: Collection[str],
        controls: Collection[int],
        room: int,
    ):
        self._listener, self._options = listener, options
        self._prompt, self._encoded = prompt, encoded
        self._prompt_tokens = 0 if encoded is None else len(encoded)
        self._params, self._id, self._identity = params, request_id, identity
        self._is_delta = params.output_kind.name == "DELTA"
        self._early = early_names(probes)
        self._late = frozenset(probe.name for probe in probes) - self._early
        self._watch, self._controls, self._room = watch, controls, room
        # Of the steps: the first, the newest, and, if a probe is watched, those to be scored.
        self._first_step: StepReport | None = None
        self._newest_step: StepReport | None = None
        self._steps = deque[StepReport]()
        self._written: list[int] = []
        self._heard = self._scored = 0
        self._prompt_s = self._judging_s = 0.0
        # Of the outputs: the first, the newest, and the last that was sent, with its text.
        self._first: Any = None
        self._newest: Any = None
        self._sent: Any = None
        self._text = ""
        self._characters = 0

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
        """The output to send of text that has passed."""
        output = delta.output
        if self._watch and not self._is_delta:
            self._text += delta.text
            (text,) = output.outputs
            # vLLM adds to the same lists what has not been judged.
            tokens = None if output.finished else delta.tokens
            logprobs = None if text.logprobs is None else text.logprobs[:tokens]
            ids = [*text.token_ids[:tokens]]
            output.outputs = [replace(text, text=self._text, token_ids=ids, logprobs=logprobs)]
        self._sent = output
        return output

    def cut(self) -> Any:
        """The output with which the text ends where it is cut."""
        from vllm.outputs import CompletionOutput

        if self._sent is not None and not self._is_delta:
            output = copy(self._sent)
            (text,) = output.outputs
            output.outputs = [replace(text, finish_reason="content_filter")]
        else:
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
        return PromptJudged(
            judgement.of(self._early),
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
        text = completion.text
        if self._is_delta:
            self._written += tokens
        else:
            self._written = tokens
            if self._watch:
                # Many outputs may be held back, so none of them keeps the text before its own.
                self._characters, text = len(text), text[self._characters :]
                completion.text = ""
        written = len(self._written)
        # The steps that wrote these tokens; the last one may have written none.
        while self._steps and (self._heard < written or reason is not None):
            step = self._steps.popleft()
            self._heard += step.tokens
            # The newest token has not been read yet.
            if step.tokens and self._heard > 1:
                yield self._score(self._heard - 1, self._judged(step))
        # No probe reads the token that ends a turn.
        is_turn_end = reason == "stop" and not isinstance(completion.stop_reason, str)
        is_turn_end = is_turn_end and bool(tokens) and tokens[-1] in self._controls
        readable = written - is_turn_end
        yield OutputDelta(text, tokens=readable, output=output, is_last=reason is not None)
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
            judgement=judgement.of(self._late),
            judging_s=self._judging_s,
        )

    def _judged(self, step: StepReport | None) -> Judgement:
        judgement, seconds = step.judged() if step else (Judgement(), 0.0)
        self._judging_s = seconds - self._prompt_s
        return judgement

    def _score(self, tokens: int, judgement: Judgement) -> ResponseScored:
        self._scored = tokens
        return ResponseScored(tokens, judgement.of(self._watch), judging_s=self._judging_s)

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
