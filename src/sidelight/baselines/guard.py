"""A guard model by URL, asked over chat completions. Texts leave the machine."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float

from sidelight.baselines.base import Baseline, Rival
from sidelight.data import Example
from sidelight.errors import SidelightError, VerdictError
from sidelight.study import Split, Study

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

_FLAGGED = ("unsafe", "yes")
_HARMLESS = ("safe", "no")
# The least probability of either, so that a word that is not listed leaves the ratio finite.
_MARGIN = 1e-6
# Answers that say neither; with a larger share of them the scores mean nothing.
_UNDECIDED_SHARE = 0.05


@dataclass(frozen=True)
class GuardEndpoint(Baseline):
    """A chat model whose answer begins with ``safe`` or ``unsafe``, or with ``yes`` or ``no``.

    Unsafe and yes are the positive class. The logit is the log-ratio of the words' probabilities
    where the server gives them, else a large number with the answer's sign.

    Attributes:
        url: Of the server, up to and with ``/v1``.
        model: Name of the guard.
        prompt: What is asked, with ``{text}`` where the text goes; None sends the conversation as
            it is, for guards whose chat template asks the question (Llama Guard).
        key_env: Environment variable that holds the key; it may be unset where none is needed.
        alternatives: Log-probabilities asked for; 0 for servers that give none.
        max_tokens: Of the answer.
        concurrency: Requests at a time.
        retries: Of a request that fails on the way or by overload.
        timeout_s: For one try.
    """

    title: ClassVar[str] = "Guard endpoint"
    is_single_pass: ClassVar[bool] = False
    url: str
    model: str
    prompt: str | None = None
    key_env: str = "OPENAI_API_KEY"
    alternatives: int = 20
    max_tokens: int = 8
    concurrency: int = 4
    retries: int = 5
    timeout_s: float = 120.0

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Fits nothing.

        Raises:
            SidelightError: The task is not binary, or the prompt has no place for the text.
        """
        from sidelight.baselines.service import require_binary

        require_binary(self.title, study.task)
        if self.prompt is not None and "{text}" not in self.prompt:
            raise SidelightError("The guard's prompt has no {text}: put it where the text goes.")
        return _Guarded(0, self)

    def score(self, client: "OpenAI", item: Example) -> float:
        """The log-odds of one text; NaN where the answer says neither."""
        listed: dict[str, Any] = (
            {"logprobs": True, "top_logprobs": self.alternatives} if self.alternatives else {}
        )
        answer = client.chat.completions.create(
            model=self.model,
            messages=self._turns(item),
            max_tokens=self.max_tokens,
            temperature=0,
            **listed,
        )
        return _log_ratio(_first_word(answer))

    def _turns(self, item: Example) -> Any:
        response = [] if item.response is None else [item.response]
        if self.prompt is not None:
            text = "\n".join([item.text, *response])
            return [{"role": "user", "content": self.prompt.replace("{text}", text)}]
        turns = [{"role": turn.role, "content": turn.content} for turn in item.messages]
        return turns + [{"role": "assistant", "content": text} for text in response]


@dataclass(frozen=True)
class _Guarded(Rival):
    endpoint: GuardEndpoint

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        """Answers that say neither count as even odds, as long as they are rare."""
        from sidelight.baselines.service import Service

        asked = self.endpoint
        service = Service(
            asked.url, asked.key_env, asked.concurrency, asked.retries, asked.timeout_s
        )
        logits = service.ask(asked.score, split.examples.items, title=asked.title)
        undecided = int(np.isnan(logits).sum())
        if undecided > _UNDECIDED_SHARE * len(logits):
            raise VerdictError(
                f"{undecided} of {len(logits)} answers of {asked.model} begin with none of "
                f"{', '.join(_FLAGGED + _HARMLESS)}. Ask for one of them in the prompt."
            )
        return np.nan_to_num(logits)


def _first_word(answer: "ChatCompletion") -> Mapping[str, float]:
    """What the answer may begin with, blank tokens aside, and how probable each is."""
    choice = answer.choices[0]
    for token in (choice.logprobs.content if choice.logprobs else None) or ():
        if token.token.strip() and token.top_logprobs:
            return {each.token: math.exp(each.logprob) for each in token.top_logprobs}
    words = (choice.message.content or "").split(maxsplit=1)
    return dict.fromkeys(words[:1], 1.0)


def _log_ratio(chances: Mapping[str, float]) -> float:
    flagged = _share(chances, _FLAGGED)
    harmless = _share(chances, _HARMLESS)
    if flagged == harmless == 0:
        return math.nan
    return math.log(max(flagged, _MARGIN)) - math.log(max(harmless, _MARGIN))


def _share(chances: Mapping[str, float], words: Sequence[str]) -> float:
    """The probability of the first pieces of these words."""
    pieces = {token: token.strip().strip(".,:;!*\"'").casefold() for token in chances}
    return math.fsum(
        chance
        for token, chance in chances.items()
        if pieces[token] and any(word.startswith(pieces[token]) for word in words)
    )
