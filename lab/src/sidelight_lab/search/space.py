"""Where each mechanism's settings are looked for. Knows ranges, not how they are searched.

Draws a configuration from a space, as parameters that optuna knows by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import optuna
import torch

from sidelight.errors import SidelightError
from sidelight.mechanisms.base import Geometry, MechanismSpec, OptionValue, mechanism_spec
from sidelight.training.settings import TrainingSettings, suggested_settings


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included."""

    low: float
    high: float

    def nearest(self, value: float) -> float:
        """The number of the range that is closest to ``value``."""
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Space:
    """Where one mechanism's settings are looked for.

    The paper searches learning rates of 1e-5 to 1e-3, decays of 0 to .05, batches of 8 to 64 and
    at most 10 epochs (Meyoyan & Del Corro 2026). Standardised states bear more decay.

    Attributes:
        learning_rate: Even on a logarithmic scale.
        weight_decay: Even on a linear scale.
        most_epochs: At most; early stopping may end a trial before.
        batch_sizes: Texts per step.
        options: Values of the mechanism's options; an option that is missing keeps its default.
    """

    learning_rate: Range = Range(1e-5, 5e-2)
    weight_decay: Range = Range(0.0, 0.5)
    most_epochs: int = 10
    batch_sizes: tuple[int, ...] = (8, 16, 32, 64)
    options: Mapping[str, tuple[OptionValue, ...]] = field(default_factory=dict)


# Of a mechanism without an entry below.
GENERIC = Space()

# Heads of a single layer learn best above the paper's rates; `docs/results.md` has the runs.
SPACES: Mapping[str, Space] = {
    "pooling": Space(options={"kind": ("mean", "max")}),
    "gate": Space(options={"activation": ("tanh", "identity")}),
    "attention": Space(
        learning_rate=Range(1e-5, 1e-3),
        options={"factor": (4, 8, 16, 32, 64), "heads": (4, 8, 16), "pooling": ("mean", "max")},
    ),
    "readout": Space(
        learning_rate=Range(1e-5, 1e-2),
        options={"heads": (1, 2, 4, 8), "extremes": ("none", "pair")},
    ),
    "fusion": Space(learning_rate=Range(1e-4, 1e-2), options={"rank": (16, 32, 64, 128)}),
    "blend": Space(
        learning_rate=Range(1e-4, 1e-2),
        options={"extremes": ("none", "pair"), "fusions": (1, 2), "rank": (16, 32, 64)},
    ),
}


def space_of(mechanism: str) -> Space:
    """The mechanism's space, or the generic one.

    Raises:
        SidelightError: Unknown mechanism.
    """
    return SPACES.get(mechanism_spec(mechanism).name, GENERIC)


def possible_specs(
    mechanism: str, geometry: Geometry, options: Mapping[str, tuple[OptionValue, ...]]
) -> list[MechanismSpec]:
    """Every combination of the options that the mechanism can be built with for these sizes.

    Raises:
        SidelightError: Unknown mechanism or option, or no combination fits.
    """
    specs = [
        mechanism_spec(mechanism, dict(zip(options, values, strict=True)))
        for values in product(*options.values())
    ]
    refusals = [_refusal(spec, geometry) for spec in specs]
    possible = [spec for spec, refusal in zip(specs, refusals, strict=True) if refusal is None]
    if not possible:
        raise SidelightError(
            f"None of the {len(specs)} combinations of options searched for '{mechanism}' fits "
            f"hidden states of width {geometry.width}; search other mechanisms. The last one: "
            f"{refusals[-1]}"
        )
    return possible


def narrow(
    specs: Sequence[MechanismSpec],
    options: Sequence[str],
    pick: Callable[[str, Sequence[OptionValue]], object],
) -> MechanismSpec:
    """Picks one option after the other, each among the values that are still possible.

    Args:
        specs: The possible combinations.
        options: What to pick.
        pick: Given an option and its values, two or more, gives one of them.
    """
    for option in options:
        values = list(dict.fromkeys(spec.options[option] for spec in specs))
        chosen = pick(option, values) if len(values) > 1 else values[0]
        specs = [spec for spec in specs if spec.options[option] == chosen]
    return specs[0]


def _refusal(spec: MechanismSpec, geometry: Geometry) -> SidelightError | None:
    try:
        # Shapes without memory: on a large backbone the parameters would be gigabytes.
        with torch.device("meta"):
            spec.build(geometry)
    except SidelightError as refusal:
        return refusal
    return None


def draw_spec(trial: optuna.Trial, space: Space, specs: Sequence[MechanismSpec]) -> MechanismSpec:
    """One of the possible specifications, option by option."""
    return narrow(
        specs,
        tuple(space.options),
        lambda option, values: trial.suggest_categorical(_asked(option, values), values),
    )


def draw_settings(trial: optuna.Trial, space: Space, mechanism: str) -> TrainingSettings:
    """Settings of the space; what it does not cover is as suggested for the mechanism."""
    rate, decay = space.learning_rate, space.weight_decay
    return suggested_settings(mechanism).changed(
        learning_rate=trial.suggest_float("learning rate", rate.low, rate.high, log=True),
        weight_decay=trial.suggest_float("weight decay", decay.low, decay.high),
        epochs=trial.suggest_int("epochs", 1, space.most_epochs),
        batch_size=trial.suggest_categorical("batch size", space.batch_sizes),
    )


def defaults(
    mechanism: str, space: Space, specs: Sequence[MechanismSpec]
) -> dict[str, OptionValue | float]:
    """The parameters of a mechanism's default options and settings, or the nearest possible."""
    settings, options = suggested_settings(mechanism), mechanism_spec(mechanism).options
    sizes = space.batch_sizes
    parameters: dict[str, OptionValue | float] = {
        "learning rate": space.learning_rate.nearest(settings.learning_rate),
        "weight decay": space.weight_decay.nearest(settings.weight_decay),
        "epochs": min(settings.epochs, space.most_epochs),
        "batch size": min(sizes, key=lambda size: abs(size - settings.batch_size)),
    }

    def answer(option: str, values: Sequence[OptionValue]) -> OptionValue:
        value = options[option] if options[option] in values else values[0]
        parameters[_asked(option, values)] = value
        return value

    narrow(specs, tuple(space.options), answer)
    return parameters


def _asked(option: str, values: Sequence[OptionValue]) -> str:
    """A parameter's choices may not change, so where some are ruled out it is another one."""
    return f"{option} of {', '.join(map(str, values))}"
