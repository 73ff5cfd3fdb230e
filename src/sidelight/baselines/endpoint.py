"""A moderation service by URL. Texts leave the machine."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float

from sidelight.baselines.base import Baseline, Rival
from sidelight.errors import SidelightError, did_you_mean
from sidelight.study import Split, Study

if TYPE_CHECKING:
    from openai import OpenAI

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

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Fits nothing.

        Raises:
            SidelightError: The task is not binary.
        """
        from sidelight.baselines.service import require_binary

        require_binary(self.title, study.task)
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
class _Moderated(Rival):
    endpoint: ModerationEndpoint

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        from sidelight.baselines.service import Service

        asked = self.endpoint
        service = Service(
            asked.url, asked.key_env, asked.concurrency, asked.retries, asked.timeout_s
        )
        return service.ask(asked.score, split.texts, title=asked.title)
