"""Calibration of logits to probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import numpy as np
from jaxtyping import Bool, Float, Shaped
from pydantic import ConfigDict

from sidelight.errors import SidelightError, did_you_mean
from sidelight.statistics.metrics import checked_labels
from sidelight.types import AnyArray, Flags, Task, TaskKind, Values

CalibrationKind = Literal["none", "temperature", "platt"]

# In units of the logits' root mean square, so that logits of any size can be fitted. The lower
# bound keeps every calibration increasing, so that it never changes the order of scores. Nearly
# constant logits may stay so.
_SCALE_BOUNDS = (1e-2, 1e2)
# In pseudo-rows. Softmax ignores a shift that all classes share; the penalty determines it, and has
# no other effect from 50 rows on.
_SHIFT_PENALTY = 1e-3
# Width of the prior of the log scale, a Student's t with 4 degrees of freedom. Training minimised
# the log loss, so the logits are approximately calibrated, and a few rows cannot show by how much
# they are off. The heavy tails allow logits of any other size to be fitted.
_SCALE_WIDTH, _SCALE_FREEDOM = 0.5, 4
# Typical root mean squares of trained logits.
_USUAL_LOGITS = (0.5, 20.0)


def link(task: TaskKind, logits: Float[Values, "row output"]) -> Float[Values, "row output"]:
    """Probabilities of logits: the softmax if multi-class, else the sigmoid of each output."""
    if task == "multiclass":
        return np.exp(_log_softmax(logits))
    return np.exp(-np.logaddexp(0, -logits))


def _log_softmax(logits: Float[Values, "row label"]) -> Float[Values, "row label"]:
    """The logarithm of each row's softmax, for logits of any size."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Calibration:
    """A map from logits to probabilities.

    In a binary or multi-label task, a higher logit never gets a lower probability. In a multi-class
    task, ``platt`` may change which class wins; ``temperature`` never does.

    It is ``link(scale * logits + shift)``, where the link is the softmax for a multi-class task and
    the sigmoid otherwise.

    Attributes:
        kind: Kind of the fitted map.
        task: Kind of task, which determines the link.
        scale: Factor of each output: 1 / temperature.
        shift: Term added to each output.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: CalibrationKind
    task: TaskKind
    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.scale) == len(self.shift):
            raise ValueError("scale and shift must have the same length")
        if min(self.scale) <= 0:
            raise ValueError("scale must be positive")

    def fits(self, task: Task) -> bool:
        """Whether it calibrates the outputs of this task."""
        return self.task == task.kind and len(self.scale) == task.outputs

    def apply(self, logits: Float[Values, "row output"]) -> Float[Values, "row output"]:
        """Calibrated probabilities; in a multi-class task, each row sums to 1.

        Raises:
            SidelightError: A logit is NaN or infinite.
        """
        assert logits.shape[1:] == (len(self.scale),), logits.shape
        if not np.isfinite(logits).all():
            raise SidelightError(
                "Got NaN or infinite logits. The hidden states may overflow in half precision; "
                "use a bfloat16 or float32 backbone."
            )
        return link(self.task, logits * self.scale + self.shift)


def suggested_calibration(task: Task) -> CalibrationKind:
    """Temperature for multi-class tasks, because shifts could change the predicted class; else
    Platt.
    """
    return "temperature" if task.kind == "multiclass" else "platt"


def fit_calibration(
    kind: CalibrationKind,
    logits: Float[Values, "row output"],
    labels: Shaped[AnyArray, "..."],
    task: Task,
    *,
    around: Sequence[float] = (),
) -> Calibration:
    """Fit a calibration on validation rows.

    ``none`` only applies the link. ``temperature`` divides the logits by one number, or one per
    label if multi-label (Guo et al. 2017, section 4.2). ``platt`` also shifts them (Platt 1999);
    its multi-class form is ``softmax(logits / T + b)``, with one shift per class.

    With few rows, the factor of temperature and Platt stays near 1, or near its earlier value,
    because its logarithm has a Student's t prior.

    Separable rows do not lead to certainty. Temperature and Platt fit targets at a distance of 1 /
    (2 N + 2) from 0 and 1 for the N rows of a class (Jeffreys' prior, half of Platt's; multi-class:
    1 / (rows + 2)). A label of a multi-label task that all rows or no rows have is left unchanged.

    Args:
        kind: The map to fit: none, temperature or platt.
        logits: Output of the probe; a binary task has one column.
        labels: [row] of class numbers, or [row, label] of 0 and 1 for a multi-label task.
        task: The classes.
        around: ``scale`` of an earlier calibration of the same probe; 1 if there is none.

    Raises:
        SidelightError: As for `checked_labels`, or the kind is unknown, or all rows have the same
            class and the kind is not ``none``.
    """
    kinds = get_args(CalibrationKind)
    if kind not in kinds:
        raise SidelightError(f"Unknown calibration '{kind}'.{did_you_mean(kind, kinds)}")
    integers = checked_labels(task, logits, labels)
    ones, zeros = (1.0,) * task.outputs, (0.0,) * task.outputs
    around = tuple(around) or ones
    if kind == "none":
        return Calibration("none", task.kind, ones, zeros)
    logits = logits.astype(np.float64)
    holds = task.targets(integers)
    if task.kind != "multilabel" and (holds.all(axis=0) | ~holds.any(axis=0)).all():
        raise SidelightError(
            f"Cannot fit a {kind} calibration on {len(holds)} rows of one class; rows of both "
            "classes are needed. Add validation rows, or use kind 'none'."
        )
    if task.kind == "multiclass":
        errors = np.full((len(holds), 1), 1 / (len(holds) + 2))
        scale, shifts = _fit_affine(kind, logits, holds, errors, around[0])
        return Calibration(kind, task.kind, (scale,) * task.outputs, tuple(shifts.tolist()))
    outputs = zip(logits.T, holds.T, around, strict=True)
    scales, shifts = zip(*(_fit_output(kind, *output) for output in outputs), strict=True)
    return Calibration(kind, task.kind, scales, shifts)


def require_calibratable(
    kind: CalibrationKind, labels: Shaped[AnyArray, "..."], task: Task
) -> None:
    """Check, before logits are computed, that ``fit_calibration`` will accept these labels."""
    fit_calibration(kind, np.zeros((len(labels), task.outputs)), labels, task)


def _fit_output(
    kind: CalibrationKind, logit: Float[Values, " row"], holds: Bool[Flags, " row"], around: float
) -> tuple[float, float]:
    """Scale and shift for one sigmoid."""
    if holds.all() or not holds.any():
        return 1.0, 0.0
    # A sigmoid is the softmax over the logits (0, z), so one solver serves both.
    logits = np.stack([np.zeros_like(logit), logit], axis=1)  # (row, 2)
    either = np.stack([~holds, holds], axis=1)
    errors = 0.5 / (either @ either.sum(axis=0) + 1)
    scale, shifts = _fit_affine(kind, logits, either, errors[:, None], around)
    return scale, float(shifts[1] - shifts[0])


def _fit_affine(
    kind: CalibrationKind,
    logits: Float[Values, "row label"],
    holds: Bool[Flags, "row label"],
    errors: Float[Values, "row 1"],
    around: float,
) -> tuple[float, Float[Values, " label"]]:
    """The scale and, for Platt, the shifts that minimise the log loss of the softmax.

    ``errors`` is the distance of each row's targets from 0 and 1; ``around`` is the centre of the
    scale's prior, which a few hundred rows outweigh.
    """
    # Imported here, because serving applies calibrations but never fits them.
    from scipy.optimize import minimize  # pyright: ignore

    targets = np.where(holds, 1 - errors, errors / (holds.shape[1] - 1))
    rows, outputs = logits.shape
    centre = logits.mean(axis=0) if kind == "platt" else np.zeros(outputs)
    shift_bounds = (None, None) if kind == "platt" else (0.0, 0.0)
    inputs = logits - centre
    spread = float(np.sqrt(np.square(inputs).mean())) or 1.0
    inputs = inputs / spread
    likely = spread * around

    def loss_and_slope(parameters: Values) -> tuple[float, Values]:
        scale, shift = parameters[0], parameters[1:]
        log_probabilities = _log_softmax(inputs * scale + shift)
        loss = -(targets * log_probabilities).sum() + _SHIFT_PENALTY / 2 * (shift @ shift)
        change, width = np.log(scale / likely), _SCALE_FREEDOM * _SCALE_WIDTH**2
        loss += (_SCALE_FREEDOM + 1) / 2 * np.log1p(change**2 / width)
        pull = (_SCALE_FREEDOM + 1) * change / (width + change**2) / scale
        excess = np.exp(log_probabilities) - targets
        slopes = excess.sum(axis=0) + _SHIFT_PENALTY * shift
        return loss / rows, np.append((excess * inputs).sum() + pull, slopes) / rows

    low, high = min(likely, _SCALE_BOUNDS[0]), _SCALE_BOUNDS[1]
    bounds = [(low, high)] + [shift_bounds] * outputs
    # The prior is not convex, so with logits far too small or too large, one start may not suffice.
    is_usual = _USUAL_LOGITS[0] < likely < _USUAL_LOGITS[1]
    starts = (likely,) if is_usual else (min(likely, high), 1.0)
    fit = partial(cast(Any, minimize), loss_and_slope, jac=True, method="L-BFGS-B", bounds=bounds)
    fits: list[Any] = [fit(np.append(start, np.zeros(outputs))) for start in starts]
    best: Values = min(fits, key=lambda fit: fit.fun).x
    scale = float(best[0]) / spread
    return scale, best[1:] - scale * centre
