"""The requests being written, and the two forward passes: over new prompts, and one token more.

Synchronous and owned by one thread; knows nothing of callers that wait.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.backbones import TransformersBackbone
from sidelight.bank import BankState
from sidelight.engines.base import (
    Event,
    Finished,
    GenerationError,
    PromptJudged,
    TextDelta,
)
from sidelight.engines.cached_rows import CachedRows
from sidelight.engines.decoder import Decoder
from sidelight.engines.generation import Generation
from sidelight.engines.judging import Judgement, Judges, Watch
from sidelight.engines.line import Request
from sidelight.errors import SidelightError
from sidelight.probe import Probe


@dataclass(frozen=True)
class Failed:
    """The request is lost."""

    error: SidelightError


@dataclass(frozen=True)
class Emission:
    """Something that happened to a request."""

    request: Request
    event: Event | Failed


@dataclass(frozen=True)
class _Rows:
    """The running requests, row by row.

    Attributes:
        generations: What has been written.
        cached: Keys and values.
        state: What the probes of the response have read.
    """

    generations: list[Generation]
    cached: CachedRows
    state: BankState


class Batch:
    """Rows that enter after their prefill and leave when their text is complete.

    Args:
        backbone: The model.
        probes: What judges the texts.
    """

    def __init__(self, backbone: TransformersBackbone, probes: Sequence[Probe]):
        self._decoder = Decoder(backbone)
        early = [probe for probe in probes if probe.reads.side == "prompt"]
        late = [probe for probe in probes if probe.reads.side != "prompt"]
        self._early = Judges(early, device=backbone.device)
        self._late = Judges(late, device=backbone.device)
        self._rows: _Rows | None = None

    @property
    def requests(self) -> list[Request]:
        """What is being written."""
        return [g.request for g in self._rows.generations] if self._rows else []

    def clear(self) -> None:
        """Forgets all rows."""
        self._rows = None

    def drop(self, requests: Collection[Request]) -> list[Emission]:
        """Frees the rows of these requests."""
        if self._rows is not None:
            alive = [i for i, request in enumerate(self.requests) if request not in requests]
            self._rows = self._kept(self._rows, alive)
        return []

    def prefill(self, requests: Sequence[Request]) -> list[Emission]:
        """Reads whole prompts in one pass; the running rows change last, once all went well."""
        prompts = [request.prompt for request in requests]
        early, late = self._early.taps(), self._late.taps()
        logits, cached = self._decoder.read_prompts(prompts, Watch([*early, *late]))
        read_early = self._early.read_prompts(early, prompts)
        read_late = self._late.read_prompts(late, prompts)
        emissions = self._judge_prompts(requests, read_early, read_late)
        written = [i for i, request in enumerate(requests) if not request.is_check]
        if written:
            generations = [self._begin(requests[i]) for i in written]
            rows = _Rows(generations, cached.kept(written), self._late.kept(read_late, written))
            entering, texts = self._write(rows, logits[written])
            self._rows = _joined(self._rows, entering)
            emissions += texts
        return emissions

    def decode(self) -> list[Emission]:
        """Reads each row's newest token and writes the next."""
        assert self._rows is not None
        rows = self._rows
        taps = self._late.taps()
        tokens = [generation.last_token for generation in rows.generations]
        logits = self._decoder.read_step(tokens, rows.cached, Watch(taps))
        state = self._late.read_step(taps, rows.state)
        self._rows, emissions = self._write(_Rows(rows.generations, rows.cached, state), logits)
        return emissions

    def _begin(self, request: Request) -> Generation:
        return Generation(request, decode=self._decoder.decode, end_tokens=self._decoder.end_tokens)

    def _judge_prompts(
        self, requests: Sequence[Request], early: BankState, late: BankState
    ) -> list[Emission]:
        judgements = self._early.judge(early, range(len(requests)))
        answered = [i for i, request in enumerate(requests) if request.has_response]
        for row, judgement in zip(answered, self._late.judge(late, answered), strict=True):
            judgements[row] += judgement
        return [
            Emission(request, PromptJudged(judgement.verdicts, judgement.failed))
            for request, judgement in zip(requests, judgements, strict=True)
        ]

    def _write(
        self, rows: _Rows, logits: Float[Tensor, "row vocabulary"]
    ) -> tuple[_Rows | None, list[Emission]]:
        """Draws a token for each row; the rows that go on, and what happened."""
        drawn = [g.draw(row) for g, row in zip(rows.generations, logits, strict=True)]
        broken = logits.isnan().any(dim=1).tolist()
        emissions: list[Emission] = []
        for generation, token, is_broken in zip(
            rows.generations, torch.stack(drawn).tolist(), broken, strict=True
        ):
            emissions += [_overflow(generation)] if is_broken else _accept(generation, token)
        complete = [i for i, g in enumerate(rows.generations) if g.reason and not broken[i]]
        judgements = self._late.judge(rows.state, complete)
        for row, judgement in zip(complete, judgements, strict=True):
            emissions.append(_finish(rows.generations[row], judgement))
        alive = [i for i, g in enumerate(rows.generations) if not g.reason and not broken[i]]
        return self._kept(rows, alive), emissions

    def _kept(self, rows: _Rows, alive: Sequence[int]) -> _Rows | None:
        if not alive:
            return None
        if len(alive) == len(rows.generations):
            return rows
        return _Rows(
            [rows.generations[row] for row in alive],
            rows.cached.kept(alive),
            self._late.kept(rows.state, alive),
        )


def _joined(running: _Rows | None, entering: _Rows | None) -> _Rows | None:
    if running is None or entering is None:
        return running or entering
    return _Rows(
        [*running.generations, *entering.generations],
        running.cached.joined(entering.cached),
        BankState.pack([running.state, entering.state]),
    )


def _accept(generation: Generation, token: int) -> list[Emission]:
    text = generation.accept(token)
    return [Emission(generation.request, TextDelta(text))] if text else []


def _finish(generation: Generation, judgement: Judgement) -> Emission:
    assert generation.reason is not None
    finished = Finished(
        reason=generation.reason,
        prompt_tokens=len(generation.request.prompt),
        completion_tokens=generation.tokens,
        verdicts=judgement.verdicts,
        failed=judgement.failed,
    )
    return Emission(generation.request, finished)


def _overflow(generation: Generation) -> Emission:
    message = (
        "The model's logits are not numbers, so no token can be drawn. Serve it in bfloat16 or "
        "float32; float16 overflows in some models."
    )
    return Emission(generation.request, Failed(GenerationError(message)))
