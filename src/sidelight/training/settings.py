"""How a mechanism is trained, and which mechanisms are trained together."""

from dataclasses import dataclass
from typing import Literal

from sidelight.mechanisms import MechanismSpec

ClassWeight = Literal["none", "balanced"]


@dataclass(frozen=True)
class TrainingSettings:
    """Optimisation by AdamW with a cosine schedule and early stopping.

    Attributes:
        learning_rate: At the start of the cosine.
        weight_decay: Decoupled, per step relative to the learning rate.
        epochs: Passes over the data at most; the cosine ends there.
        batch_size: Texts per step.
        patience: Epochs without a better validation score after which training stops.
        class_weight: ``balanced`` weighs each class by its inverse frequency; the threshold that
            validation chooses handles imbalance either way.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    epochs: int = 8
    batch_size: int = 32
    patience: int = 3
    class_weight: ClassWeight = "none"


# Chosen on ToxicChat validation data; `docs/results.md` has the runs.
_SUGGESTED = {
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
