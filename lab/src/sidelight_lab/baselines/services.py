"""Asks an OpenAI-compatible service about many texts. Nothing of texts or keys is logged.

A moderation service by URL. Texts leave the machine.

A guard model by URL, asked over chat completions. Texts leave the machine.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from jaxtyping import Float
from openai import APIConnectionError, APIStatusError, OpenAI

from sidelight.data.examples import Example
from sidelight.errors import SidelightError, VerdictError, did_you_mean
from sidelight.progress import progress
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.types import Task
from sidelight_lab.baselines.base import Baseline, FittedBaseline

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion


Item = TypeVar("Item")


@dataclass(frozen=True)
class Service:
    """Where a service is, and how it is asked.

    Attributes:
        url: Up to and with ``/v1``.
        key_env: Environment variable that holds the key; it may be unset where none is needed.
        concurrency: Requests at a time.
        retries: Of a request that fails on the way or by overload.
        timeout_s: For one try.
    """

    url: str
    key_env: str
    concurrency: int
    retries: int
    timeout_s: float

    def ask(
        self, score: Callable[[OpenAI, Item], float], items: Sequence[Item], *, title: str
    ) -> Float[np.ndarray, "text 1"]:
        """One number for each item; a request that fails for good ends it.

        Raises:
            SidelightError: No connection, or a refusal.
        """
        found: list[float] = []
        with (
            self._client() as client,
            ThreadPoolExecutor(self.concurrency) as pool,
            progress(title, len(items), unit="texts") as shown,
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

    def _client(self) -> OpenAI:
        # The client insists on a key; a server that needs none ignores it.
        return OpenAI(
            base_url=self.url,
            api_key=os.environ.get(self.key_env) or "none",
            max_retries=self.retries,
            timeout=self.timeout_s,
        )

    def _refusal(self, status: int) -> str:
        """Without the server's own words, which may repeat the text."""
        remedies = {
            400: "Check the model's name; a server without log-probabilities needs alternatives=0.",
            401: f"Put a valid key into the environment variable {self.key_env}.",
            403: f"The key in {self.key_env} may not use this model.",
            404: "Check the URL (up to and with /v1) and the model's name.",
            429: "Lower the concurrency, or try again later.",
        }
        remedy = remedies.get(status, "Look at the server's log, or try again later.")
        return f"{self.url} answered {status} when asked about a text. {remedy}"


def require_binary(title: str, task: Task) -> None:
    """Raises a ``SidelightError`` unless the task has one positive class."""
    if task.kind != "binary":
        raise SidelightError(
            f"{title} tells one class from the rest, but the task is {task.kind} with labels "
            f"{', '.join(task.labels)}. Use it on a binary task, or zero-shot prompting here."
        )


# Probabilities are kept this far from 0 and 1, so that log-odds are finite.
_MARGIN = 1e-6


@dataclass(frozen=True)
class ModerationEndpoint(Baseline):
    """The score of any service that speaks OpenAI's ``/v1/moderations``.

    Attributes:
        url: Of the service, up to and with ``/v1``.
        model: Name sent along; None lets the service choose.
        key_env: Environment variable that holds the key; it may be unset where none is needed.
        category: Whose score is taken; None takes the highest of all.
        concurrency: Requests at a time.
        retries: Of a request that fails on the way or by overload.
        timeout_s: For one try.
    """

    title: ClassVar[str] = "Moderation endpoint"
    is_single_pass: ClassVar[bool] = False
    url: str
    model: str | None = None
    key_env: str = "OPENAI_API_KEY"
    category: str | None = None
    concurrency: int = 4
    retries: int = 5
    timeout_s: float = 60.0

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Fits nothing.

        Raises:
            SidelightError: The task is not binary.
        """
        pass

        require_binary(self.title, dataset.task)
        return _Moderated(0, self)

    def score(self, client: "OpenAI", text: str) -> float:
        """The log-odds of one text."""
        named: dict[str, Any] = {"model": self.model} if self.model else {}
        result = client.moderations.create(input=text, **named).results[0]
        # A dict: services have categories that the client's types do not know.
        scores = {
            name: value
            for name, value in result.category_scores.to_dict().items()
            if isinstance(value, float | int)
        }
        chance = min(max(self._chosen(scores), _MARGIN), 1 - _MARGIN)
        return math.log(chance) - math.log1p(-chance)

    def _chosen(self, scores: Mapping[str, float]) -> float:
        if not scores:
            raise SidelightError(f"{self.url} gives no scores. Name a moderation model (model).")
        if self.category is None:
            return max(scores.values())
        if self.category not in scores:
            raise SidelightError(
                f"{self.url} gives no score for category '{self.category}'."
                f"{did_you_mean(self.category, scores)}"
            )
        return scores[self.category]


@dataclass(frozen=True)
class _Moderated(FittedBaseline):
    endpoint: ModerationEndpoint

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        pass

        asked = self.endpoint
        service = Service(
            asked.url, asked.key_env, asked.concurrency, asked.retries, asked.timeout_s
        )
        return service.ask(asked.score, split.texts, title=asked.title)


_FLAGGED = ("unsafe", "yes")
_HARMLESS = ("safe", "no")
# The least probability of either, so that a word that is not listed leaves the ratio finite.

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

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Fits nothing.

        Raises:
            SidelightError: The task is not binary, or the prompt has no place for the text.
        """
        pass

        require_binary(self.title, dataset.task)
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
class _Guarded(FittedBaseline):
    endpoint: GuardEndpoint

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        """Answers that say neither count as even odds, as long as they are rare."""
        pass

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
