"""How many questions may be asked: a bucket that fills at a constant rate, for all and by key."""

import time
from dataclasses import dataclass


@dataclass
class _Bucket:
    left: float
    at: float


class Budget:
    """The questions that are left this minute, in all and for each API key.

    Args:
        per_minute: Of all keys together, also of requests without one.
        per_key: Of each key.
    """

    def __init__(self, per_minute: int, per_key: int):
        self._per_minute, self._per_key = per_minute, per_key
        self._all = _Bucket(per_minute, time.monotonic())
        self._keys: dict[str, _Bucket] = {}

    def take(self, key_id: str | None) -> bool:
        """Takes one question; False: there is none left."""
        now = time.monotonic()
        bucket = None
        if key_id is not None:
            bucket = self._keys.setdefault(key_id, _Bucket(self._per_key, now))
            _fill(bucket, self._per_key, now)
        _fill(self._all, self._per_minute, now)
        # A key without questions left must not use up those of others.
        if (bucket is not None and bucket.left < 1) or self._all.left < 1:
            return False
        self._all.left -= 1
        if bucket is not None:
            bucket.left -= 1
        return True

    def give_back(self, key_id: str | None) -> None:
        """Gives back a question that was taken and never sent."""
        self._all.left += 1
        if key_id is not None:
            self._keys[key_id].left += 1


def _fill(bucket: _Bucket, per_minute: int, now: float) -> None:
    bucket.left = min(per_minute, bucket.left + (now - bucket.at) * per_minute / 60)
    bucket.at = now
