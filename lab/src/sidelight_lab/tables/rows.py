"""The rows of a table, built from the names in its recipe."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from pydantic import TypeAdapter, ValidationError

from sidelight.errors import SidelightError, did_you_mean
from sidelight.mechanisms.base import MechanismSpec, mechanism_spec
from sidelight.training.settings import TrainingSettings, suggested_settings
from sidelight_lab.baselines import BASELINES
from sidelight_lab.baselines.base import Baseline
from sidelight_lab.tables.recipes import BaselineRow, ProbeRow, Recipe, Value

Configuration = tuple[MechanismSpec, TrainingSettings]


@dataclass(frozen=True)
class ProbeConfig:
    """A mechanism with everything that decides how it is trained.

    Attributes:
        swept: The value of the swept parameter; None outside a sensitivity table.
        line: Name of the probe that is swept: rows with the same line make one curve.
    """

    name: str
    spec: MechanismSpec
    settings: TrainingSettings
    swept: Value | None = None
    line: str = ""
    seeds: ClassVar[None] = None
    is_single_pass: ClassVar[bool] = True

    @property
    def title(self) -> str:
        """The row's name in the table."""
        return self.name

    def describe(self) -> dict[str, Any]:
        """Everything that decides a result besides texts and seed, for its hash."""
        return {"spec": asdict(self.spec), "settings": asdict(self.settings)}


@dataclass(frozen=True)
class BaselineConfig:
    """A baseline that is ready to be fitted.

    Attributes:
        title: The row's name in the table.
        seeds: The most runs; None means all of the table's seeds.
    """

    name: str
    title: str
    baseline: Baseline
    seeds: int | None

    @property
    def is_single_pass(self) -> bool:
        """Whether it reads nothing but the served LLM's own forward pass."""
        return self.baseline.is_single_pass

    def describe(self) -> dict[str, Any]:
        """Everything that decides a result besides texts and seed, for its hash."""
        return {"baseline": type(self.baseline).__name__, "options": repr(self.baseline)}


Row = ProbeConfig | BaselineConfig


def suggested(mechanism: str) -> Configuration:
    """The configuration that needs no search."""
    return mechanism_spec(mechanism), suggested_settings(mechanism)


def build_rows(recipe: Recipe, search: Callable[[str], Configuration]) -> tuple[Row, ...]:
    """The rows in the order of the recipe, swept or searched as it says."""
    probes = [_probe(row, search) for row in recipe.probe]
    if recipe.sweep is not None:
        parameter, values = recipe.sweep.parameter, recipe.sweep.values
        probes = [_swept(probe, parameter, value) for probe in probes for value in values]
    return (*probes, *map(_baseline, recipe.baseline))


def _probe(row: ProbeRow, search: Callable[[str], Configuration]) -> ProbeConfig:
    if row.search:
        return ProbeConfig(row.name, *search(row.mechanism), line=row.name)
    settings = _changed(suggested_settings(row.mechanism), row.settings)
    spec = mechanism_spec(row.mechanism, row.options)
    return ProbeConfig(row.name, spec, settings, line=row.name)


def _swept(probe: ProbeConfig, parameter: str, value: Value) -> ProbeConfig:
    spec, settings = probe.spec, probe.settings
    if parameter in _SETTINGS:
        settings = _changed(settings, {parameter: value})
    else:
        spec = mechanism_spec(spec.name, {**spec.options, parameter: value})  # pyright: ignore
    name = f"{probe.name}, {parameter} {value}"
    return replace(probe, name=name, spec=spec, settings=settings, swept=value)


_SETTINGS = tuple(setting.name for setting in fields(TrainingSettings))


def _changed(settings: TrainingSettings, given: Mapping[str, Value]) -> TrainingSettings:
    for name in given:
        if name not in _SETTINGS:
            raise SidelightError(f"Unknown setting '{name}'.{did_you_mean(name, _SETTINGS)}")
    try:
        # Through JSON: in strict mode, a Python dict is no dataclass.
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
    # A row that has its own name tells two configurations of one baseline apart.
    title = kind.title if row.name == row.key else row.name
    return BaselineConfig(row.name, title, baseline, row.seeds)


def _refusal(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place} cannot be {first['input']!r}: {first['msg']}."
