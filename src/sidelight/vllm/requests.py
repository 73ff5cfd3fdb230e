"""What the engine says of each request, step by step.

vLLM merges the outputs that a reader has not taken yet: several tokens, and several texts of one
request, with the last report only. Here every report is heard before that.

How many requests are in the engine, and which it refuses. Knows counts, not requests.

One text being written by vLLM, as events: its outputs, and what they say of its tokens.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

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
)
from sidelight.engines.judging import Judgement
from sidelight.engines.logprobs import LOWEST, Odds, TokenLogprobs, Trail
from sidelight.engines.text import Detokenizer
from sidelight.errors import SidelightError
from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt, Part
from sidelight.vllm.panel import verdict_of
from sidelight.vllm.settings import KEY, request_params


@dataclass(frozen=True)
class Said:
    """One step's report on one text.

    Attributes:
        text: Its index among the texts of the request.
        tokens: How many the step has written.
        params: The ``kv_transfer_params`` of its output.
    """

    text: int
    tokens: int
    params: Mapping[str, Any] | None


class OutputListener:
    """Listens to an engine, in the process that takes its outputs.

    Args:
        processor: vLLM's ``OutputProcessor``. Its ``process_outputs`` is wrapped.
    """

    def __init__(self, processor: Any):
        self._states: Mapping[str, Any] = processor.request_states
        self._process = processor.process_outputs
        self._listeners: dict[str, Callable[[Said], None]] = {}
        processor.process_outputs = self._heard

    @contextmanager
    def of(self, request_id: str, listener: Callable[[Said], None]) -> Generator[None]:
        """Tells the listener all that is said of the request, before its outputs can be read."""
        self._listeners[request_id] = listener
        try:
            yield
        finally:
            del self._listeners[request_id]

    def _heard(self, outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            state = self._states.get(output.request_id)
            # vLLM may still write what nobody wants any more.
            if state is not None and state.external_req_id in self._listeners:
                tokens = len(output.new_token_ids)
                said = Said(state.request_index, tokens, output.kv_transfer_params)
                self._listeners[state.external_req_id](said)
        return self._process(outputs, *args, **kwargs)


PlacesOutput = TypeVar("PlacesOutput")


@dataclass(eq=False)
class Place:
    """That of one request.

    Attributes:
        is_running: Whether vLLM has read its prompt.
    """

    is_running: bool = False


class Capacity:
    """The places of all requests; vLLM itself bounds those that run (``max_num_seqs``).

    Args:
        waiting: Requests that may wait; further ones are refused.
    """

    def __init__(self, waiting: int):
        self._most = waiting
        self._taken: set[Place] = set()

    @property
    def load(self) -> Load:
        """The requests that have a place."""
        running = sum(place.is_running for place in self._taken)
        return Load(running=running, waiting=len(self._taken) - running)

    @contextmanager
    def taken(self, count: int) -> Generator[list[Place]]:
        """Places for all of these requests, or for none; those not ``followed`` are given back.

        Raises:
            EngineBusyError: Too many wait. A list longer than may wait is taken where nobody does.
        """
        waiting = self.load.waiting
        if waiting and waiting + count > self._most:
            raise EngineBusyError(
                f"{waiting} requests are waiting and {self._most} may. Try again in a moment.",
                retry_after_s=1,
            )
        places = [Place() for _ in range(count)]
        self._taken.update(places)
        try:
            yield places
        finally:
            self._taken.difference_update(places)

    async def followed(
        self, place: Place, outputs: AsyncGenerator[PlacesOutput, None]
    ) -> AsyncGenerator[PlacesOutput, None]:
        """The outputs of the request whose place it is, given back when these end."""
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    place.is_running = True
                    yield output
        finally:
            self._taken.discard(place)


# pyright: reportMissingImports=false


@dataclass(frozen=True)
class RequestsOutput:
    """What vLLM has written since the last one.

    Attributes:
        text: vLLM's ``CompletionOutput``.
        steps: What the step of each of its tokens said of the request.
    """

    text: Any
    steps: tuple[Said, ...]


@runtime_checkable
class Reader(Protocol):
    """What runs tokens through the model."""

    async def check(self, prompt: EncodedPrompt) -> Judgement:
        """What all probes say of these tokens."""
        ...


class Names:
    """Which probes speak when."""

    def __init__(self, early: frozenset[str], late: frozenset[str]):
        self.early = early
        self.late = late

    @property
    def all(self) -> frozenset[str]:
        """Both."""
        return self.early | self.late

    @staticmethod
    def of(probes: Sequence[Probe]) -> "Names":
        """Those of the prompt, and those of the response."""
        early = frozenset(probe.name for probe in probes if not probe.reads.includes_response)
        return Names(early, frozenset(probe.name for probe in probes) - early)


class Likelihoods:
    """The log-probabilities of one text's tokens, told with the text that vLLM sends.

    Args:
        trail: Tells them.
        decode: Token ids to text, special tokens left out: vLLM does not say how much text comes
            from which token.
        count: How many of the likeliest tokens are told.
    """

    def __init__(self, trail: Trail, decode: Callable[[Sequence[int]], str], *, count: int):
        self._trail = trail
        self._detokenizer = Detokenizer(decode)
        self._count = count

    def told(self, completion: Any) -> tuple[TokenLogprobs, ...]:
        """What is told with this output's text."""
        tokens = completion.token_ids
        if _is_end_of_turn(completion):
            tokens = tokens[:-1]
        for token, found in zip(tokens, completion.logprobs or (), strict=False):
            length = len(self._detokenizer.push(token))
            self._trail.add(_odds(token, found, self._count), characters=length)
        return self._trail.told(len(completion.text))

    def rest(self, completion: Any) -> tuple[TokenLogprobs, ...]:
        """What is left after the last output; nothing of a stop string."""
        return () if isinstance(completion.stop_reason, str) else self._trail.rest()


class WrittenText:
    """One text being written, as events.

    Args:
        reader: Judges the text when it is complete.
        names: Which probes speak when.
        watch: Probes that are scored after every token.
        admits: Whether the text is written, once the prompt has been judged.
        likelihoods: Tells log-probabilities; None: they were not asked for.
    """

    def __init__(
        self,
        reader: Reader,
        names: Names,
        watch: frozenset[str],
        admits: Admission,
        likelihoods: Likelihoods | None = None,
    ):
        self._reader = reader
        self._names = names
        self._watch = watch
        self._admits = admits
        self._likelihoods = likelihoods
        self._written: list[int] = []
        self._prompt_s = 0.0
        self._judging_s = 0.0

    async def events(
        self, prompt: EncodedPrompt, written: AsyncGenerator[RequestsOutput, None]
    ) -> AsyncGenerator[Event, None]:
        """As ``Engine.generate``.

        Args:
            prompt: What is continued.
            written: vLLM's outputs.
        """
        async with aclosing(written) as outputs:
            first = await anext(outputs)
            early = judgement(first.steps[0].params).of(self._names.early)
            self._prompt_s = _seconds(first.steps[0].params)
            judged = PromptJudged(
                early.verdicts, early.failed, tokens=len(prompt), judging_s=self._prompt_s
            )
            is_admitted = self._admits(judged)
            if is_admitted:
                yield judged
                async for event in self._texts(prompt, first):
                    yield event
                async for output in outputs:
                    async for event in self._texts(prompt, output):
                        yield event
        if not is_admitted:
            # Only now: the request has left vLLM.
            yield judged

    async def _texts(
        self, prompt: EncodedPrompt, output: RequestsOutput
    ) -> AsyncGenerator[Event, None]:
        tokens, completion = len(self._written), output.text
        self._written += completion.token_ids
        judged = Judgement()
        for step in output.steps:
            judged = judgement(step.params)
            self._judging_s = _seconds(step.params) - self._prompt_s
            tokens += step.tokens
            # The newest token is not read yet.
            if self._watch and step.tokens and tokens > 1:
                yield self._scored(tokens - 1, judged)
        told = self._likelihoods.told(completion) if self._likelihoods else ()
        if completion.text:
            yield TextDelta(completion.text, tokens=len(self._written), logprobs=told)
        if completion.finish_reason is not None:
            async for event in self._ending(prompt, completion, judged):
                yield event

    async def _ending(
        self, prompt: EncodedPrompt, completion: Any, judged: Judgement
    ) -> AsyncGenerator[Event, None]:
        if completion.finish_reason not in ("stop", "length"):
            raise GenerationError(f"vLLM ended this request: {completion.finish_reason}.")
        ends_in_text = completion.finish_reason == "length" or isinstance(
            completion.stop_reason, str
        )
        if self._watch and ends_in_text:
            judged = await self._reader.check(self._whole(prompt))
            yield self._scored(len(self._written), judged)
        late = judged.of(self._names.late)
        yield Finished(
            reason=completion.finish_reason,
            prompt_tokens=len(prompt),
            completion_tokens=len(self._written),
            verdicts=late.verdicts,
            failed=late.failed,
            logprobs=self._likelihoods.rest(completion) if self._likelihoods else (),
            judging_s=self._judging_s,
        )

    def _whole(self, prompt: EncodedPrompt) -> EncodedPrompt:
        """The prompt and the response; the prefix cache has all but its end."""
        return EncodedPrompt(
            prompt.token_ids + tuple(self._written),
            prompt.parts + (Part.RESPONSE,) * len(self._written),
        )

    def _scored(self, tokens: int, judged: Judgement) -> ResponseScored:
        own = judged.of(self._watch)
        return ResponseScored(tokens, own.verdicts, own.failed, self._judging_s)


def sampling_params(sampling: Sampling, limit: int, prompt: EncodedPrompt) -> Any:
    """What vLLM needs to write, and the plugin to judge."""
    from vllm.sampling_params import RequestOutputKind

    from vllm import SamplingParams

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


def require_drawable(sampling: Sampling) -> None:
    """Checks that the draw cannot end vLLM.

    Its CPU backend (0.32) dies of a seeded draw whose prompt is read in more than one step.
    """
    from vllm.platforms import current_platform

    if sampling.seed is not None and sampling.temperature > 0 and current_platform.is_cpu():
        raise SidelightError(
            "vLLM's CPU backend cannot draw with a seed. Leave 'seed' out, or set 'temperature' "
            "to 0."
        )


def _seconds(params: Mapping[str, Any] | None) -> float:
    """That the workers have taken for the request's verdicts so far."""
    return (params or {}).get(KEY, {}).get("seconds", 0.0)


def _is_end_of_turn(completion: Any) -> bool:
    """Whether the newest token ends the turn, and so is no part of the text."""
    return completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)


def _odds(token: int, found: Mapping[int, Any], count: int) -> Odds:
    """From vLLM's entry, which holds the drawn token beside the likeliest."""
    ranked = sorted(found.items(), key=lambda item: item[1].rank)[:count]
    likeliest = tuple((other, max(own.logprob, LOWEST)) for other, own in ranked)
    return Odds(token, max(found[token].logprob, LOWEST), likeliest)


def judgement(params: Mapping[str, Any] | None) -> Judgement:
    """What a step's ``kv_transfer_params`` say of its request.

    Raises:
        GenerationError: They say nothing; the request must not pass for judged.
    """
    report = (params or {}).get(KEY, {})
    if "verdicts" not in report:
        raise GenerationError(
            f"vLLM sent no verdict ({report.get('error', 'the plugin did not run')}). Treat the "
            "text as not judged."
        )
    pairs = [(name, verdict_of(name, fields)) for name, fields in report["verdicts"].items()]
    return Judgement(
        tuple(verdict for _, verdict in pairs if verdict is not None),
        tuple(name for name, verdict in pairs if verdict is None),
    )
