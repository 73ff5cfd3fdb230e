"""What to train, and from what."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sidelight.calibration import CalibrationKind
from sidelight.mechanisms import MechanismSpec
from sidelight.prompts import Reads
from sidelight.training import Job, TrainingSettings, suggested_settings

TRAINING_MAX_TOKENS = 1024


@dataclass(frozen=True)
class FitOptions:
    """What to train, and from what.

    Attributes:
        mechanisms: Each is trained with every seed.
        seeds: Of initial parameters and data order; the split is the same for all.
        settings: By mechanism name; the suggested ones where a name is missing.
        standardise: Whether hidden states are standardised per layer.
        reads: The tokens that the probe looks at.
        calibration: From logits to probabilities.
        max_tokens: Longer training texts are cut at their end, and counted.
        cache_root: Where activations are kept while training; None is the user's cache.
        cache_budget_bytes: The most that activations may take; None allows what the disk has.
        keep_cache: Whether the activations stay after training, for another one.
    """

    mechanisms: tuple[MechanismSpec, ...]
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, TrainingSettings] = field(default_factory=dict)
    standardise: bool = True
    reads: Reads = field(default_factory=Reads)
    calibration: CalibrationKind = "platt"
    max_tokens: int = TRAINING_MAX_TOKENS
    cache_root: Path | None = None
    cache_budget_bytes: int | None = None
    keep_cache: bool = False

    def jobs(self) -> list[Job]:
        """Every mechanism with every seed."""
        return [
            Job(
                spec,
                seed,
                self.settings.get(spec.name, suggested_settings(spec.name)),
                standardise=self.standardise,
            )
            for spec in self.mechanisms
            for seed in self.seeds
        ]
