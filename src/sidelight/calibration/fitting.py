"""Fits calibrations on validation rows. Knows logits and labels, not probes or thresholds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float, Shaped

from sidelight.calibration.calibration import Calibration, CalibrationKind, Knots, unknown_kind
from sidelight.calibration.link import link, log_softmax, to_log_odds
from sidelight.errors import SidelightError
from sidelight.metrics import AnyArray, Flags, Values, checked_labels
from sidelight.types import Task

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
