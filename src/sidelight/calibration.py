"""Between logits, log-odds and probabilities. Knows a task's kind, not how a map was fitted.

A map from logits to probabilities, as plain JSON. Knows its numbers, not how they are fitted.

Fits calibrations on validation rows. Knows logits and labels, not probes or thresholds.

The thresholds to decide by. Knows probabilities and labels, not how they were calibrated.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from jaxtyping import Bool, Float, Shaped

from sidelight.errors import SidelightError, did_you_mean
from sidelight.metrics import AnyArray, Flags, Values, checked_labels
from sidelight.types import Task, TaskKind


def link(task: TaskKind, logits: Float[Values, "row output"]) -> Float[Values, "row output"]:
    """Probabilities of logits: the softmax if multi-class, else the sigmoid of each output."""
    if task == "multiclass":
        return np.exp(log_softmax(logits))
    return np.exp(-np.logaddexp(0, -logits))


def log_softmax(logits: Float[Values, "row label"]) -> Float[Values, "row label"]:
    """The logarithm of each row's softmax; no size of logits overflows."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def to_log_odds(probabilities: Float[Values, "*shape"]) -> Float[Values, "*shape"]:
    """The logarithm of p / (1 - p), with p kept 1e-15 away from 0 and 1."""
    within = np.clip(probabilities, 1e-15, 1 - 1e-15)
    return np.log(within) - np.log1p(-within)


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


# In units of the logits' root mean square, so that no size of logits is out of reach. The lower
# bound keeps every calibration rising: the order of scores is the probe's, only their size is ours.
_SCALE_BOUNDS = (1e-2, 1e2)
# In pseudo-rows. Softmax does not feel a shift common to all classes; this settles it, and nothing
# else at 50 rows or more.
_SHIFT_PENALTY = 1e-3


def fit_calibration(
    kind: str,
    logits: Float[Values, "row output"],
    labels: Shaped[AnyArray, "..."],
    task: Task,
) -> Calibration:
    """Fits a calibration on validation rows.

    ``none`` only applies the link. ``temperature`` divides the logits by one number, per label if
    multi-label (Guo et al. 2017, section 4.2). ``platt`` also shifts them (Platt 1999); its
    multi-class form is ``softmax(logits / T + b)``, with one shift per class. ``isotonic`` fits any
    rising map per output, in a multi-class task each class against the rest (Zadrozny & Elkan
    2002); it needs some 1,000 rows.

    Separable rows do not give certainty: temperature and Platt fit Platt's smoothed targets,
    1 / (N + 2) in place of 0 and 1 for the N rows of a class (multi-class: 2 / (rows + 4)), and
    isotonic stays 1 / (rows + 2) away from 0 and 1. A label of a multi-label task that all rows or
    no rows have stays as it is under temperature and Platt.

    Args:
        kind: Which map to fit: none, temperature, platt or isotonic.
        logits: What the probe's head gives; a binary task has one column.
        labels: [row] of class numbers, or [row, label] of 0 and 1 for a multi-label task.
        task: The classes.

    Raises:
        SidelightError: As `checked_labels`; or the kind is unknown; or all rows have the same class
            and the kind is not ``none``; or the kind is ``isotonic`` and all or no rows have some
            label.
    """
    if kind not in _FITS:
        raise SidelightError(unknown_kind(kind))
    integers = checked_labels(task, logits, labels)
    if task.kind == "multiclass":
        holds = integers[:, None] == np.arange(task.outputs)
    else:
        holds = integers.reshape(logits.shape) == 1
    return _FITS[kind](task, logits.astype(np.float64), holds)


def require_calibratable(kind: str, labels: Shaped[AnyArray, "..."], task: Task) -> None:
    """Checks that ``fit_calibration`` will take these labels, before there are logits.

    Args:
        kind: As there.
        labels: As there.
        task: As there.

    Raises:
        SidelightError: As there.
    """
    any_logits = np.zeros((len(labels), task.outputs))
    fit_calibration(kind, any_logits, labels, task)


@dataclass(frozen=True)
class _Affine:
    scale: float
    shift: Float[Values, " label"]


_Solve = Callable[[Values, Values], _Affine]


def _fit_none(task: Task, _logits: Values, _holds: Flags) -> Calibration:
    return Calibration("none", task.kind, (1.0,) * task.outputs, (0.0,) * task.outputs)


def _fit_temperature(task: Task, logits: Values, holds: Flags) -> Calibration:
    return _fit_affine("temperature", task, logits, holds, _solve_scale)


def _fit_platt(task: Task, logits: Values, holds: Flags) -> Calibration:
    return _fit_affine("platt", task, logits, holds, _solve_scale_and_shift)


def _fit_affine(
    kind: CalibrationKind, task: Task, logits: Values, holds: Flags, solve: _Solve
) -> Calibration:
    if task.kind != "multilabel":
        _require_variety(kind, task, holds)
    if task.kind == "multiclass":
        errors = np.full((len(holds), 1), 2 / (len(holds) + 4))
        solved = solve(logits, _smooth(holds, errors))
        scale = (solved.scale,) * task.outputs
        return Calibration(kind, task.kind, scale, tuple(solved.shift.tolist()))
    pairs = [_solve_output(*column, solve) for column in zip(logits.T, holds.T, strict=True)]
    scale = tuple(pair.scale for pair in pairs)
    shift = tuple(float(pair.shift[1] - pair.shift[0]) for pair in pairs)
    return Calibration(kind, task.kind, scale, shift)


def _solve_output(logit: Values, holds: Flags, solve: _Solve) -> _Affine:
    if holds.all() or not holds.any():
        return _Affine(1.0, np.zeros(2))
    # A sigmoid is the softmax over the logits (0, z): one solver serves both.
    logits = np.stack([np.zeros_like(logit), logit], axis=1)  # (row, 2)
    either = np.stack([~holds, holds], axis=1)
    errors = 1 / (either @ either.sum(axis=0) + 2)
    return solve(logits, _smooth(either, errors[:, None]))


def _smooth(holds: Bool[Flags, "row label"], errors: Float[Values, "row 1"]) -> Values:
    return np.where(holds, 1 - errors, errors / (holds.shape[1] - 1))


def _solve_scale(logits: Values, targets: Values) -> _Affine:
    return _minimise_log_loss(logits, targets, shift_bounds=(0.0, 0.0))


def _solve_scale_and_shift(logits: Values, targets: Values) -> _Affine:
    centre = logits.mean(axis=0)
    solved = _minimise_log_loss(logits - centre, targets, shift_bounds=(None, None))
    return _Affine(solved.scale, solved.shift - solved.scale * centre)


def _minimise_log_loss(
    logits: Float[Values, "row label"],
    targets: Float[Values, "row label"],
    *,
    shift_bounds: tuple[float | None, float | None],
) -> _Affine:
    # Imported here: serving applies a calibration and never fits one.
    from scipy.optimize import minimize  # pyright: ignore

    rows, outputs = logits.shape
    spread = float(np.sqrt(np.square(logits).mean())) or 1.0
    inputs = logits / spread

    def loss_and_slope(parameters: Values) -> tuple[float, Values]:
        scale, shift = parameters[0], parameters[1:]
        log_probabilities = log_softmax(inputs * scale + shift)
        loss = -(targets * log_probabilities).sum() + _SHIFT_PENALTY / 2 * (shift @ shift)
        excess = np.exp(log_probabilities) - targets
        slopes = excess.sum(axis=0) + _SHIFT_PENALTY * shift
        return loss / rows, np.append((excess * inputs).sum(), slopes) / rows

    start = np.append(np.clip(spread, *_SCALE_BOUNDS), np.zeros(outputs))
    bounds = [_SCALE_BOUNDS] + [shift_bounds] * outputs
    found = cast(Any, minimize)(loss_and_slope, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return _Affine(float(found.x[0]) / spread, found.x[1:])


def _fit_isotonic(task: Task, logits: Values, holds: Flags) -> Calibration:
    _require_variety("isotonic", task, holds)
    log_odds = to_log_odds(link(task.kind, logits))
    knots = tuple(_rising_knots(*column) for column in zip(log_odds.T, holds.T, strict=True))
    ones, zeros = (1.0,) * task.outputs, (0.0,) * task.outputs
    return Calibration("isotonic", task.kind, ones, zeros, knots)


def _rising_knots(log_odds: Values, holds: Flags) -> Knots:
    # Imported here: serving applies a calibration and never fits one.
    from sklearn.isotonic import IsotonicRegression  # pyright: ignore

    fitted = cast(Any, IsotonicRegression()).fit(log_odds, holds.astype(np.float64))
    margin = 1 / (len(holds) + 2)
    probabilities: Values = np.clip(fitted.y_thresholds_, margin, 1 - margin)
    return Knots(tuple(fitted.X_thresholds_.tolist()), tuple(probabilities.tolist()))


_FITS: dict[str, Callable[[Task, Values, Flags], Calibration]] = {
    "none": _fit_none,
    "temperature": _fit_temperature,
    "platt": _fit_platt,
    "isotonic": _fit_isotonic,
}


def _require_variety(kind: str, task: Task, holds: Bool[Flags, "row output"]) -> None:
    names = task.labels[1:] if task.kind == "binary" else task.labels
    culprits = [name for name, rows in zip(names, holds.T, strict=True) if len(set(rows)) == 1]
    if len(culprits) == len(names) or (culprits and kind == "isotonic"):
        raise SidelightError(
            f"Cannot fit a {kind} calibration on {len(holds)} rows of which all or none are "
            f"{', '.join(culprits)}; rows of both kinds are needed. Add validation rows, or use "
            f"kind '{'platt' if kind == 'isotonic' else 'none'}'."
        )


_SATURATED = 1e-9


def choose_thresholds(
    task: Task, probabilities: Float[Values, "row output"], labels: Shaped[AnyArray, "..."]
) -> tuple[float, ...]:
    """The threshold of each label that gives the highest F1 on these rows.

    It lies midway between neighbouring scores; of several equally good cuts the middle one is
    taken. A label that no row has, or whose rows all score 0, gets 0.5.

    Args:
        task: The classes.
        probabilities: Calibrated probabilities of validation rows, never of test rows.
        labels: [row] of class numbers, or [row, label] of 0 and 1 for a multi-label task.

    Returns:
        One threshold within (0, 1) for a binary task, one per label for a multi-label task, and
        none for a multi-class task, whose decision is the most probable class.

    Raises:
        SidelightError: As `checked_labels`.
    """
    integers = checked_labels(task, probabilities, labels)
    if task.kind == "multiclass":
        return ()
    holds = integers.reshape(probabilities.shape) == 1
    return tuple(map(_best_cut, probabilities.T.astype(np.float64), holds.T))


def _best_cut(scores: Float[Values, " row"], holds: Bool[Flags, " row"]) -> float:
    # Saturated scores are one step at either end: no threshold in (0, 1) could part them.
    within = np.clip(scores, _SATURATED, 1 - _SATURATED)
    steps, place = np.unique(-within, return_inverse=True)  # falling scores
    hits = np.bincount(place, weights=holds).cumsum()
    flagged = np.bincount(place).cumsum()
    f1 = np.where(-steps > _SATURATED, 2 * hits / (flagged + holds.sum()), 0)
    if f1.max() == 0:
        return 0.5
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    step = best[len(best) // 2]
    below = np.append(-steps, 0.0)[step + 1]
    return float(below - steps[step]) / 2
