"""Which mechanisms to train where the user leaves it open: what so many labels can support.

What to train, and from what.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from sidelight.calibration import CalibrationKind
from sidelight.errors import SidelightError
from sidelight.mechanisms.base import MechanismSpec, mechanism_spec
from sidelight.prompts import Reads
from sidelight.training.settings import Job, TrainingSettings, suggested_settings

AUTO = "auto"
# Texts below which extremes overfit, and features; docs/results.md has the runs.
FEW_TEXTS, _MANY_TEXTS = 1000, 5000


def automatic_mechanisms(texts: int, *, long_inputs: bool = False) -> tuple[MechanismSpec, ...]:
    """The candidates; of several, validation texts choose.

    Args:
        texts: For training.
        long_inputs: Whether they are also trained on as parts of long inputs.
    """
    # Extremes of long inputs overfit too.
    if texts < FEW_TEXTS or long_inputs:
        return (mechanism_spec("readout"),)
    extremes = mechanism_spec("readout", {"extremes": "pair"})
    if texts < _MANY_TEXTS:
        return (extremes,)
    return (extremes, mechanism_spec("blend"))


TRAINING_MAX_TOKENS = 1024


@dataclass(frozen=True)
class FitOptions:
    """What to train, and from what.

    Attributes:
        mechanisms: Each is trained with every seed; None takes what suits the number of texts.
        seeds: Of initial parameters and data order; the split is the same for all.
        settings: By mechanism name; the suggested ones where a name is missing.
        long_inputs: Whether the probe is to find a text among others in a long input: for labels
            that a part of a text can have.
        standardise: Whether hidden states are standardised per layer.
        reads: The tokens that the probe looks at.
        calibration: From logits to probabilities.
        max_tokens: Longer training texts are cut, and counted.
        cache_root: Where activations are kept while training; None is the user's cache.
        cache_budget_bytes: The most that the activations of training texts may take, and those of
            validation texts; None allows what the disk has.
        keep_cache: Whether the activations stay after training, for another one.
    """

    mechanisms: tuple[MechanismSpec, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, TrainingSettings] = field(default_factory=dict)
    long_inputs: bool = False
    standardise: bool = True
    reads: Reads = field(default_factory=Reads)
    calibration: CalibrationKind = "platt"
    max_tokens: int = TRAINING_MAX_TOKENS
    cache_root: Path | None = None
    cache_budget_bytes: int | None = None
    keep_cache: bool = False

    def __post_init__(self) -> None:
        """Refuses to train nothing."""
        if not self.seeds:
            raise SidelightError("There is no seed to train with. Give one or more, such as 0.")
        if self.mechanisms is not None and not self.mechanisms:
            raise SidelightError(
                "There is no mechanism to train. Name one or more, or give None to take what suits "
                "the number of texts."
            )

    def jobs(self, texts: int) -> list[Job]:
        """Every mechanism with every seed.

        Args:
            texts: For training.
        """
        specs = self.mechanisms
        if specs is None:
            specs = automatic_mechanisms(texts, long_inputs=self.long_inputs)
        return [
            Job(spec, seed, self._settings(spec), standardise=self.standardise)
            for spec in specs
            for seed in self.seeds
        ]

    def _settings(self, spec: MechanismSpec) -> TrainingSettings:
        settings = self.settings.get(spec.name, suggested_settings(spec.name))
        return replace(settings, long_inputs=settings.long_inputs or self.long_inputs)
