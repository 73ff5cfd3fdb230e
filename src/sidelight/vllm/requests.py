"""Requests as vLLM runs them: the reports of their steps, their number, and a text as events."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sidelight.engines.base import (
    Admission,
    EngineBusyError,
    Event,
    Finished,
    GenerationError,
    Load,
    PromptJudged,
    ResponseScored,
    Sampling,
    TextDelta,
    TokenLogprobs,
)
from sidelight.engines.text import LOWEST, Detokenizer, LogprobStream, TextCodec
from sidelight.errors import SidelightError
from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt, Part
from sidelight.types import Judgement
from sidelight.vllm.settings import KEY, judgement_of, request_params

T = TypeVar("T")


@dataclass(frozen=True)
class StepReport:
    """One step's report on one text.

    Attributes:
        text: The text's index in its request.
        tokens: How many tokens the step has written.
        params: The ``kv_transfer_params`` of its output.
    """

    text: int
    tokens: int
    params: Mapping[str, Any] | None


class OutputListener:
    """Hears every report of an engine, in the process that takes its outputs.

    vLLM merges outputs that have not been read yet, also those of several texts of a request, and
    keeps only the last report. This listens before that.

    Args:
        processor: vLLM's ``OutputProcessor``. Its ``process_outputs`` is wrapped.
    """

    def __init__(self, processor: Any):
        self._states: Mapping[str, Any] = processor.request_states
        self._process = processor.process_outputs
        self._listeners: dict[str, tuple[str, Callable[[StepReport], object]]] = {}
        processor.process_outputs = self._hear

    @contextmanager
    def to(
        self, request_id: str, identity: str, listener: Callable[[StepReport], object]
    ) -> Generator[None]:
        """Gives the listener every report on the request before its outputs can be read.

        Args:
            request_id: The caller's name for it.
            identity: That of the probes which are to judge it; what others say is no verdict.
            listener: Takes the reports.
        """
        self._listeners[request_id] = identity, listener
        try:
            yield
        finally:
            del self._listeners[request_id]

    def _hear(self, outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            state = self._states.get(output.request_id)
            # vLLM may still write for a request that has been cancelled.
            if state is not None and state.external_req_id in self._listeners:
                identity, listener = self._listeners[state.external_req_id]
                params = _by_these(identity, output.kv_transfer_params)
                listener(StepReport(state.request_index, len(output.new_token_ids), params))
        return self._process(outputs, *args, **kwargs)


def _by_these(identity: str, params: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The report, unless other probes than these have judged."""
    report = (params or {}).get(KEY, {})
    if "verdicts" not in report or report.get("identity") == identity:
        return params
    return {KEY: {"error": "Other probes have judged than those that the request began with."}}


def listener_of(processor: Any) -> OutputListener:
    """The one listener to an engine's ``OutputProcessor``."""
    found = getattr(processor.process_outputs, "__self__", None)
    return found if isinstance(found, OutputListener) else OutputListener(processor)


@dataclass(eq=False)
class Place:
    """One request in the engine. It is running once vLLM has read its prompt."""

    is_running: bool = False


class Capacity:
    """Counts the requests in the engine. vLLM itself limits those that run (``max_num_seqs``).

    Args:
        waiting: How many requests may wait; more are refused.
    """

    def __init__(self, waiting: int):
        self._limit = waiting
        self._taken: set[Place] = set()

    @property
    def load(self) -> Load:
        running = sum(place.is_running for place in self._taken)
        return Load(running=running, waiting=len(self._taken) - running)

    @contextmanager
    def taken(self, count: int) -> Generator[list[Place]]:
        """Places for all of these requests or for none, freed at the end.

        Raises:
            EngineBusyError: Too many wait. A list longer than the limit can only enter if nobody
                waits.
        """
        waiting = self.load.waiting
        if waiting and waiting + count > self._limit:
            raise EngineBusyError(waiting=waiting, limit=self._limit)
        places = [Place() for _ in range(count)]
        self._taken.update(places)
        try:
            yield places
        finally:
            self._taken.difference_update(places)

    async def followed(
        self, place: Place, outputs: AsyncGenerator[T, None]
    ) -> AsyncGenerator[T, None]:
        """The outputs of the request that has the place, which is freed when they end."""
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    place.is_running = True
                    yield output
        finally:
            self._taken.discard(place)


@dataclass(frozen=True)
class Output:
    """What vLLM has written since the last one.

    Attributes:
        text: vLLM's ``CompletionOutput``.
        steps: The reports of the steps that wrote its tokens.
    """

    text: Any
    steps: tuple[StepReport, ...]


def early_names(probes: Sequence[Probe]) -> frozenset[str]:
    """Names of the probes that read the prompt alone."""
    return frozenset(probe.name for probe in probes if not probe.reads.includes_response)


class WrittenText:
    """A text being written, as events.

    Args:
        prompt: The text to continue.
        probes: The probes that judge it.
        watch: Names of the probes that are judged after every token.
        admits: Decides whether the text is written, once the prompt has been judged.
        logprobs: As in ``Sampling``.
        codec: Decodes tokens for log-probabilities, since vLLM does not say how much text comes
            from which token.
        check: Judges a whole text.
    """

    def __init__(
        self,
        prompt: EncodedPrompt,
        probes: Sequence[Probe],
        watch: frozenset[str],
        admits: Admission,
        *,
        logprobs: int | None,
        codec: TextCodec,
        check: Callable[[EncodedPrompt], Awaitable[Judgement]],
    ):
        self._prompt = prompt
        self._early = early_names(probes)
        self._late = frozenset(probe.name for probe in probes) - self._early
        self._watch = watch
        self._admits = admits
        self._check = check
        self._count = logprobs
        self._logprobs = LogprobStream(codec.spell)
        self._detokenizer = Detokenizer(codec.decode)
        self._written: list[int] = []
        self._prompt_s = 0.0
        self._judging_s = 0.0

    async def events(self, written: AsyncGenerator[Output, None]) -> AsyncGenerator[Event, None]:
        """Yields the events of ``Engine.generate``, from vLLM's outputs."""
        async with aclosing(written) as outputs:
            first = await anext(outputs)
            judgement, self._prompt_s = judgement_of(first.steps[0].params)
            judged = PromptJudged(
                judgement.of(self._early),
                is_plain=self._prompt.is_plain,
                tokens=len(self._prompt),
                judging_s=self._prompt_s,
            )
            is_admitted = self._admits(judged)
            if is_admitted:
                yield judged
                async for event in self._texts(first):
                    yield event
                async for output in outputs:
                    async for event in self._texts(output):
                        yield event
        if not is_admitted:
            # Only now: the request has left vLLM.
            yield judged

    async def _texts(self, output: Output) -> AsyncGenerator[Event, None]:
        tokens, completion = len(self._written), output.text
        self._written += completion.token_ids
        judgement = Judgement()
        for step in output.steps:
            judgement, seconds = judgement_of(step.params)
            self._judging_s = seconds - self._prompt_s
            tokens += step.tokens
            # The newest token has not been read yet.
            if self._watch and step.tokens and tokens > 1:
                yield self._scored(tokens - 1, judgement)
        logprobs = self._new_logprobs(completion)
        if completion.text:
            yield TextDelta(completion.text, tokens=len(self._written), logprobs=logprobs)
        if completion.finish_reason is not None:
            async for event in self._ending(completion, judgement):
                yield event

    async def _ending(self, completion: Any, judgement: Judgement) -> AsyncGenerator[Event, None]:
        if completion.finish_reason not in ("stop", "length"):
            raise GenerationError(f"vLLM ended this request: {completion.finish_reason}.")
        has_stopped = isinstance(completion.stop_reason, str)
        if self._watch and (completion.finish_reason == "length" or has_stopped):
            # The prefix cache has all of it but the end.
            whole = replace(
                self._prompt,
                token_ids=self._prompt.token_ids + tuple(self._written),
                parts=self._prompt.parts + (Part.RESPONSE,) * len(self._written),
            )
            judgement = await self._check(whole)
            yield self._scored(len(self._written), judgement)
        yield Finished(
            reason=completion.finish_reason,
            prompt_tokens=len(self._prompt),
            completion_tokens=len(self._written),
            judgement=judgement.of(self._late),
            # No token of a stop string is reported.
            logprobs=() if has_stopped else self._logprobs.rest(),
            judging_s=self._judging_s,
        )

    def _scored(self, tokens: int, judgement: Judgement) -> ResponseScored:
        return ResponseScored(tokens, judgement.of(self._watch), self._judging_s)

    def _new_logprobs(self, completion: Any) -> tuple[TokenLogprobs, ...]:
        """The tokens that go with this output's text."""
        if self._count is None:
            return ()
        tokens = completion.token_ids
        if completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str):
            # The newest token ends the turn, so it is not part of the text.
            tokens = tokens[:-1]
        entries: Sequence[Mapping[int, Any]] = completion.logprobs or ()
        for token, found in zip(tokens, entries, strict=False):
            # vLLM's entry holds the drawn token beside the likeliest ones.
            ranked = sorted(found.items(), key=lambda item: item[1].rank)[: self._count]
            self._logprobs.add(
                (token, max(found[token].logprob, LOWEST)),
                [(other, max(own.logprob, LOWEST)) for other, own in ranked],
                characters=len(self._detokenizer.push(token)),
            )
        return self._logprobs.send(len(completion.text))


def sampling_params(sampling: Sampling, limit: int, prompt: EncodedPrompt) -> Any:
    """What vLLM needs to write, and the plugin to judge.

    Raises:
        SidelightError: A seed would crash vLLM. Its CPU backend (0.32) dies of a seeded draw if the
            prompt is read in more than one step.
    """
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind

    from vllm import SamplingParams

    if sampling.seed is not None and sampling.temperature > 0 and current_platform.is_cpu():
        raise SidelightError(
            "vLLM's CPU backend cannot draw with a seed. Leave 'seed' out, or set 'temperature' "
            "to 0."
        )
    return SamplingParams(
        max_tokens=limit,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop=[text for text in sampling.stop if text],
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": request_params(prompt)},
    )
