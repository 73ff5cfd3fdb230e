"""The batch of running texts: each pass of the model reads, classifies and generates.

A pass reads the next part of new prompts (``read_on``) or the newest token of each text in a group
(``decode``), in the model's thread; requests begin in the event loop, while no pass runs.
Everything here is synchronous and independent of waiting callers.
"""

import sys
import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sidelight.engines.annotation import AnswerSpans, annotate_spans
from sidelight.engines.base import (
    Finished,
    FinishReason,
    GenerationError,
    PromptClassified,
    ResponseScored,
    TextDelta,
)
from sidelight.engines.queue import Emission, Request
from sidelight.engines.text import Detokenizer, Sampler, StopGate, TextCodec
from sidelight.models.conversation import EncodedPrompt, TokenRole
from sidelight.probes.bank import BankState, ProbeBanks
from sidelight.states.reader import Tap
from sidelight.types import Verdicts


class CachedRows(Protocol):
    """The decoder's cache of texts that are generated together, row by row."""

    def select(self, rows: Sequence[int]) -> Self:
        """Only these rows, in this order."""
        ...

    def joined(self, rows: Self) -> Self:
        """Concatenate the rows of both."""
        ...


CacheRows = TypeVar("CacheRows", covariant=True)
PromptPasses = Generator[
    None, None, tuple[Float[Tensor, "row vocabulary"], Bool[Tensor, "batch token"], CacheRows]
]
"""Passes over some prompts, with a yield between passes; see ``Decoder.read_prompts``."""


class Decoder(Protocol):
    """Runs the model: takes tokens, and returns the logits of the last position of each row.

    Attributes:
        end_tokens: Ids that end a turn; they are counted, but are not part of the text.
    """

    end_tokens: frozenset[int]

    def read_prompts(
        self,
        prompts: Sequence[EncodedPrompt],
        tap: Tap | None,
        *,
        width: int | None = None,
        layers: int | None = None,
    ) -> PromptPasses[CachedRows]:
        """Read some prompts, with a yield between passes.

        Args:
            prompts: One row per prompt.
            tap: Sees the hidden states of each pass.
            width: Maximum tokens of a prompt per pass; None reads all at once.
            layers: Number of hidden states per token that the tap needs, if nothing is generated
                after the prompts; the passes may stop there, without logits. None means complete
                passes.

        Returns:
            The logits after each prompt; for the positions that the tap saw, prompt by prompt,
            whether they contain a token; and the rows.
        """
        ...

    def read_step(
        self, tokens: Sequence[int], rows: Any, tap: Tap | None
    ) -> Float[Tensor, "row vocabulary"]:
        """One pass over the newest token of each row, which is added to ``rows``."""
        ...


class Generation:
    """A text that is being generated.

    Attributes:
        state: State of the response probes; None without any.
        sampler: Sampler of the next token.
        tokens: Number of sampled tokens.
        classification_s: Seconds that the probes took in its passes after the prompt.
        last_token: The newest token, which the next pass reads.
        reason: Why the text is complete; None until it is.
        is_finished: Whether the text is complete and the monitored probes have read all of it.
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
        self.classification_s = 0.0
        self.last_token = 0
        self.reason: FinishReason | None = None
        self.is_finished = False
        self._text_tokens = 0
        self._end_tokens = end_tokens
        self._detokenizer = Detokenizer(codec.decode)
        self._answer_spans = AnswerSpans(request.banks.probes)
        self._gate = StopGate(request.sampling.stop)

    def accept(self, token: int) -> TextDelta | None:
        """Add the sampled token, and return the text that can now be sent."""
        self.last_token = token
        self.tokens += 1
        if token in self._end_tokens:
            self.reason, self.is_finished = "stop", True
            text = self._gate.flush()
        else:
            self._text_tokens += 1
            text = self._detokenizer.push(token)
            self._answer_spans.push(text)
            text = self._gate.push(text)
            if self._gate.is_closed:
                self.reason = "stop"
            elif self.tokens == self.request.max_tokens:
                self.reason = "length"
                text += self._gate.flush()
            # The last token of a monitored text has yet to be read.
            self.is_finished = self.reason is not None and not self.request.monitored
        return TextDelta(text, tokens=self._text_tokens) if text else None

    def scored(self, verdicts: Verdicts) -> ResponseScored:
        """The verdicts of the monitored probes on all tokens read so far."""
        monitored_verdicts = self._answer_spans.annotate(verdicts.of(self.request.monitored))
        return ResponseScored(
            self.tokens,
            monitored_verdicts,
            final_characters=self._answer_spans.final_characters(self.tokens),
            classification_s=self.classification_s,
        )

    def finished(self, verdicts: Verdicts) -> Finished:
        """The last event of a finished text."""
        assert self.reason is not None
        return Finished(
            reason=self.reason,
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self.tokens,
            verdicts=self._answer_spans.annotate(verdicts),
            classification_s=self.classification_s,
            is_stopped=self.last_token not in self._end_tokens,
        )


Prefill = tuple[Request, ...]
"""Requests with the same banks whose prompts are read together."""


@dataclass(frozen=True)
class Rows:
    """Texts that are generated together, and their cache."""

    generations: list[Generation]
    cached: CachedRows

    @property
    def requests(self) -> list[Request]:
        return [generation.request for generation in self.generations]

    def without(self, gone: Collection[Generation]) -> "Rows | None":
        """The rows without these; None if none are left."""
        left = [i for i, generation in enumerate(self.generations) if generation not in gone]
        if not left:
            return None
        return Rows([self.generations[i] for i in left], self.cached.select(left))

    def joined(self, rows: "Rows") -> "Rows":
        return Rows([*self.generations, *rows.generations], self.cached.joined(rows.cached))


Group = tuple[ProbeBanks, int]
"""What texts that are written together have in common: the probes, and a bound of their prompts'
length. A short text beside a long one would be padded to its length."""
_LENGTHS = (512, 2048, 8192, 32768, sys.maxsize)


class Batch:
    """Texts that enter when their prompts are read and leave when they are complete.

    Texts with the same probes and similar lengths are generated together. After a change of the
    probes, there are several ``ProbeBanks`` until the texts that began before it are complete.

    Args:
        decoder: Decoder that runs the model.
        codec: Codec for the generated tokens.
        prefill_tokens: Prompt tokens per pass.

    Attributes:
        prefills: Prompts that are being read, in the order of ``begin``, each with the iterator
            that reads its next part.
        rows: Texts that are being generated.
    """

    def __init__(self, decoder: Decoder, codec: TextCodec, *, prefill_tokens: int):
        self._decoder = decoder
        self._codec = codec
        self._prefill_tokens = prefill_tokens
        self.prefills: dict[Prefill, Generator[None, None, list[Emission]]] = {}
        self.rows: dict[Group, Rows] = {}

    @property
    def requests(self) -> list[Request]:
        """The requests whose prompts are being read or whose texts are being generated."""
        # A copy, because the load is read while the model's thread adds rows.
        written = [*self.rows.values()]
        works = [*self.prefills, *(rows.requests for rows in written)]
        return [request for work in works for request in work]

    def begin(self, requests: Sequence[Request]) -> None:
        """Add prompts, which are read together if they have the same banks."""
        for banks in dict.fromkeys(request.banks for request in requests):
            members = tuple(request for request in requests if request.banks is banks)
            self.prefills[members] = self._prefill(members)

    def drop(self, requests: Collection[Request]) -> None:
        """Stop these requests and free their resources.

        A prompt that is being read together with others is dropped when their prefill ends.
        """
        gone = {*requests}
        self.prefills = {
            each: chunks for each, chunks in self.prefills.items() if not {*each} <= gone
        }
        for group, rows in [*self.rows.items()]:
            self._put(group, rows.without([g for g in rows.generations if g.request in gone]))

    def read_on(self, prefill: Prefill) -> list[Emission]:
        """Read the next part of these prompts."""
        try:
            next(self.prefills[prefill])
        except StopIteration as end:
            del self.prefills[prefill]
            return end.value
        return []

    def _prefill(self, requests: Sequence[Request]) -> Generator[None, None, list[Emission]]:
        """Read prompts in one or more passes, classify them, and generate the first tokens.

        The running texts are changed last, once everything has succeeded.

        Args:
            requests: Requests with the same banks.
        """
        banks = requests[0].banks
        prompts = [request.prompt for request in requests]
        tap = banks.prompt_tap()
        each, longest = self._prefill_tokens // len(prompts), max(map(len, prompts))
        is_written = not all(request.is_check for request in requests)
        logits, is_token, cached = yield from self._decoder.read_prompts(
            prompts,
            tap,
            width=max(1, each),
            layers=None if tap is None or is_written else tap.depth,
        )
        begin = _clock(logits.device)
        projections = (
            tap.projected()[is_token] if tap else torch.empty(sum(map(len, prompts)), 0, 0)
        )
        text_verdicts, states = _classify(banks, requests, projections)
        explanations = [
            banks.explain(of_request, request.prompt, request.explain)
            for request, of_request in zip(
                requests, projections.split([*map(len, prompts)]), strict=True
            )
        ]
        classification_s = time.perf_counter() - begin + (tap.seconds if tap else 0.0)
        emissions: list[Emission] = []
        entering: list[int] = []
        for i, (request, verdicts) in enumerate(zip(requests, text_verdicts, strict=True)):
            event = PromptClassified(
                verdicts,
                request.prompt,
                explanations=explanations[i],
                classification_s=classification_s,
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
        left, written = _write(banks, Rows(new, cached.select(entering)), logits[entering])
        group = (banks, next(most for most in _LENGTHS if longest <= most))
        running = self.rows.get(group)
        self._put(group, running.joined(left) if running and left else running or left)
        return emissions + written

    def decode(self, group: Group) -> list[Emission]:
        """Read the newest token of each text, classify the response so far, and sample the next
        token.
        """
        banks, rows = group[0], self.rows[group]
        scored, logits = self._read_step(banks, rows)
        left, written = _write(banks, rows, logits)
        self._put(group, left)
        return scored + written

    def _read_step(
        self, banks: ProbeBanks, rows: Rows
    ) -> tuple[list[Emission], Float[Tensor, "row vocabulary"]]:
        generations = rows.generations
        monitored = [generation for generation in generations if generation.request.monitored]
        tap = banks.response_tap()
        newest = [generation.last_token for generation in generations]
        logits = self._decoder.read_step(newest, rows.cached, tap)
        begin = _clock(logits.device)
        projections = tap.projected()[:, 0] if tap else torch.empty(0, 0, 0)
        token_roles = [bytes([TokenRole.RESPONSE])] * len(generations)
        states = banks.read(projections, token_roles, [g.state for g in generations])
        for generation, state in zip(generations, states, strict=True):
            generation.state = state
        text_verdicts = _classify_responses(banks, monitored)
        classification_s = time.perf_counter() - begin + (tap.seconds if tap else 0.0)
        for generation in generations:
            # Every row has waited for the probes of all rows.
            generation.classification_s += classification_s
            generation.is_finished = generation.reason is not None
        scored: list[Emission] = []
        for generation, verdicts in zip(monitored, text_verdicts, strict=True):
            scored.append(Emission(generation.request, generation.scored(verdicts)))
        return scored, logits

    def _put(self, group: Group, rows: Rows | None) -> None:
        if rows is None:
            self.rows.pop(group, None)
        else:
            self.rows[group] = rows


def _classify(
    banks: ProbeBanks,
    requests: Sequence[Request],
    projections: Float[Tensor, "token layer projection"],
) -> tuple[list[Verdicts], list[BankState | None]]:
    """The verdicts on prompts, and the states of the response probes after them.

    Args:
        banks: Banks of the requests.
        requests: Requests whose prompts have been read.
        projections: Projections of all tokens of the prompts, concatenated.
    """
    prompts = [request.prompt for request in requests]
    text_verdicts = banks.classify_prompts(projections, prompts)
    token_roles = [bytes(prompt.token_roles) for prompt in prompts]
    states = banks.read(projections, token_roles, [None] * len(requests))
    answered = [i for i, request in enumerate(requests) if request.has_response]
    response_verdicts = banks.classify_responses(
        [states[i] for i in answered], [prompts[i] for i in answered]
    )
    for i, verdicts in zip(answered, response_verdicts, strict=True):
        text_verdicts[i] |= verdicts
    annotated = [
        annotate_spans(verdicts, banks.probes, prompt)
        for prompt, verdicts in zip(prompts, text_verdicts, strict=True)
    ]
    return annotated, states


def _classify_responses(banks: ProbeBanks, generations: Sequence[Generation]) -> list[Verdicts]:
    prompts = [generation.request.prompt for generation in generations]
    return banks.classify_responses([generation.state for generation in generations], prompts)


def _write(
    banks: ProbeBanks, rows: Rows, logits: Float[Tensor, "row vocabulary"]
) -> tuple[Rows | None, list[Emission]]:
    """Sample a token for each incomplete text, and finish the complete ones.

    Returns:
        The rows that continue, and the emissions.
    """
    emissions: list[Emission] = []
    lost: list[Generation] = []
    writing = [i for i, generation in enumerate(rows.generations) if generation.reason is None]
    if writing:
        logits = logits[writing]
        generations = [rows.generations[i] for i in writing]
        drawn = torch.stack([g.sampler(row) for g, row in zip(generations, logits, strict=True)])
        # In float16, a logit overflows to infinity before others become NaN.
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
    finished = [generation for generation in rows.generations if generation.is_finished]
    begin = time.perf_counter()
    text_verdicts = _classify_responses(banks, finished)
    classification_s = time.perf_counter() - begin
    for generation in rows.generations:
        generation.classification_s += classification_s
    for generation, verdicts in zip(finished, text_verdicts, strict=True):
        emissions.append(Emission(generation.request, generation.finished(verdicts), is_last=True))
    return rows.without([*finished, *lost]), emissions


def _clock(device: torch.device) -> float:
    """Current time in seconds, after synchronising the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
