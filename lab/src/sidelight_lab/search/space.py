"""The search space of each mechanism's options and settings. Knows parameters, not training."""

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


@dataclass(frozen=True)
class Space:
    """The search space of one mechanism.

    The paper searches learning rates of 1e-5 to 1e-3, decays of 0 to .05, batches of 8 to 64 and
    at most 10 epochs (Meyoyan & Del Corro 2026). Standardised states bear more decay.

    Attributes:
        learning_rate: Drawn uniformly on a logarithmic scale.
        weight_decay: Drawn uniformly on a linear scale.
        most_epochs: The most epochs; early stopping may end a trial sooner.
        options: Values of the mechanism's options; a missing option keeps its default.
    """

    learning_rate: Range = Range(1e-5, 5e-2)
    weight_decay: Range = Range(0.0, 0.5)
    most_epochs: int = 10
    batch_sizes: tuple[int, ...] = (8, 16, 32, 64)
    options: Mapping[str, tuple[OptionValue, ...]] = field(default_factory=dict)


# Heads of a single layer learn best above the paper's rates; `docs/results.md` has the runs.
# A mechanism without an entry has the default space.
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


def possible_specs(
    mechanism: str, geometry: Geometry, options: Mapping[str, tuple[OptionValue, ...]]
) -> list[MechanismSpec]:
    """All combinations of the options that the mechanism can be built with for these sizes."""
    possible: list[MechanismSpec] = []
    refusal = ""
    for values in product(*options.values()):
        spec = mechanism_spec(mechanism, dict(zip(options, values, strict=True)))
        try:
            # The meta device allocates nothing: for a large backbone the parameters take gigabytes.
            with torch.device("meta"):
                spec.build(geometry)
        except SidelightError as error:
            refusal = str(error)
        else:
            possible.append(spec)
    if not possible:
        raise SidelightError(
            f"No combination of the options searched for '{mechanism}' fits hidden states of width "
            f"{geometry.width}. Search other mechanisms. The last refusal: {refusal}"
        )
    return possible


def draw(
    trial: optuna.Trial, space: Space, specs: Sequence[MechanismSpec]
) -> tuple[MechanismSpec, TrainingSettings]:
    """One of the possible specifications, and settings from the space.

    Settings that the space does not cover are the suggested ones of the mechanism.
    """
    spec = _pick_options(specs, space, trial.suggest_categorical)
    rate, decay = space.learning_rate, space.weight_decay
    settings = suggested_settings(spec.name).changed(
        learning_rate=trial.suggest_float("learning rate", rate.low, rate.high, log=True),
        weight_decay=trial.suggest_float("weight decay", decay.low, decay.high),
        epochs=trial.suggest_int("epochs", 1, space.most_epochs),
        batch_size=trial.suggest_categorical("batch size", space.batch_sizes),
    )
    return spec, settings


def default_parameters(
    space: Space, specs: Sequence[MechanismSpec]
) -> dict[str, OptionValue | float]:
    """The parameters of the mechanism's default options and settings, or the nearest ones."""
    mechanism = specs[0].name
    settings, defaults = suggested_settings(mechanism), mechanism_spec(mechanism).options
    rate, decay = space.learning_rate, space.weight_decay
    parameters: dict[str, OptionValue | float] = {
        "learning rate": min(max(settings.learning_rate, rate.low), rate.high),
        "weight decay": min(max(settings.weight_decay, decay.low), decay.high),
        "epochs": min(settings.epochs, space.most_epochs),
        "batch size": min(space.batch_sizes, key=lambda size: abs(size - settings.batch_size)),
    }

    def pick(name: str, values: Sequence[OptionValue]) -> OptionValue:
        default = defaults[name.partition(" of ")[0]]
        parameters[name] = default if default in values else values[0]
        return parameters[name]  # pyright: ignore[reportReturnType]

    _pick_options(specs, space, pick)
    return parameters


def _pick_options(
    specs: Sequence[MechanismSpec],
    space: Space,
    pick: Callable[[str, Sequence[OptionValue]], object],
) -> MechanismSpec:
    """Narrows the specifications down to one by picking each option among the possible values.

    ``pick`` gets a parameter's name and its values, two or more, and returns one of them.
    """
    for option in space.options:
        values = list(dict.fromkeys(spec.options[option] for spec in specs))
        # Optuna does not let a parameter's choices change, so each set of choices has its own name.
        name = f"{option} of {', '.join(map(str, values))}"
        chosen = pick(name, values) if len(values) > 1 else values[0]
        specs = [spec for spec in specs if spec.options[option] == chosen]
    return specs[0]
