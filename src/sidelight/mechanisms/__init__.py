"""Mechanisms: what turns the hidden states of all layers and tokens into logits.

To add one, write its file and import it here; the law tests find it in the registry.
"""

from sidelight.mechanisms import attention, blend, fusion, gate, pooling, readout
from sidelight.mechanisms.base import (
    Aggregator,
    Geometry,
    Mechanism,
    MechanismSpec,
    OptionValue,
    mechanism_names,
    mechanism_spec,
    register,
    spec_titles,
)

DEFAULT_MECHANISM = "readout"

__all__ = [
    "DEFAULT_MECHANISM",
    "Aggregator",
    "Geometry",
    "Mechanism",
    "MechanismSpec",
    "OptionValue",
    "attention",
    "blend",
    "fusion",
    "gate",
    "mechanism_names",
    "mechanism_spec",
    "pooling",
    "readout",
    "register",
    "spec_titles",
]
