"""What one run of a row gave, stored as soon as it is there. Knows files, not how they came."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sidelight.storage import replacing

RESULT = "result.npz"
DIVERGED = "diverged"
PROBE = "probe"


@dataclass(frozen=True)
class Result:
    """One row with one seed, before the test.

    Attributes:
        validation_logits: Before calibration.
        seconds: That fitting took; of probes that were trained together, each one's share.
        parameters: Numbers that were fitted and are kept.
    """

    validation_logits: Float[np.ndarray, "text output"]
    seconds: float
    parameters: int


@dataclass(frozen=True)
class Unit:
    """One row with one seed, and where what it gave is kept.

    Attributes:
        row: Name of the row.
        seed: Of everything random.
        folder: Its own; the name holds a hash of all that decides the result.
    """

    row: str
    seed: int
    folder: Path

    @property
    def is_fitted(self) -> bool:
        """Whether its validation results are there."""
        return (self.folder / RESULT).exists()

    @property
    def has_diverged(self) -> bool:
        """Whether training it ended in numbers that are not finite."""
        return (self.folder / DIVERGED).exists()

    def save_divergence(self) -> None:
        """Notes that it diverged, so that it is not trained again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / DIVERGED).touch()

    def save(self, result: Result) -> None:
        """Stores the result whole or, if killed, not at all."""
        _save_arrays(
            self.folder / RESULT,
            validation_logits=result.validation_logits,
            seconds=np.array(result.seconds),
            parameters=np.array(result.parameters),
        )

    def load(self) -> Result:
        """What ``save`` stored."""
        with np.load(self.folder / RESULT, allow_pickle=False) as stored:
            return Result(
                stored["validation_logits"], float(stored["seconds"]), int(stored["parameters"])
            )

    def is_tested(self, test: str) -> bool:
        """Whether the logits of the test texts with this hash are there."""
        return self._test_path(test).exists()

    def save_test(self, test: str, logits: Float[np.ndarray, "text output"]) -> None:
        """Stores logits of test texts."""
        _save_arrays(self._test_path(test), logits=logits)

    def load_test(self, test: str) -> Float[np.ndarray, "text output"]:
        """What ``save_test`` stored."""
        with np.load(self._test_path(test), allow_pickle=False) as stored:
            return stored["logits"]

    def _test_path(self, test: str) -> Path:
        return self.folder / f"test-{test[:12]}.npz"


def digest(described: Mapping[str, Any]) -> str:
    """A hash of JSON-ready values that does not depend on their order."""
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def unit_at(runs: Path, row: str, seed: int, described: Mapping[str, Any]) -> Unit:
    """The unit of a row and seed.

    Args:
        runs: Folder of all units.
        row: Name of the row.
        seed: Of the run.
        described: All that decides the result.
    """
    plain = re.sub(r"[^a-z0-9.]+", "-", row.lower()).strip("-")
    key = digest({"row": row, "seed": seed, **described})
    return Unit(row, seed, runs / f"{plain}-seed{seed}-{key[:12]}")


def _save_arrays(path: Path, **arrays: np.ndarray) -> None:
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
