"""From logits to probabilities that mean what they say, and the thresholds to decide by.

Fitted on validation rows, saved with the probe as plain JSON. Knows logits and labels, not probes.
"""

from sidelight.calibration.calibration import Calibration, CalibrationKind, Knots
from sidelight.calibration.fitting import fit_calibration, require_calibratable
from sidelight.calibration.thresholds import choose_thresholds

__all__ = [
    "Calibration",
    "CalibrationKind",
    "Knots",
    "choose_thresholds",
    "fit_calibration",
    "require_calibratable",
]
