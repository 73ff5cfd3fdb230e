"""The rows of a table, built from what a recipe names.

What a table takes from outside: the backbone, data sets by name, and a search.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sidelight.backbone import TransformersBackbone
from sidelight.errors import SidelightError, did_you_mean
from sidelight.mechanisms.base import MechanismSpec, mechanism_spec
from sidelight.training.dataset import ProbeDataset
from sidelight.training.settings import TrainingSettings, suggested_settings
from sidelight_lab.baselines import BASELINES
from sidelight_lab.baselines.base import Baseline
from sidelight_lab.tables.recipes import BaselineRow, ProbeRow, Recipe, Sweep, Value
from sidelight_lab.tables.rounds import LabelledData


@dataclass(frozen=True)
class ProbeConfig:
    """A mechanism with everything that decides how it is trained.

    Attributes:
        name: Of the row.
        spec: The mechanism.
        settings: Of its training.
        swept: The value of the swept parameter; None outside a sensitivity table.
        line: The probe that was swept: rows of one line are one curve.
    """

    name: str
    spec: MechanismSpec
    settings: TrainingSettings
    swept: Value | None = None
    line: str = ""


@dataclass(frozen=True)
class BaselineConfig:
    """A baseline with its options.

    Attributes:
        name: Of the row.
        baseline: Ready to be fitted.
        seeds: At most so many; None means all of the table's.
    """

    name: str
    baseline: Baseline
    seeds: int | None


@dataclass(frozen=True)
class Rows:
    """All rows of a table, in its order."""

    probes: tuple[ProbeConfig, ...]
    baselines: tuple[BaselineConfig, ...]


@dataclass(frozen=True)
class Found:
    """What a search on validation data chose."""

    spec: MechanismSpec
    settings: TrainingSettings


def build_rows(recipe: Recipe, search: Callable[[str], Found]) -> Rows:
    """The rows of a recipe, swept and searched where it says so.

    Args:
        recipe: The table.
        search: Gives the best configuration of a mechanism.

    Raises:
        SidelightError: An unknown mechanism, baseline, option or setting, or a value it refuses.
    """
    baselines = tuple(map(_baseline, recipe.baseline))
    probes = [_probe(row) for row in recipe.probe if not row.search]
    if recipe.sweep is not None:
        return Rows(tuple(_swept(probes, recipe.sweep)), baselines)
    checked = {probe.name: probe for probe in probes}
    return Rows(
        tuple(
            checked[row.name] if not row.search else _searched(row, search(row.mechanism))
            for row in recipe.probe
        ),
        baselines,
    )


def _probe(row: ProbeRow) -> ProbeConfig:
    suggested = suggested_settings(row.mechanism)
    spec = mechanism_spec(row.mechanism, row.options)
    return ProbeConfig(row.name, spec, _with_settings(suggested, row.settings), line=row.name)


def _searched(row: ProbeRow, found: Found) -> ProbeConfig:
    return ProbeConfig(row.name, found.spec, found.settings, line=row.name)


def _swept(probes: list[ProbeConfig], sweep: Sweep) -> list[ProbeConfig]:
    return [
        _with_value(probe, sweep.parameter, value) for probe in probes for value in sweep.values
    ]


def _with_value(probe: ProbeConfig, parameter: str, value: Value) -> ProbeConfig:
    spec, settings = probe.spec, probe.settings
    if parameter in _SETTINGS:
        settings = _with_settings(settings, {parameter: value})
    else:
        spec = mechanism_spec(spec.name, {**spec.options, parameter: value})  # pyright: ignore
    name = f"{probe.name}, {parameter} {value}"
    return replace(probe, name=name, spec=spec, settings=settings, swept=value)


_SETTINGS = tuple(setting.name for setting in fields(TrainingSettings))


def _with_settings(settings: TrainingSettings, given: Mapping[str, Value]) -> TrainingSettings:
    for name in given:
        if name not in _SETTINGS:
            raise SidelightError(f"Unknown setting '{name}'.{did_you_mean(name, _SETTINGS)}")
    try:
        # Through JSON: strictly, Python's dict is no dataclass.
        values = json.dumps({**asdict(settings), **given})
        checked = TypeAdapter(TrainingSettings).validate_json(values, strict=True)
    except ValidationError as error:
        raise SidelightError(f"Setting {_refusal(error)}") from error
    return settings.changed(**{name: getattr(checked, name) for name in given})


def _baseline(row: BaselineRow) -> BaselineConfig:
    if row.key not in BASELINES:
        raise SidelightError(f"Unknown baseline '{row.key}'.{did_you_mean(row.key, BASELINES)}")
    kind = BASELINES[row.key]
    known = [option.name for option in fields(kind)]  # pyright: ignore[reportArgumentType]
    for option in row.options:
        if option not in known:
            raise SidelightError(
                f"Unknown option '{option}' of baseline '{row.key}'.{did_you_mean(option, known)}"
            )
    try:
        baseline = TypeAdapter(kind).validate_python(row.options)
    except ValidationError as error:
        raise SidelightError(f"Option {row.key}.{_refusal(error)}") from error
    return BaselineConfig(row.name, baseline, row.seeds)


def _refusal(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place} cannot be {first['input']!r}: {first['msg']}."


Load = Callable[[str], LabelledData]
Search = Callable[[ProbeDataset, str, Path], Found]


@dataclass(frozen=True)
class Tools:
    """What a table takes from outside.

    Attributes:
        backbone: The frozen LLM.
        load: Gives a data set by name.
        search: Gives the best configuration of a mechanism on a study's validation texts; the path
            is a file that it keeps its trials in.
        cache_root: Folder of activations.
    """

    backbone: TransformersBackbone
    load: Load
    search: Search
    cache_root: Path


def suggested(mechanism: str) -> Found:
    """The configuration that needs no search."""
    return Found(mechanism_spec(mechanism), suggested_settings(mechanism))


def searched(*, trials: int) -> Search:
    """The search of the package.

    Args:
        trials: Configurations of each mechanism.
    """
    from sidelight_lab.search.trials import search_settings

    def search(dataset: ProbeDataset, mechanism: str, storage: Path) -> Found:
        best = search_settings(dataset, mechanism, trials=trials, seed=0, storage=storage)
        return Found(best.spec, best.settings)

    return search
