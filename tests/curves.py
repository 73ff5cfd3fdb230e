"""Probes with the curves that training would have stored."""

from dataclasses import replace

import numpy as np

from sidelight.probe import Probe
from sidelight.thresholds import OperatingCurve


def with_curves(probe: Probe) -> Probe:
    """The probe with a curve of each label on 200 texts, better than chance."""
    random = np.random.default_rng(0)
    curves = {}
    for label in probe.label_thresholds:
        scores = random.random(200)
        curves[label] = OperatingCurve.of(scores, random.random(200) < scores).to_dict()
    return replace(probe, record={"validation": {"curves": curves}})
