"""One request being written: its tokens, its text, and when it is complete.

The requests being written, and the two forward passes: over new prompts, and one token more.

Synchronous and owned by one thread; knows nothing of callers that wait.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.backbone import TransformersBackbone
from sidelight.bank import BankState
from sidelight.engines.base import (
    Event,
    Finished,
    FinishReason,
    GenerationError,
    PromptJudged,
    ResponseScored,
    Stopwatch,
    TextDelta,
)
from sidelight.engines.decoder import CachedRows, Decoder
from sidelight.engines.judging import Judgement, Panel, TimedTaps
from sidelight.engines.logprobs import Spelling, TokenLogprobs, Trail, odds_of
from sidelight.engines.queue import Request
from sidelight.engines.text import Detokenizer, Sampler, StopGate
from sidelight.errors import SidelightError


class Generation:
    """What has been written for a request.

    Args:
        request: What to write.
        decode: Token ids to text, special tokens left out.
        end_tokens: Ids that end a turn; they are counted, and no part of the text.
        spell: What a token stands for.

    Attributes:
        tokens: How many have been sampled.
        text_tokens: How many of them have a part in the text: all but an end-of-turn token.
        judging_s: Seconds that the probes took in its steps after the prompt.
        last_token: The newest; the next step reads it.
        reason: Why the text is complete; None while it is not.
        is_settled: Whether it is complete and nothing of the text is still to be read for the
            probes that are watched.
    """

    def __init__(
        self,
        request: Request,
        *,
        decode: Callable[[Sequence[int]], str],
        end_tokens: frozenset[int],
        spell: Callable[[int], Spelling],
    ):
        self.request = request
        self.tokens = 0
        self.text_tokens = 0
        self.judging_s = 0.0
        self.last_token = 0
        self.reason: FinishReason | None = None
        self.is_settled = False
        self._end_tokens = end_tokens
        self._sampler = Sampler(request.sampling)
        self._detokenizer = Detokenizer(decode)
        self._gate = StopGate(request.sampling.stop)
        self._trail = Trail(spell)

    @property
    def rest(self) -> tuple[TokenLogprobs, ...]:
        """Of a complete text: what is told of its last tokens where no text came from them."""
        return () if self._gate.is_closed else self._trail.rest()

    def draw(self, logits: Float[Tensor, " vocabulary"]) -> Int[Tensor, ""]:
        """The next token; ``accept`` takes it."""
        return self._sampler(logits)

    def accept(self, token: int, logits: Float[Tensor, " vocabulary"]) -> TextDelta | None:
        """Counts the token that was drawn from ``logits``; the text that can now be sent."""
        self.last_token = token
        self.tokens += 1
        text = self._end() if token in self._end_tokens else self._go_on(token, logits)
        if not text:
            return None
        return TextDelta(text, tokens=self.text_tokens, logprobs=self._trail.told(len(text)))

    def _end(self) -> str:
        self.reason = "stop"
        self.is_settled = True
        return self._gate.flush()

    def _go_on(self, token: int, logits: Float[Tensor, " vocabulary"]) -> str:
        self.text_tokens += 1
        new = self._detokenizer.push(token)
        if (count := self.request.sampling.logprobs) is not None:
            self._trail.add(odds_of(logits, token, count=count), characters=len(new))
        text = self._gate.push(new)
        if self._gate.is_closed:
            self.reason = "stop"
        elif self.tokens == self.request.max_tokens:
            self.reason = "length"
            text += self._gate.flush()
        # The last token of a watched text has one more step to be read in.
        self.is_settled = self.reason is not None and not self.request.watch
        return text


@dataclass(frozen=True)
class Failed:
    """The request is lost."""

    error: SidelightError


@dataclass(frozen=True)
class Emission:
    """Something that happened to a request.

    Attributes:
        request: Which.
        event: What.
        is_last: Whether nothing follows.
    """

    request: Request
    event: Event | Failed
    is_last: bool = False


@dataclass(frozen=True)
class _Rows:
    """The running requests of one panel, row by row.

    Attributes:
        panel: The probes that judge them.
        generations: What has been written.
        cached: Keys and values.
        state: What the probes of the response have read.
    """

    panel: Panel
    generations: list[Generation]
    cached: CachedRows
    state: BankState


class Batch:
    """Rows that enter after their prefill and leave when their text is complete.

    Rows of another panel run by themselves: that lasts from a change of the probes until the texts
    that began before it are complete.

    Args:
        backbone: The model.
    """

    def __init__(self, backbone: TransformersBackbone):
        self._decoder = Decoder(backbone)
        self._groups: list[_Rows] = []

    @property
    def requests(self) -> list[Request]:
        """What is being written."""
        return [g.request for rows in self._groups for g in rows.generations]

    def clear(self) -> None:
        """Forgets all rows."""
        self._groups = []

    def drop(self, requests: Collection[Request]) -> list[Emission]:
        """Frees the rows of these requests."""
        self._groups = [
            kept
            for rows in self._groups
            if (kept := _kept(rows, [g.request not in requests for g in rows.generations]))
        ]
        return []

    def prefill(self, requests: Sequence[Request]) -> list[Emission]:
        """Reads whole prompts in one pass; the running rows change last, once all went well.

        Args:
            requests: All of one panel.
        """
        panel = requests[0].panel
        prompts = [request.prompt for request in requests]
        early, late = panel.early.taps(), panel.late.taps()
        stopwatch = Stopwatch()
        logits, cached = self._decoder.read_prompts(prompts, TimedTaps([*early, *late], stopwatch))
        with stopwatch.running(after=logits.device):
            read_early = panel.early.read_prompts(early, prompts)
            read_late = panel.late.read_prompts(late, prompts)
            judgements = _judge_prompts(requests, read_early, read_late)
        emissions = [
            _judged(request, own, stopwatch.seconds)
            for request, own in zip(requests, judgements, strict=True)
        ]
        written = [i for i, emission in enumerate(emissions) if not emission.is_last]
        if written:
            generations = [self._begin(requests[i]) for i in written]
            state = panel.late.kept(read_late, written)
            rows = _Rows(panel, generations, cached.kept(written), state)
            entering, texts = _write(rows, logits[written])
            self._groups = _joined(self._groups, entering)
            emissions += texts
        return emissions

    def decode(self) -> list[Emission]:
        """Reads each row's newest token and writes the next."""
        steps = [self._step(rows) for rows in self._groups]
        self._groups = [rows for rows, _ in steps if rows]
        return [emission for _, emissions in steps for emission in emissions]

    def _step(self, rows: _Rows) -> tuple[_Rows | None, list[Emission]]:
        late = rows.panel.late
        taps = late.taps()
        tokens = [generation.last_token for generation in rows.generations]
        stopwatch = Stopwatch()
        logits = self._decoder.read_step(tokens, rows.cached, TimedTaps(taps, stopwatch))
        with stopwatch.running(after=logits.device if taps else None):
            read = replace(rows, state=late.read_step(taps, rows.state))
            scores = _score(read)
        _charge(read, stopwatch)
        emissions = [_scored(generation, judgement) for generation, judgement in scores]
        # What was complete but for the reading of its last token.
        writing = [generation.reason is None for generation in rows.generations]
        emissions += _finish(read, [i for i, goes_on in enumerate(writing) if not goes_on])
        going_on = _kept(read, writing)
        if going_on is None:
            return None, emissions
        left, texts = _write(going_on, logits[torch.tensor(writing, device=logits.device)])
        return left, emissions + texts

    def _begin(self, request: Request) -> Generation:
        decoder = self._decoder
        return Generation(
            request, decode=decoder.decode, end_tokens=decoder.end_tokens, spell=decoder.spell
        )


def _judge_prompts(
    requests: Sequence[Request], early: BankState, late: BankState
) -> list[Judgement]:
    panel = requests[0].panel
    judgements = panel.early.judge(early, range(len(requests)))
    answered = [i for i, request in enumerate(requests) if request.has_response]
    for row, judgement in zip(answered, panel.late.judge(late, answered), strict=True):
        judgements[row] += judgement
    return judgements


def _judged(request: Request, judgement: Judgement, judging_s: float) -> Emission:
    event = PromptJudged(
        judgement.verdicts, judgement.failed, tokens=len(request.prompt), judging_s=judging_s
    )
    return Emission(request, event, is_last=request.is_check or not request.admits(event))


def _charge(rows: _Rows, stopwatch: Stopwatch) -> None:
    """Every row has waited for the probes of all."""
    for generation in rows.generations:
        generation.judging_s += stopwatch.seconds


def _score(rows: _Rows) -> list[tuple[Generation, Judgement]]:
    """The running verdicts of the rows whose probes are watched."""
    watched = [i for i, g in enumerate(rows.generations) if g.request.watch]
    judgements = rows.panel.late.judge(rows.state, watched)
    return [(rows.generations[i], own) for i, own in zip(watched, judgements, strict=True)]


def _scored(generation: Generation, judgement: Judgement) -> Emission:
    said = judgement.of(generation.request.watch)
    event = ResponseScored(generation.tokens, said.verdicts, said.failed, generation.judging_s)
    return Emission(generation.request, event)


def _write(
    rows: _Rows, logits: Float[Tensor, "row vocabulary"]
) -> tuple[_Rows | None, list[Emission]]:
    """Draws a token for each row; the rows that go on, and what happened."""
    drawn = [g.draw(row) for g, row in zip(rows.generations, logits, strict=True)]
    # In float16 a logit overflows to infinity before others become not a number.
    broken = (logits.isnan() | logits.isposinf()).any(dim=1).tolist()
    emissions: list[Emission] = []
    for generation, token, row, is_broken in zip(
        rows.generations, torch.stack(drawn).tolist(), logits, broken, strict=True
    ):
        emissions += [_overflow(generation)] if is_broken else _accept(generation, token, row)
    settled = [g.is_settled and not b for g, b in zip(rows.generations, broken, strict=True)]
    emissions += _finish(rows, [i for i, is_settled in enumerate(settled) if is_settled])
    alive = [not s and not b for s, b in zip(settled, broken, strict=True)]
    return _kept(rows, alive), emissions


def _kept(rows: _Rows, alive: Sequence[bool]) -> _Rows | None:
    """Those of the rows that are alive."""
    if all(alive):
        return rows
    left = [i for i, is_alive in enumerate(alive) if is_alive]
    if not left:
        return None
    return _Rows(
        rows.panel,
        [rows.generations[row] for row in left],
        rows.cached.kept(left),
        rows.panel.late.kept(rows.state, left),
    )


def _joined(groups: Sequence[_Rows], entering: _Rows | None) -> list[_Rows]:
    """The rows in the group of their panel."""
    if entering is None:
        return list(groups)
    others = [rows for rows in groups if rows.panel is not entering.panel]
    running = next((rows for rows in groups if rows.panel is entering.panel), None)
    if running is None:
        return [*others, entering]
    joined = _Rows(
        entering.panel,
        [*running.generations, *entering.generations],
        running.cached.joined(entering.cached),
        BankState.pack([running.state, entering.state]),
    )
    return [*others, joined]


def _finish(rows: _Rows, complete: Sequence[int]) -> list[Emission]:
    stopwatch = Stopwatch()
    with stopwatch.running():
        judgements = rows.panel.late.judge(rows.state, complete)
    _charge(rows, stopwatch)
    return [_finished(rows.generations[i], j) for i, j in zip(complete, judgements, strict=True)]


def _accept(
    generation: Generation, token: int, logits: Float[Tensor, " vocabulary"]
) -> list[Emission]:
    event = generation.accept(token, logits)
    return [Emission(generation.request, event)] if event else []


def _finished(generation: Generation, judgement: Judgement) -> Emission:
    assert generation.reason is not None
    finished = Finished(
        reason=generation.reason,
        prompt_tokens=len(generation.request.prompt),
        completion_tokens=generation.tokens,
        verdicts=judgement.verdicts,
        failed=judgement.failed,
        logprobs=generation.rest,
        judging_s=generation.judging_s,
    )
    return Emission(generation.request, finished, is_last=True)


def _overflow(generation: Generation) -> Emission:
    message = (
        "The model's logits are not finite, so no token can be drawn. Serve it in bfloat16 or "
        "float32; float16 overflows in some models."
    )
    return Emission(generation.request, Failed(GenerationError(message)), is_last=True)
