"""Draws a configuration from a space, as parameters that optuna knows by name."""

from collections.abc import Sequence

import optuna

from sidelight.mechanisms import MechanismSpec, OptionValue, mechanism_spec
from sidelight.search.space import Space, narrow
from sidelight.training import TrainingSettings, suggested_settings


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
