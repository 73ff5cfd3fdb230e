"""Mechanisms that are compared with those of the product, which finds them as entry points."""

from sidelight.training.settings import SUGGESTED, TrainingSettings

# Chosen on ToxicChat validation data.
SUGGESTED["fusion"] = TrainingSettings(weight_decay=0.3, epochs=6)
SUGGESTED["blend"] = TrainingSettings(weight_decay=0.3, epochs=6, layer_weights="predictive")
