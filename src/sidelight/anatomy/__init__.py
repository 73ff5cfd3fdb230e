"""What probes use of the backbone: layers, tokens, labels and settings (a BERTology view)."""

from sidelight.anatomy.contributions import contributions
from sidelight.anatomy.curves import LEARNING_RATES, Point, learning_curve, sensitivity
from sidelight.anatomy.examine import Anatomy, HeatMap, examine
from sidelight.anatomy.pictures import plot_curves
from sidelight.anatomy.report import to_json, write_anatomies
from sidelight.anatomy.weights import layer_weights, token_weights

__all__ = [
    "LEARNING_RATES",
    "Anatomy",
    "HeatMap",
    "Point",
    "contributions",
    "examine",
    "layer_weights",
    "learning_curve",
    "plot_curves",
    "sensitivity",
    "to_json",
    "token_weights",
    "write_anatomies",
]
