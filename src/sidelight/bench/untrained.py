"""Probes of random weights: a benchmark needs their sizes, not their judgement."""

import torch

from sidelight.backbones import Backbone
from sidelight.calibration import Calibration
from sidelight.mechanisms import DEFAULT_MECHANISM, Geometry, MechanismSpec, mechanism_spec
from sidelight.probe import Probe
from sidelight.prompts import Reads
from sidelight.standardisation import Standardisation
from sidelight.types import Task

_TASK = Task("binary", ("no", "yes"))


def untrained_probe(
    backbone: Backbone,
    name: str,
    *,
    spec: MechanismSpec | None = None,
    reads: Reads | None = None,
    seed: int = 0,
) -> Probe:
    """A binary probe that costs what a trained one costs.

    Args:
        backbone: What it fits.
        name: Of the probe.
        spec: Its mechanism; None: the default one.
        reads: What it reads; None: the prompt.
        seed: Of its weights.
    """
    who = backbone.fingerprint
    geometry = Geometry(layers=who.layers, width=who.width, outputs=_TASK.outputs)
    spec = spec or mechanism_spec(DEFAULT_MECHANISM)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mechanism = spec.build(geometry).eval().requires_grad_(False)
        for parameter in mechanism.parameters():
            # Some parameters start at zero, which would hide a wrong verdict.
            parameter.normal_(std=who.width**-0.5)
    return Probe(
        name=name,
        task=_TASK,
        reads=reads or Reads(),
        prompt_format=backbone.encoder.prompt_format,
        spec=spec,
        mechanism=mechanism,
        standardisation=Standardisation.identity(geometry),
        calibration=Calibration("none", _TASK.kind, (1.0,), (0.0,)),
        thresholds=(0.5,),
        fingerprint=who,
    )
