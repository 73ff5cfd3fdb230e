"""How a mechanism is trained, and which mechanisms are trained together."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from sidelight.errors import SidelightError
from sidelight.mechanisms.base import MechanismSpec

ClassWeight = Literal["none", "balanced"]
# Of few texts: larger batches would be too few.
_STEPS_OF_AN_EPOCH = 8

LayerWeights = Literal["equal", "predictive"]


@dataclass(frozen=True)
class TrainingSettings:
    """Optimisation by AdamW with a cosine schedule and early stopping.

    Attributes:
        learning_rate: At the start of the cosine.
        weight_decay: Decoupled, per step relative to the learning rate.
        epochs: Passes over the data at most; the cosine ends there.
        least_steps: Few texts are trained in smaller batches and for more epochs, so that there are
            so many steps; 0 takes epochs and batch size as they are.
        batch_size: Texts per step; where shards of activations hold fewer, several make a step.
        patience: Epochs without a better validation score after which training stops; more in
            proportion where there are more epochs.
        class_weight: ``balanced`` weighs each class by its inverse frequency; the threshold that
            validation chooses handles imbalance either way.
        layer_weights: ``predictive`` weighs layers by how well each predicts left-out training
            texts (``training/layer_weights.py``), if states are standardised.
        beginnings: Whether a probe of responses also learns from a random beginning of each: it is
            asked for scores while a response is written.
        long_inputs: Whether each text also teaches as a part of long inputs
            (``training/long_inputs.py``); not for several classes, of which an input of several
            texts could have any.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    epochs: int = 8
    least_steps: int = 96
    batch_size: int = 32
    patience: int = 3
    class_weight: ClassWeight = "none"
    layer_weights: LayerWeights = "equal"
    beginnings: bool = True
    long_inputs: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that the optimiser cannot use."""
        if not 0 <= self.learning_rate < 1 or not 0 <= self.weight_decay < math.inf:
            raise SidelightError(
                f"Cannot train with learning rate {self.learning_rate} and weight decay "
                f"{self.weight_decay}: the rate lies from 0 to 1, the decay is 0 or more."
            )
        least = {"epochs": 1, "batch_size": 1, "patience": 1, "least_steps": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise SidelightError(
                    f"Cannot train with {name} = {getattr(self, name)}: give {low} or more."
                )

    def changed(self, **given: Any) -> "TrainingSettings":
        """With other values; epochs or a batch size that are given hold for few texts too."""
        exact = {"least_steps": 0} if {"epochs", "batch_size"} & given.keys() else {}
        return replace(self, **{**exact, **given})

    def fitted_to(self, texts: int) -> "TrainingSettings":
        """What so few texts are really trained with: smaller batches and more epochs.

        Args:
            texts: For training.
        """
        if not self.least_steps:
            return self
        batch_size = min(self.batch_size, max(1, texts // _STEPS_OF_AN_EPOCH))
        epochs = max(self.epochs, math.ceil(self.least_steps / math.ceil(texts / batch_size)))
        patience = math.ceil(self.patience * epochs / self.epochs)
        return replace(self, batch_size=batch_size, epochs=epochs, patience=patience)


# Chosen on ToxicChat validation data; `docs/results.md` has the runs.
_SUGGESTED = {
    "pooling": TrainingSettings(learning_rate=2e-2, weight_decay=0.1, epochs=4),
    "gate": TrainingSettings(learning_rate=1e-2, weight_decay=0.1, epochs=4),
    "attention": TrainingSettings(learning_rate=1e-3, weight_decay=0.1, epochs=3),
    "readout": TrainingSettings(weight_decay=0.3, epochs=6, layer_weights="predictive"),
    "fusion": TrainingSettings(weight_decay=0.3, epochs=6),
    "blend": TrainingSettings(weight_decay=0.3, epochs=6, layer_weights="predictive"),
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
