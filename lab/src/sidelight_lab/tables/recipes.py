"""Recipes of tables as TOML files, of the package or of a user, and the rows that they name."""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic.dataclasses
from pydantic import ConfigDict, TypeAdapter, ValidationError

from sidelight.errors import SidelightError, did_you_mean
from sidelight.mechanisms.base import mechanism_spec
from sidelight.metrics import METRICS
from sidelight.prompts import Reads
from sidelight.training.settings import TrainingSettings, suggested_settings
from sidelight.types import MechanismSpec
from sidelight_lab.baselines import BASELINES
from sidelight_lab.baselines.base import Baseline

Kind = Literal["comparison", "transfer", "few-shot", "sensitivity"]
Value = bool | int | float | str

_FOLDER = files("sidelight_lab.tables") / "recipes"


@dataclass(frozen=True)
class ProbeRow:
    """A mechanism with what differs from its defaults."""

    name: str
    mechanism: str
    options: Mapping[str, int | str] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class BaselineRow:
    """A baseline with the options that differ from its defaults."""

    name: str
    baseline: str | None = None  # its key in ``BASELINES``; None takes the row's name
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: int | None = None  # 1 for one in which nothing is random; None means the table's seeds


@dataclass(frozen=True)
class Sweep:
    """What a sensitivity table varies; every probe is trained with every value."""

    parameter: str  # a training setting, such as ``learning_rate``, or an option of the mechanisms
    values: tuple[Value, ...]


# The strict configuration holds for the nested dataclasses as well.
@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Recipe:
    """A table.

    Attributes:
        kind: ``comparison``; ``transfer``: trained on one data set, tested on another;
            ``few-shot``: a few labels per class, drawn again for each seed; ``sensitivity``: one
            parameter is swept.
        test_data: Name of the data set that a transfer is tested on.
        metric: What rows are compared by, one of ``METRICS``.
        ours: The row that the others are compared with; validation chooses one of several. Empty in
            a sensitivity table.
        reads: The tokens that probes and baselines read.
        max_tokens: Longer texts are cut.
        labels_per_class: Training labels per class of a few-shot draw.
    """

    title: str
    kind: Kind
    data: str = ""
    test_data: str | None = None
    metric: str = "auprc"
    ours: tuple[str, ...] = ()
    reads: Reads = field(default_factory=Reads)
    max_tokens: int = 512
    seeds: int = 3
    labels_per_class: int = 64
    draws: int = 10
    sweep: Sweep | None = None
    probe: tuple[ProbeRow, ...] = ()
    baseline: tuple[BaselineRow, ...] = ()

    def names(self) -> tuple[str, ...]:
        """The rows, in the order of the file."""
        return tuple(row.name for row in (*self.probe, *self.baseline))

    def only(self, names: Iterable[str]) -> "Recipe":
        """The recipe with these rows only; nothing is compared if no row of ours is left."""
        chosen = set(names)
        if not chosen:
            raise SidelightError(f"No row is named. Known: {', '.join(self.names())}.")
        for name in sorted(chosen - set(self.names())):
            raise SidelightError(f"No row '{name}'.{did_you_mean(name, self.names())}")
        return replace(
            self,
            ours=tuple(name for name in self.ours if name in chosen),
            probe=tuple(row for row in self.probe if row.name in chosen),
            baseline=tuple(row for row in self.baseline if row.name in chosen),
        )


_SECTIONS: dict[str, type[Any]] = {
    "probe": ProbeRow,
    "baseline": BaselineRow,
    "sweep": Sweep,
    "reads": Reads,
}


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    names = (file.name for file in _FOLDER.iterdir())
    return tuple(sorted(name[:-5] for name in names if name.endswith(".toml")))


def recipe_text(name: str) -> str:
    """The TOML of a recipe of the package, or of a file whose path ends in ``.toml``."""
    if name in recipe_names():
        return (_FOLDER / f"{name}.toml").read_text("utf-8")
    if not name.endswith(".toml"):
        raise SidelightError(
            f"Unknown recipe '{name}'.{did_you_mean(name, recipe_names())} "
            "Or name your own file, which must end in .toml."
        )
    try:
        return Path(name).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise SidelightError(f"Cannot read the recipe {name}: {error}.") from error


def parse_recipe(text: str, *, name: str) -> Recipe:
    """A recipe from its TOML; ``name`` stands in messages."""
    try:
        # Through JSON: in strict mode a list may then become a tuple, while "3" is still no number.
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(tomllib.loads(text)))
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise SidelightError(f"Recipe {name} is not plain TOML: {error}.") from error
    except ValidationError as error:
        raise SidelightError(f"Recipe {name}: {_complaint(error)}") from error
    for requirement, holds in _requirements(recipe).items():
        if not holds:
            raise SidelightError(f"Recipe {name}: {requirement}.")
    return recipe


def _complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] != "unexpected_keyword_argument":
        return f"{place} cannot be {first['input']!r}: {first['msg']}."
    section, _, key = place.rpartition(".")
    known = fields(_SECTIONS[section.partition(".")[0]] if section else Recipe)
    return f"unknown key '{place}'.{did_you_mean(key, [one.name for one in known])}"


def _requirements(recipe: Recipe) -> dict[str, bool]:
    """Each requirement across keys, and whether it is met."""
    rows, kind = recipe.names(), recipe.kind
    swept = recipe.sweep.values if recipe.sweep else None
    counts = (recipe.seeds, recipe.draws, recipe.labels_per_class, recipe.max_tokens)
    return {
        f"'metric' must be one of {', '.join(METRICS)}": recipe.metric in METRICS,
        "every row needs a name of its own": len(set(rows)) == len(rows),
        "a table needs a [[probe]] or a [[baseline]]": bool(rows),
        "'data' must name a data set": bool(recipe.data),
        f"'ours' must name rows of the table ({', '.join(rows)})": set(recipe.ours) <= set(rows),
        "a transfer needs 'test_data', and no other kind takes it": (
            (kind == "transfer") == (recipe.test_data is not None)
        ),
        "a sensitivity table needs a [sweep], and no other kind takes it": (
            (kind == "sensitivity") == (swept is not None)
        ),
        "a [sweep] needs values that differ": swept is None or 0 < len(swept) == len(set(swept)),
        "a sensitivity table takes no [[baseline]] and no 'ours': its rows are probes, each with a "
        "value": swept is None or not (recipe.baseline or recipe.ours),
        "'seeds', 'draws', 'labels_per_class' and 'max_tokens' must be 1 or more": min(counts) >= 1,
        "the 'seeds' of a baseline must be 1 or more": all(
            row.seeds is None or row.seeds >= 1 for row in recipe.baseline
        ),
    }


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
    is_single_pass: ClassVar[bool] = True

    @property
    def seeds(self) -> int | None:
        """Nothing in a linear probe's solution is random."""
        return 1 if self.spec.name == "linear" else None

    @property
    def title(self) -> str:
        return self.name

    def describe(self) -> dict[str, Any]:
        """Everything that decides a result besides texts and seed, for its hash."""
        return {"spec": asdict(self.spec), "settings": asdict(self.settings)}


@dataclass(frozen=True)
class BaselineConfig:
    """A baseline that is ready to be fitted, at most ``seeds`` times."""

    name: str
    title: str
    baseline: Baseline
    seeds: int | None

    @property
    def is_single_pass(self) -> bool:
        return self.baseline.is_single_pass

    def describe(self) -> dict[str, Any]:
        """Everything that decides a result besides texts and seed, for its hash."""
        return {"baseline": type(self.baseline).__name__, "options": repr(self.baseline)}


Row = ProbeConfig | BaselineConfig


def build_rows(recipe: Recipe) -> tuple[Row, ...]:
    """The rows in the order of the recipe, swept if it says so."""
    probes = [_probe(row) for row in recipe.probe]
    if recipe.sweep is not None:
        parameter, values = recipe.sweep.parameter, recipe.sweep.values
        probes = [_swept(probe, parameter, value) for probe in probes for value in values]
    return (*probes, *map(_baseline, recipe.baseline))


def _probe(row: ProbeRow) -> ProbeConfig:
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
        raise SidelightError(f"Setting {_complaint(error)}") from error
    return settings.changed(**{name: getattr(checked, name) for name in given})


def _baseline(row: BaselineRow) -> BaselineConfig:
    key = row.baseline or row.name
    if key not in BASELINES:
        raise SidelightError(f"Unknown baseline '{key}'.{did_you_mean(key, BASELINES)}")
    kind = BASELINES[key]
    known = [option.name for option in fields(kind)]  # pyright: ignore[reportArgumentType]
    for option in row.options:
        if option not in known:
            raise SidelightError(
                f"Unknown option '{option}' of baseline '{key}'.{did_you_mean(option, known)}"
            )
    try:
        baseline = TypeAdapter(kind).validate_python(row.options)
    except ValidationError as error:
        raise SidelightError(f"Option {key}.{_complaint(error)}") from error
    # A row that has its own name tells two configurations of one baseline apart.
    title = kind.title if row.name == key else row.name
    return BaselineConfig(row.name, title, baseline, row.seeds)
