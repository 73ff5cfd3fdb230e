"""vLLM's outputs of one text as the events of an engine, and what may be sent as vLLM's outputs."""

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
from sidelight.vllm.requests import (
    Generate,
    OutputListener,
    StepReport,
    early_names,
    read_whole,
)
from sidelight.vllm.settings import KEY, judgement_of


@dataclass(frozen=True)
class OutputDelta(TextDelta):
    """A piece of text as vLLM has written it.

    Attributes:
        output: vLLM's ``RequestOutput``, with one text in it.
        is_last: Whether the text ends with it.
    """

    output: Any = None
    is_last: bool = False


def without_report(output: Any) -> Any:
    """The output, of which nobody learns what probes have reported."""
    kept = {k: v for k, v in (output.kv_transfer_params or {}).items() if k != KEY}
    output.kv_transfer_params = kept or None
    return output


class GuardedText:
    """One request in vLLM, of one text, as events.

    Args:
        generate: Runs it.
        listener: Hears the reports of its steps.
        prompt: As vLLM takes it.
        encoded: What its tokens belong to; None: unknown.
        params: Its ``SamplingParams``. If a probe is watched, the output is by deltas.
        request_id: Unique.
        identity: That of the probes which are served.
        probes: Those that judge it.
        watch: Names of the probes that are read after every token.
        controls: Ids of control tokens, which are no part of a text where they end it.
        room: Most tokens of a text that is judged whole.
    """

    def __init__(
        self,
        generate: Generate,
        listener: OutputListener,
        prompt: Any,
        encoded: EncodedPrompt | None,
        params: Any,
        request_id: str,
        *,
        identity: str,
        probes: Sequence[Probe],
        watch: Collection[str],
        controls: Collection[int],
        room: int,
    ):
        self._generate, self._listener = generate, listener
        self._prompt, self._encoded = prompt, encoded
        self._params, self._id, self._identity = params, request_id, identity
        self._is_delta = params.output_kind.name == "DELTA"
        self._early = early_names(probes)
        self._late = frozenset(probe.name for probe in probes) - self._early
        self._watch, self._controls, self._room = watch, controls, room
        # Of the steps: the first, the newest, and, if a probe is watched, those that follow.
        self._reports: list[StepReport] = []
        self._steps = deque[StepReport]()
        self._written: list[int] = []
        self._heard = self._scored = 0
        self._prompt_s = self._judging_s = 0.0
        self._first: Any = None
        self._newest: Any = None

    async def events(self) -> AsyncGenerator[Event, None]:
        """As those of ``Engine.generate``; each text is an ``OutputDelta``."""
        is_judged = asyncio.get_running_loop().create_future()

        def hear(step: StepReport) -> None:
            self._reports[1:] = [step]
            if self._watch:
                self._steps.append(step)
            if not is_judged.done():
                is_judged.set_result(None)

        with self._listener.to(self._id, self._identity, hear):
            async with aclosing(self._generate(self._prompt, self._params, self._id)) as outputs:
                # Unless outputs come by deltas, the first comes long after the verdicts.
                first = asyncio.ensure_future(anext(outputs))
                try:
                    await asyncio.wait({first, is_judged}, return_when=asyncio.FIRST_COMPLETED)
                    if not self._reports:
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

    def cut(self, *, has_sent: bool) -> Any:
        """The output with which the text ends where it is cut."""
        from vllm.outputs import CompletionOutput

        (newest,) = self._newest.outputs
        output = copy(self._newest)
        output.outputs = [
            CompletionOutput(
                index=0,
                text="",
                token_ids=[],
                cumulative_logprob=None,
                logprobs=None if newest.logprobs is None else [],
                finish_reason="content_filter",
            )
        ]
        output.finished = True
        if not has_sent:
            # They are the prompt's.
            output.prompt_logprobs = self._first.prompt_logprobs
        return output

    def _prompt_judged(self) -> PromptJudged:
        judgement, self._prompt_s = _judgement(self._reports[:1])
        return PromptJudged(
            judgement.of(self._early),
            is_plain=self._encoded is not None and self._encoded.is_plain,
            tokens=0 if self._encoded is None else len(self._encoded),
            judging_s=self._prompt_s,
        )

    async def _events_of(self, output: Any) -> AsyncGenerator[Event, None]:
        (completion,) = output.outputs
        reason, tokens = completion.finish_reason, [*completion.token_ids]
        if self._watch and reason in ("abort", "error"):
            raise GenerationError(f"vLLM ended this request: {reason}. Retry.")
        self._first, self._newest = self._first or output, output
        without_report(output)
        if not self._is_delta:
            self._written.clear()
        self._written += tokens
        # The steps that wrote these tokens; the last one may have written none.
        while self._steps and (self._heard < len(self._written) or reason is not None):
            step = self._steps.popleft()
            self._heard += step.tokens
            # The newest token has not been read yet.
            if step.tokens and self._heard > 1:
                yield self._score(self._heard - 1, self._judged([step]))
        # No probe reads the token that ends a turn.
        is_turn_end = reason == "stop" and not isinstance(completion.stop_reason, str)
        is_turn_end = is_turn_end and bool(tokens) and tokens[-1] in self._controls
        readable = len(self._written) - is_turn_end
        yield OutputDelta(
            completion.text, tokens=readable, output=output, is_last=reason is not None
        )
        if reason is None:
            return
        judgement = self._judged(self._reports[-1:])
        if self._watch and self._scored < readable:
            judgement = await self._whole()
            yield self._score(readable, judgement)
        yield Finished(
            reason="length" if reason == "length" else "stop",
            prompt_tokens=0 if self._encoded is None else len(self._encoded),
            completion_tokens=len(self._written),
            judgement=judgement.of(self._late),
            judging_s=self._judging_s,
        )

    def _judged(self, reports: Sequence[StepReport]) -> Judgement:
        judgement, seconds = _judgement(reports)
        self._judging_s = seconds - self._prompt_s
        return judgement

    def _score(self, tokens: int, judgement: Judgement) -> ResponseScored:
        self._scored = tokens
        return ResponseScored(tokens, judgement.of(self._watch), self._judging_s)

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
        given: Mapping[str, Any] = self._prompt
        shared = {k: given[k] for k in ("type", "cache_salt") if k in given}
        own_id = f"{self._id}-whole"
        report = await read_whole(
            self._generate, self._listener, shared, whole, own_id, identity=self._identity
        )
        return _judgement([report] if report else [])[0]


class Assembly:
    """Puts what may be sent of a text into the form that the caller has asked vLLM for.

    Args:
        wanted: The caller's ``RequestOutputKind``.
        given: That of the outputs.
    """

    def __init__(self, wanted: Any, given: Any):
        self._wanted, self._merges = wanted, wanted != given
        self._whole: Any = None

    def push(self, output: Any) -> Any:
        """What to send once this output may be sent; None: nothing yet."""
        from vllm.sampling_params import RequestOutputKind

        if not self._merges:
            return output
        if self._whole is None:
            self._whole = output
        else:
            self._add(output)
        if output.finished:
            return self._whole
        if self._wanted == RequestOutputKind.FINAL_ONLY:
            return None
        snapshot = copy(self._whole)
        snapshot.outputs = [
            replace(
                text,
                token_ids=[*text.token_ids],
                logprobs=None if text.logprobs is None else text.logprobs[:],
            )
            for text in snapshot.outputs
        ]
        return snapshot

    def _add(self, output: Any) -> None:
        (mine,), (new,) = self._whole.outputs, output.outputs
        known = mine.cumulative_logprob
        self._whole.add(output, aggregate=True)
        if new.cumulative_logprob is None:
            mine.cumulative_logprob = known


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


def _judgement(reports: Sequence[StepReport]) -> tuple[Judgement, float]:
    """What one report says, and the seconds in it. Without verdicts, no probe has said anything."""
    try:
        return judgement_of(reports[0].params if reports else None)
    except GenerationError:
        return Judgement(), 0.0
