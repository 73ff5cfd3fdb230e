"""From labelled examples to calibrated probes, side by side with a baseline."""

from sidelight.fitting.automatic import AUTO
from sidelight.fitting.fit import Fit, fit
from sidelight.fitting.making import Run
from sidelight.fitting.options import TRAINING_MAX_TOKENS, FitOptions
from sidelight.fitting.preparing import Prepared, prepare

__all__ = [
    "AUTO",
    "TRAINING_MAX_TOKENS",
    "Fit",
    "FitOptions",
    "Prepared",
    "Run",
    "fit",
    "prepare",
]
