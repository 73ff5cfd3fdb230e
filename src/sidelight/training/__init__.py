"""Training of mechanisms on cached hidden states. Knows labels and logits, not texts."""

from sidelight.training.batches import batches, neighbours
from sidelight.training.long_inputs import require_labels_of_parts
from sidelight.training.loop import Trained, TrainingSet, divergence, train_mechanisms
from sidelight.training.losses import Loss, make_loss
from sidelight.training.settings import (
    ClassWeight,
    Job,
    TrainingSettings,
    suggested_settings,
)
from sidelight.training.trainee import score_name, validation_score

__all__ = [
    "ClassWeight",
    "Job",
    "Loss",
    "Trained",
    "TrainingSet",
    "TrainingSettings",
    "batches",
    "divergence",
    "make_loss",
    "neighbours",
    "require_labels_of_parts",
    "score_name",
    "suggested_settings",
    "train_mechanisms",
    "validation_score",
]
