"""How a mechanism is trained, and which mechanisms are trained together."""

import math
from dataclasses import dataclass
from typing import Literal

from sidelight.errors import SidelightError
from sidelight.mechanisms import MechanismSpec

ClassWeight = Literal["none", "balanced"]
Solver = Literal["adamw", "ridge"]


@dataclass(frozen=True)
class TrainingSettings:
    """Optimisation by AdamW with a cosine schedule and early stopping, or in closed form.

    Attributes:
        solver: ``ridge`` solves the linear readout (``training/ridge.py``), and nothing below
            matters then.
        learning_rate: At the start of the cosine.
        weight_decay: Decoupled, per step relative to the learning rate.
        epochs: Passes over the data at most; the cosine ends there.
        batch_size: Texts per step.
        patience: Epochs without a better validation score after which training stops.
        class_weight: ``balanced`` weighs each class by its inverse frequency; the threshold that
            validation chooses handles imbalance either way.
    """

    solver: Solver = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    epochs: int = 8
    batch_size: int = 32
    patience: int = 3
    class_weight: ClassWeight = "none"

    def __post_init__(self) -> None:
        """Refuses numbers that the optimiser cannot use."""
        if not 0 <= self.learning_rate < 1 or not 0 <= self.weight_decay < math.inf:
            raise SidelightError(
                f"Cannot train with learning rate {self.learning_rate} and weight decay "
                f"{self.weight_decay}: the rate lies from 0 to 1, the decay is 0 or more."
            )


# Chosen on ToxicChat validation data; `docs/results.md` has the runs.
_SUGGESTED = {
    "linear": TrainingSettings(solver="ridge"),
    "pooling": TrainingSettings(learning_rate=2e-2, weight_decay=0.1, epochs=4),
    "gate": TrainingSettings(learning_rate=1e-2, weight_decay=0.1, epochs=4),
    "attention": TrainingSettings(learning_rate=1e-3, weight_decay=0.1, epochs=3),
    "readout": TrainingSettings(learning_rate=1e-3, weight_decay=0.3, epochs=6),
}


def suggested_settings(mechanism: str) -> TrainingSettings:
    """The settings that did well on validation data for a mechanism, or general ones."""
    return _SUGGESTED.get(mechanism, TrainingSettings())


@dataclass(frozen=True)
class Job:
    """One probe to train.

    Attributes:
        spec: The mechanism.
        seed: Of its initial parameters and the order of the data.
        settings: Of the optimisation.
        standardise: Whether it reads hidden states standardised per layer.
    """

    spec: MechanismSpec
    seed: int
    settings: TrainingSettings
    standardise: bool = True
