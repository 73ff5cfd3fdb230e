"""Experimental mechanisms, registered as entry points and compared with the product's own."""

from sidelight.training.settings import SUGGESTED, TrainingSettings

# Chosen on ToxicChat validation data.
SUGGESTED["fusion"] = TrainingSettings(weight_decay=0.3, epochs=6)
SUGGESTED["blend"] = TrainingSettings(weight_decay=0.3, epochs=6, layer_weights="predictive")
