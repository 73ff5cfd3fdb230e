"""A map from logits to probabilities, as plain JSON. Knows its numbers, not how they are fitted."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from sidelight.calibration.link import link, to_log_odds
from sidelight.errors import SidelightError, did_you_mean
from sidelight.metrics import Values
from sidelight.types import TaskKind

CalibrationKind = Literal["none", "temperature", "platt", "isotonic"]


@dataclass(frozen=True)
class Knots:
    """A rising, piecewise linear map from a log-odds to a probability; flat beyond its ends.

    Attributes:
        log_odds: Where the pieces meet, strictly rising.
        probabilities: The value at each, never falling, within (0, 1).
    """

    log_odds: tuple[float, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """A map from logits to probabilities.

    It never falls: in a binary or multi-label task a higher logit never gets a lower probability.
    In a multi-class task ``platt`` and ``isotonic`` may change which class wins.

    Without knots it is ``link(scale * logits + shift)``, the link being the softmax for a
    multi-class task and the sigmoid otherwise. With knots each output's log-odds (a sigmoid's
    logit; for a softmax, that of the class against the rest) is looked up, and the classes of a
    multi-class task are divided by their sum.

    Attributes:
        kind: How it was fitted.
        task: The kind of task, which decides the link.
        scale: Factor of each output; 1 / temperature.
        shift: Summand of each output.
        knots: One map per output if isotonic, else none.
    """

    kind: CalibrationKind
    task: TaskKind
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    knots: tuple[Knots, ...] = ()

    def apply(self, logits: Float[Values, "row output"]) -> Float[Values, "row output"]:
        """Calibrated probabilities; a multi-class task's rows sum to 1.

        Raises:
            SidelightError: The logits have another number of outputs, or are NaN or infinite.
        """
        if logits.ndim != 2 or logits.shape[1] != len(self.scale):
            raise SidelightError(
                f"Got logits of shape {logits.shape}, wanted [row, {len(self.scale)}], as this "
                "calibration was fitted. Use the calibration that was saved with the probe."
            )
        if not np.isfinite(logits).all():
            raise SidelightError(
                "Got NaN or infinite logits, wanted finite ones. Look for hidden states that "
                "overflow in half precision; a bfloat16 or float32 backbone avoids it."
            )
        probabilities = link(self.task, logits * self.scale + self.shift)
        return self._look_up(probabilities) if self.knots else probabilities

    def _look_up(self, probabilities: Values) -> Values:
        calibrated = np.empty_like(probabilities)
        for output, knots in enumerate(self.knots):
            log_odds = to_log_odds(probabilities[:, output])
            calibrated[:, output] = np.interp(log_odds, knots.log_odds, knots.probabilities)
        if self.task != "multiclass":
            return calibrated
        return calibrated / calibrated.sum(axis=1, keepdims=True)

    def to_dict(self) -> dict[str, Any]:
        """The calibration as JSON-ready values; `from_dict` reads it back exactly."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Calibration":
        """Reads what `to_dict` wrote, also after a trip through JSON.

        Raises:
            SidelightError: The kind is unknown, a field is missing or unknown, or its values cannot
                be a calibration's.
        """
        kind = data.get("kind")
        if kind not in get_args(CalibrationKind):
            raise SidelightError(unknown_kind(str(kind)))
        try:
            fields = dict(data)
            knots = tuple(_read_knots(one) for one in fields.pop("knots"))
            numbers = {name: _read_numbers(fields.pop(name)) for name in ("scale", "shift")}
            calibration = cls(knots=knots, **numbers, **fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SidelightError(_unreadable(f"{type(error).__name__}: {error}")) from error
        _check(calibration)
        return calibration


def unknown_kind(kind: str) -> str:
    """What to tell a user who asked for a kind that does not exist."""
    return f"Unknown calibration '{kind}'.{did_you_mean(kind, get_args(CalibrationKind))}"


def _read_knots(data: Mapping[str, Any]) -> Knots:
    return Knots(_read_numbers(data["log_odds"]), _read_numbers(data["probabilities"]))


def _read_numbers(data: Iterable[Any]) -> tuple[float, ...]:
    return tuple(float(number) for number in data)


def _check(calibration: Calibration) -> None:
    outputs = len(calibration.scale)
    numbers = np.array(calibration.scale + calibration.shift)
    claims = {
        "the task is binary, multiclass or multilabel": calibration.task in get_args(TaskKind),
        "scale and shift are as long": 0 < outputs == len(calibration.shift),
        "scale and shift are finite": bool(np.isfinite(numbers).all()),
        "scale is positive": min(calibration.scale, default=0) > 0,
        "isotonic, and only isotonic, has one knots entry per output": (
            len(calibration.knots) == (outputs if calibration.kind == "isotonic" else 0)
        ),
        "knots rise and lie within (0, 1)": all(map(_is_rising, calibration.knots)),
    }
    for claim, holds in claims.items():
        if not holds:
            raise SidelightError(_unreadable(f"it must be that {claim}"))


def _is_rising(knots: Knots) -> bool:
    places, heights = np.array(knots.log_odds), np.array(knots.probabilities)
    return bool(
        0 < len(places) == len(heights)
        and np.isfinite(places).all()
        and (np.diff(places) > 0).all()
        and (np.diff(heights) >= 0).all()
        and 0 < heights[0] <= heights[-1] < 1
    )


def _unreadable(reason: str) -> str:
    return (
        f"Cannot read this calibration ({reason}). The probe's manifest was edited or damaged: "
        "restore it, or calibrate the probe again."
    )
