"""The texts being read and written: each pass of the model reads, judges and writes.

A pass reads on in new prompts (``prefill``), or the newest token of some texts (``decode``).
Everything here is synchronous and runs in one thread; nothing knows of callers that wait.
"""

import sys
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.backbone import Tap, TransformersBackbone
from sidelight.bank import BankState, Panel
from sidelight.engines.base import (
    Finished,
    FinishReason,
    GenerationError,
    PromptJudged,
    ResponseScored,
    TextDelta,
)
from sidelight.engines.decoder import CachedRows, Decoder
from sidelight.engines.queue import Emission, Request
from sidelight.engines.text import Detokenizer, Sampler, StopGate, TextCodec
from sidelight.explanation import Explanation
from sidelight.prompts import Part
from sidelight.types import Judgement


class Stopwatch:
    """Adds up the wall-clock seconds that probes take within a pass."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self, *, after: torch.device | None = None) -> Generator[None]:
        """Counts the time spent inside.

        Args:
            after: Wait first until this device has finished its work. A GPU runs behind Python, and
                what it still has to do must not count.
        """
        if after is not None and after.type == "cuda":
            torch.cuda.synchronize(after)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def around(self, tap: Tap | None) -> Tap | None:
        """The tap, with its time counted."""
        if tap is None:
            return None

        def timed(layer: int, hidden: Float[Tensor, "batch token width"]) -> None:
            with self.running():
                tap(layer, hidden)

        return timed


class Generation:
    """A text being written.

    Attributes:
        state: What the probes of the response have read; None if there are none.
        sampler: Draws the next token from its logits.
        tokens: How many have been sampled.
        judging_s: Seconds that the probes took in its passes after the prompt.
        last_token: The newest one, which the next pass reads.
        reason: Why the text is complete; None while it is not.
        is_settled: Whether it is complete and the watched probes have read all of it.
    """

    def __init__(
        self,
        request: Request,
        state: BankState | None,
        *,
        codec: TextCodec,
        end_tokens: frozenset[int],
    ):
        self.request = request
        self.state = state
        self.sampler = Sampler(request.sampling)
        self.tokens = 0
        self.judging_s = 0.0
        self.last_token = 0
        self.reason: FinishReason | None = None
        self.is_settled = False
        self._text_tokens = 0
        self._end_tokens = end_tokens
        self._detokenizer = Detokenizer(codec.decode)
        self._gate = StopGate(request.sampling.stop)

    def accept(self, token: int) -> TextDelta | None:
        """Takes the token that was drawn; returns the text that can now be sent."""
        self.last_token = token
        self.tokens += 1
        if token in self._end_tokens:
            self.reason, self.is_settled = "stop", True
            text = self._gate.flush()
        else:
            self._text_tokens += 1
            text = self._gate.push(self._detokenizer.push(token))
            if self._gate.is_closed:
                self.reason = "stop"
            elif self.tokens == self.request.max_tokens:
                self.reason = "length"
                text += self._gate.flush()
            # The last token of a watched text is still to be read.
            self.is_settled = self.reason is not None and not self.request.watch
        return TextDelta(text, tokens=self._text_tokens) if text else None

    def finished(self, judgement: Judgement) -> Finished:
        """The last event of a settled text."""
        assert self.reason is not None
        return Finished(
            reason=self.reason,
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self.tokens,
            judgement=judgement,
            judging_s=self.judging_s,
        )


@dataclass(frozen=True)
class Work:
    """What one pass may do next, and for which requests."""

    requests: Sequence[Request]
    run: Callable[[], list[Emission]]


@dataclass(frozen=True, eq=False)
class _Reading:
    """Prompts that are being read; ``parts`` takes a pass for each part of them."""

    requests: Sequence[Request]
    parts: Generator[None, None, list[Emission]]


@dataclass(frozen=True)
class _Group:
    """What texts that are written together have in common.

    Attributes:
        panel: The probes.
        most: The longest that their prompts may be. A short text beside a long one would be padded
            to its length.
    """

    panel: Panel
    most: int

    @staticmethod
    def of(panel: Panel, tokens: int) -> "_Group":
        """That of prompts of so many tokens."""
        return _Group(panel, next(most for most in _LENGTHS if tokens <= most))


_LENGTHS = (512, 2048, 8192, 32768, sys.maxsize)


@dataclass(frozen=True)
class _Rows:
    """The texts of one group, and their keys and values row by row."""

    generations: list[Generation]
    cached: CachedRows

    def without(self, gone: Collection[Generation]) -> "_Rows | None":
        """The rows that are not among these; None if there are none."""
        left = [i for i, generation in enumerate(self.generations) if generation not in gone]
        if not left:
            return None
        return _Rows([self.generations[i] for i in left], self.cached.kept(left))

    def joined(self, other: "_Rows") -> "_Rows":
        return _Rows([*self.generations, *other.generations], self.cached.joined(other.cached))


class Batch:
    """Texts that enter when their prompts are read and leave when they are complete.

    Texts of one panel and of similar lengths are written together. There are several panels from a
    change of the probes until the texts that began before it are complete.

    Args:
        backbone: The model.
        codec: Decodes what it writes.
        prefill_tokens: Tokens of prompts that one pass reads.
    """

    def __init__(self, backbone: TransformersBackbone, codec: TextCodec, *, prefill_tokens: int):
        self._decoder = Decoder(backbone)
        self._codec = codec
        self._prefill_tokens = prefill_tokens
        self._readings: list[_Reading] = []
        self._rows: dict[_Group, _Rows] = {}

    @property
    def requests(self) -> list[Request]:
        """The requests whose prompts are being read, or whose texts are being written."""
        return [request for work in (*self.reading, *self.writing) for request in work.requests]

    @property
    def reading(self) -> list[Work]:
        """The passes that read on in prompts, in the order of ``begin``."""
        return [
            Work(reading.requests, partial(self._read_on, reading)) for reading in self._readings
        ]

    @property
    def writing(self) -> list[Work]:
        """The passes that write one more token of some texts."""
        return [
            Work([g.request for g in rows.generations], partial(self._decode, group))
            # A copy: the load is asked for while the model's thread adds rows.
            for group, rows in [*self._rows.items()]
        ]

    def begin(self, requests: Sequence[Request]) -> list[Work]:
        """Takes prompts, to be read together as far as they have the same panel."""
        before = len(self._readings)
        for panel in dict.fromkeys(request.panel for request in requests):
            members = [request for request in requests if request.panel is panel]
            self._readings.append(_Reading(members, self._prefill(members)))
        return self.reading[before:]

    def drop(self, requests: Collection[Request]) -> None:
        """Reads and writes no more for these requests, and frees what they hold."""
        self._readings = [
            reading for reading in self._readings if not {*reading.requests} <= {*requests}
        ]
        for group, rows in [*self._rows.items()]:
            self._put(group, rows.without([g for g in rows.generations if g.request in requests]))

    def _read_on(self, reading: _Reading) -> list[Emission]:
        try:
            next(reading.parts)
        except StopIteration as end:
            self._readings.remove(reading)
            return end.value
        return []

    def _prefill(self, requests: Sequence[Request]) -> Generator[None, None, list[Emission]]:
        """Reads prompts in one pass or several, judges them, and writes the first tokens.

        The texts being written are touched last, once everything went well.

        Args:
            requests: Requests of one panel.
        """
        panel = requests[0].panel
        prompts = [request.prompt for request in requests]
        tap, stopwatch = panel.prompt_tap(), Stopwatch()
        each, longest = self._prefill_tokens // len(prompts), max(map(len, prompts))
        parts = self._decoder.read_prompts(prompts, stopwatch.around(tap), columns=max(1, each))
        logits, cached = next(parts)
        while cached.mask.shape[1] < longest:
            yield
            logits, cached = next(parts)
        judgements = [Judgement()] * len(requests)
        states: list[BankState | None] = [None] * len(requests)
        explanations: list[tuple[Explanation, ...]] = [()] * len(requests)
        if tap:
            with stopwatch.running(after=logits.device):
                columns = tap.projected()[cached.mask]
                parts = [bytes(prompt.parts) for prompt in prompts]
                judgements = panel.judge_prompts(columns, parts, [p.is_plain for p in prompts])
                states = panel.read(columns, parts, states)
                answered = [i for i, request in enumerate(requests) if request.has_response]
                late = panel.judge_responses(
                    [states[i] for i in answered], [prompts[i].is_plain for i in answered]
                )
                for i, judgement in zip(answered, late, strict=True):
                    judgements[i] |= judgement
                of_each = columns.split([len(prompt) for prompt in prompts])
                for i, request in enumerate(requests):
                    if request.explain:
                        explanations[i] = panel.explain(
                            of_each[i], request.prompt, request.places, request.explain
                        )
        emissions: list[Emission] = []
        entering: list[int] = []
        for i, (request, judgement) in enumerate(zip(requests, judgements, strict=True)):
            event = PromptJudged(
                judgement,
                is_plain=request.prompt.is_plain,
                tokens=len(request.prompt),
                explanations=explanations[i],
                judging_s=stopwatch.seconds,
            )
            is_last = request.is_check or not request.admits(event)
            emissions.append(Emission(request, event, is_last))
            if not is_last:
                entering.append(i)
        if not entering:
            return emissions
        new = [
            Generation(
                requests[i], states[i], codec=self._codec, end_tokens=self._decoder.end_tokens
            )
            for i in entering
        ]
        left, written = _write(panel, _Rows(new, cached.kept(entering)), logits[entering])
        group = _Group.of(panel, longest)
        running = self._rows.get(group)
        self._put(group, running.joined(left) if running and left else running or left)
        return emissions + written

    def _decode(self, group: _Group) -> list[Emission]:
        """Reads the newest token of each text, judges the response so far, and writes the next."""
        rows = self._rows[group]
        scored, logits = self._read_step(group.panel, rows)
        left, written = _write(group.panel, rows, logits)
        self._put(group, left)
        return scored + written

    def _read_step(
        self, panel: Panel, rows: _Rows
    ) -> tuple[list[Emission], Float[Tensor, "row vocabulary"]]:
        generations = rows.generations
        watched = [generation for generation in generations if generation.request.watch]
        tap, stopwatch = panel.response_tap(), Stopwatch()
        logits = self._decoder.read_step(
            [generation.last_token for generation in generations],
            rows.cached,
            stopwatch.around(tap),
        )
        judgements: list[Judgement] = []
        if tap:
            with stopwatch.running(after=logits.device):
                columns = tap.projected()[:, 0]
                parts = [bytes([Part.RESPONSE])] * len(generations)
                states = panel.read(columns, parts, [g.state for g in generations])
                for generation, state in zip(generations, states, strict=True):
                    generation.state = state
                judgements = _judge_responses(panel, watched)
        for generation in generations:
            # Every row has waited for the probes of all.
            generation.judging_s += stopwatch.seconds
            generation.is_settled = generation.reason is not None
        scored: list[Emission] = []
        for generation, judgement in zip(watched, judgements, strict=True):
            said = judgement.of(generation.request.watch)
            event = ResponseScored(generation.tokens, said, generation.judging_s)
            scored.append(Emission(generation.request, event))
        return scored, logits

    def _put(self, group: _Group, rows: _Rows | None) -> None:
        if rows is None:
            self._rows.pop(group, None)
        else:
            self._rows[group] = rows


def _judge_responses(panel: Panel, generations: Sequence[Generation]) -> list[Judgement]:
    is_plain = [generation.request.prompt.is_plain for generation in generations]
    return panel.judge_responses([generation.state for generation in generations], is_plain)


def _write(
    panel: Panel, rows: _Rows, logits: Float[Tensor, "row vocabulary"]
) -> tuple[_Rows | None, list[Emission]]:
    """Writes a token of each text that is not complete, and ends those that are settled.

    Returns:
        The rows that go on, and what happened.
    """
    emissions: list[Emission] = []
    lost: list[Generation] = []
    writing = [i for i, generation in enumerate(rows.generations) if generation.reason is None]
    if writing:
        logits = logits[writing]
        generations = [rows.generations[i] for i in writing]
        drawn = torch.stack([g.sampler(row) for g, row in zip(generations, logits, strict=True)])
        # In float16 a logit overflows to infinity before others become not a number.
        overflowed = (logits.isnan() | logits.isposinf()).any(dim=1)
        for generation, token, has_overflowed in zip(
            generations, drawn.tolist(), overflowed.tolist(), strict=True
        ):
            if has_overflowed:
                lost.append(generation)
                error = GenerationError(
                    "The model's logits are not finite, so no token can be drawn. Serve it in "
                    "bfloat16 or float32; float16 overflows in some models."
                )
                emissions.append(Emission(generation.request, error, is_last=True))
            elif text := generation.accept(token):
                emissions.append(Emission(generation.request, text))
    settled = [generation for generation in rows.generations if generation.is_settled]
    stopwatch = Stopwatch()
    with stopwatch.running():
        judgements = _judge_responses(panel, settled)
    for generation in rows.generations:
        generation.judging_s += stopwatch.seconds
    for generation, judgement in zip(settled, judgements, strict=True):
        emissions.append(Emission(generation.request, generation.finished(judgement), is_last=True))
    return rows.without([*settled, *lost]), emissions
