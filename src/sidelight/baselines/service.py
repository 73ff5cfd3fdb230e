"""Asks an OpenAI-compatible service about many texts. Nothing of texts or keys is logged."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from openai import APIConnectionError, APIStatusError, OpenAI

from sidelight.errors import SidelightError
from sidelight.progress import progress
from sidelight.types import Task

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
