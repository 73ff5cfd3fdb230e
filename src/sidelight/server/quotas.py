"""How much each key may use: requests and tokens in a minute, and requests at a time.

Answers tell a key what is left to it in the headers of OpenAI's API.
"""

import time
from math import ceil

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from sidelight.server.errors import RequestError
from sidelight.server.keys import Quota

_MINUTE_S = 60.0


class Bucket:
    """What a minute gives, evenly. It may be overdrawn, and then holds less than nothing."""

    def __init__(self, limit: int):
        self.limit = limit
        self._full = self._level = float(limit)
        self._at = time.monotonic()

    @property
    def level(self) -> float:
        now = time.monotonic()
        self._level = min(self._full, self._level + self._full * (now - self._at) / _MINUTE_S)
        self._at = now
        return self._level

    def take(self, amount: int) -> None:
        self._level = self.level - amount

    def seconds_until(self, level: float) -> float:
        return max(0.0, (level - self.level) * _MINUTE_S / self._full)

    def headers(self, unit: str) -> dict[str, str]:
        """OpenAI's headers; its resets are the time until all of the limit is there again."""
        return {
            f"x-ratelimit-limit-{unit}": str(self.limit),
            f"x-ratelimit-remaining-{unit}": str(max(0, int(self.level))),
            f"x-ratelimit-reset-{unit}": f"{self.seconds_until(self._full):.3f}s",
        }


class Usage:
    """What one key uses, and what it may use."""

    def __init__(self) -> None:
        self._quota = Quota()
        self._running = 0
        self._buckets: dict[str, Bucket] = {}

    def limit(self, quota: Quota) -> None:
        """Makes this the quota; under another one than before, a new minute begins."""
        if quota != self._quota:
            self._quota = quota
            limits = {"requests": quota.requests_per_minute, "tokens": quota.tokens_per_minute}
            self._buckets = {unit: Bucket(limit) for unit, limit in limits.items() if limit}

    def begin(self) -> None:
        """Counts a request.

        Raises:
            RequestError: The key has used what it may.
        """
        most = self._quota.concurrent
        if most is not None and self._running >= most:
            raise self._refusal(f"{most} requests at a time", seconds=1.0)
        for unit, bucket in self._buckets.items():
            # Of tokens nobody knows yet how many there will be, so one is enough.
            if bucket.level < 1:
                raise self._refusal(f"{bucket.limit} {unit} per minute", bucket.seconds_until(1.0))
        if "requests" in self._buckets:
            self._buckets["requests"].take(1)
        self._running += 1

    def end(self, tokens: int) -> None:
        """Counts what a request has read and written."""
        self._running -= 1
        if "tokens" in self._buckets:
            self._buckets["tokens"].take(tokens)

    def announced(self, send: Send) -> Send:
        """Sends answers with the headers."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers())
            await send(message)

        return send_with_headers

    def _headers(self) -> dict[str, str]:
        return {k: v for unit, own in self._buckets.items() for k, v in own.headers(unit).items()}

    def _refusal(self, limit: str, seconds: float) -> RequestError:
        return RequestError(
            f"This key may use {limit}. Try again in {seconds:.1f} seconds, or ask the operator "
            "for more.",
            status=429,
            code="rate_limit_exceeded",
            headers={"Retry-After": str(max(1, ceil(seconds))), **self._headers()},
        )
