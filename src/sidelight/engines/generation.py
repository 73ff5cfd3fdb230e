"""One request being written: its tokens, its text, and when it is complete."""

from collections.abc import Callable, Sequence

from jaxtyping import Float, Int
from torch import Tensor

from sidelight.engines.detokenizer import Detokenizer, StopGate
from sidelight.engines.events import FinishReason, TextDelta
from sidelight.engines.line import Request
from sidelight.engines.logprobs import Spelling, TokenLogprobs, Trail, odds_of
from sidelight.engines.sampler import Sampler


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
