"""Services asked by URL through OpenAI's client: moderation endpoints and guard models.

Texts leave the machine. Neither texts nor keys are logged.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
from jaxtyping import Float
from openai import APIConnectionError, APIStatusError, OpenAI
from openai.types.chat import ChatCompletion

from sidelight.data.examples import Example
from sidelight.errors import SidelightError, VerdictError, did_you_mean
from sidelight.progress import progress
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.types import Task
from sidelight_lab.baselines.base import Baseline, FittedBaseline

Item = TypeVar("Item")

# Probabilities are kept this far from 0 and 1, so that log-odds are finite.
_MARGIN = 1e-6
_UNSAFE = ("unsafe", "yes")
_SAFE = ("safe", "no")
# If more answers than this share are neither safe nor unsafe, the scores mean nothing.
_UNDECIDED_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Endpoint(Baseline):
    """A service that scores texts.

    Attributes:
        url: The URL up to and including ``/v1``.
        key_env: Environment variable that holds the key; may be unset if no key is needed.
        concurrency: Number of requests at a time.
        retries: How often a request is repeated after a network failure or an overload.
        timeout_s: Limit of each try.
    """

    is_single_pass: ClassVar[bool] = False
    url: str
    key_env: str = "OPENAI_API_KEY"
    concurrency: int = 4
    retries: int = 5
    timeout_s: float = 60.0

    def require_binary(self, task: Task) -> None:
        """Raises a ``SidelightError`` unless the task has one positive class."""
        if task.kind != "binary":
            raise SidelightError(
                f"{self.title} separates one class from the rest, but the task is {task.kind} with "
                f"labels {', '.join(task.labels)}. Use it on a binary task, or use zero-shot "
                "prompting here."
            )

    def ask(
        self, score: Callable[[OpenAI, Item], float], items: Sequence[Item]
    ) -> Float[np.ndarray, "text 1"]:
        """One number for each item.

        Raises:
            SidelightError: No connection, or a request that was refused after all retries.
        """
        found: list[float] = []
        # The client insists on a key; a server that needs none ignores it.
        key = os.environ.get(self.key_env) or "none"
        with (
            OpenAI(
                base_url=self.url, api_key=key, max_retries=self.retries, timeout=self.timeout_s
            ) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
            progress(self.title, len(items), unit="texts") as shown,
        ):
            try:
                for value in pool.map(partial(score, client), items):
                    found.append(value)
                    shown.advance(1)
            except APIConnectionError as error:
                raise SidelightError(
                    f"Cannot reach {self.url} ({type(error).__name__}). Check the URL and that "
                    "the server runs."
                ) from None
            except APIStatusError as error:
                raise SidelightError(self._refusal(error.status_code)) from None
        return np.array(found)[:, None]

    def _refusal(self, status: int) -> str:
        """The error without the server's own words, which may repeat the text."""
        remedies = {
            400: "Check the model's name; for a server without log-probabilities, "
            "set alternatives=0.",
            401: f"Put a valid key into the environment variable {self.key_env}.",
            403: f"The key in {self.key_env} may not use this model.",
            404: "Check the URL (up to and including /v1) and the model's name.",
            429: "Lower the concurrency, or try again later.",
        }
        remedy = remedies.get(status, "Look at the server's log, or try again later.")
        return f"{self.url} answered {status} when asked about a text. {remedy}"


@dataclass(frozen=True, kw_only=True)
class ModerationEndpoint(Endpoint):
    """The score of any service that speaks OpenAI's ``/v1/moderations``.

    Attributes:
        model: Name of the model; None lets the service choose.
        category: The category whose score is taken; None takes the highest score.
    """

    title: ClassVar[str] = "Moderation endpoint"
    model: str | None = None
    category: str | None = None

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Fits nothing.

        Raises:
            SidelightError: The task is not binary.
        """
        self.require_binary(dataset.task)
        return FittedBaseline(lambda split: self.ask(self._score, split.texts), parameters=0)

    def _score(self, client: OpenAI, text: str) -> float:
        """The log-odds of one text."""
        named: dict[str, Any] = {"model": self.model} if self.model else {}
        result = client.moderations.create(input=text, **named).results[0]
        # A dict: services have categories that the client's types do not know.
        scores = {
            name: value
            for name, value in result.category_scores.to_dict().items()
            if isinstance(value, float | int)
        }
        if not scores:
            raise SidelightError(f"{self.url} gives no scores. Name a moderation model (model).")
        if self.category is not None and self.category not in scores:
            raise SidelightError(
                f"{self.url} gives no score for category '{self.category}'."
                f"{did_you_mean(self.category, scores)}"
            )
        chance = max(scores.values()) if self.category is None else scores[self.category]
        chance = min(max(chance, _MARGIN), 1 - _MARGIN)
        return math.log(chance) - math.log1p(-chance)


@dataclass(frozen=True, kw_only=True)
class GuardEndpoint(Endpoint):
    """A chat model whose answer begins with ``safe`` or ``unsafe``, or with ``yes`` or ``no``.

    Unsafe and yes are the positive class. The logit is the log-ratio of the words' probabilities
    where the server gives them, else a large number with the answer's sign.

    Attributes:
        model: Name of the guard.
        prompt: What is asked, with ``{text}`` where the text goes; None sends the conversation as
            it is, for guards whose chat template asks the question (Llama Guard).
        alternatives: How many log-probabilities to ask for; 0 for servers that give none.
        max_tokens: Longest answer.
    """

    title: ClassVar[str] = "Guard endpoint"
    model: str
    prompt: str | None = None
    alternatives: int = 20
    max_tokens: int = 8
    timeout_s: float = 120.0

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Fits nothing.

        Raises:
            SidelightError: The task is not binary, or the prompt has no place for the text.
        """
        self.require_binary(dataset.task)
        if self.prompt is not None and "{text}" not in self.prompt:
            raise SidelightError("The guard's prompt has no {text}: put it where the text goes.")
        return FittedBaseline(self._logits, parameters=0)

    def _logits(self, split: Split) -> Float[np.ndarray, "text 1"]:
        """The log-odds of all texts; a few undecided answers count as even odds."""
        logits = self.ask(self._score, split.examples.items)
        undecided = int(np.isnan(logits).sum())
        if undecided > _UNDECIDED_SHARE * len(logits):
            raise VerdictError(
                f"{undecided} of {len(logits)} answers of {self.model} do not begin with "
                f"{', '.join(_UNSAFE + _SAFE)}. Ask for one of these words in the prompt."
            )
        return np.nan_to_num(logits)

    def _score(self, client: OpenAI, item: Example) -> float:
        """The log-odds of one text; NaN if the answer is neither safe nor unsafe."""
        response = [] if item.response is None else [item.response]
        if self.prompt is None:
            turns = [{"role": turn.role, "content": turn.content} for turn in item.messages]
            turns += [{"role": "assistant", "content": text} for text in response]
        else:
            text = "\n".join([item.text, *response])
            turns = [{"role": "user", "content": self.prompt.replace("{text}", text)}]
        asked: dict[str, Any] = {"messages": turns}
        if self.alternatives:
            asked |= {"logprobs": True, "top_logprobs": self.alternatives}
        answer = client.chat.completions.create(
            model=self.model, max_tokens=self.max_tokens, temperature=0, **asked
        )
        chances = _first_word(answer)
        unsafe, safe = _chance_of(chances, _UNSAFE), _chance_of(chances, _SAFE)
        if unsafe == safe == 0:
            return math.nan
        return math.log(max(unsafe, _MARGIN)) - math.log(max(safe, _MARGIN))


def _first_word(answer: ChatCompletion) -> Mapping[str, float]:
    """The words that the answer may begin with, and the probability of each."""
    choice = answer.choices[0]
    for token in (choice.logprobs.content if choice.logprobs else None) or ():
        if token.token.strip() and token.top_logprobs:
            return {each.token: math.exp(each.logprob) for each in token.top_logprobs}
    words = (choice.message.content or "").split(maxsplit=1)
    return dict.fromkeys(words[:1], 1.0)


def _chance_of(chances: Mapping[str, float], words: Sequence[str]) -> float:
    """The probability that the answer begins with one of these words, or with a piece of it."""
    pieces = {token: token.strip().strip(".,:;!*\"'").casefold() for token in chances}
    return math.fsum(
        chance
        for token, chance in chances.items()
        if pieces[token] and any(word.startswith(pieces[token]) for word in words)
    )
