"""Recipes of tables as TOML files, of the package or of a user, and the rows that they name."""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic.dataclasses
from pydantic import ConfigDict, PositiveInt, TypeAdapter, ValidationError

from sidelight.errors import SidelightError, did_you_mean
from sidelight.models.conversation import Reads
from sidelight.probes.mechanisms.base import mechanism_spec
from sidelight.statistics.metrics import METRICS
from sidelight.training.settings import TrainingSettings, suggested_settings
from sidelight.types import MechanismSpec
from sidelight_lab.baselines import BASELINES
from sidelight_lab.baselines.base import Baseline

Kind = Literal["comparison", "transfer", "few-shot", "sensitivity"]
Value = bool | int | float | str

_FOLDER = files("sidelight_lab.tables") / "recipes"
# A table's seeds are those of all its rows.
_SETTINGS = tuple(field.name for field in fields(TrainingSettings) if field.name != "seed")


@dataclass(frozen=True)
class ProbeRow:
    """A mechanism with what differs from its defaults."""

    name: str
    mechanism: str
    options: Mapping[str, Value] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)
    seeds: ClassVar[None] = None
    is_single_pass: ClassVar[bool] = True

    @property
    def title(self) -> str:
        return self.name

    def spec(self) -> MechanismSpec:
        return mechanism_spec(self.mechanism, self.options)  # pyright: ignore[reportArgumentType]

    def training_settings(self) -> TrainingSettings:
        for name in self.settings:
            if name not in _SETTINGS:
                raise SidelightError(f"Unknown setting '{name}'.{did_you_mean(name, _SETTINGS)}")
        try:
            # Through JSON: in strict mode, a Python dict is no dataclass.
            values = json.dumps(dict(self.settings))
            checked = TypeAdapter(TrainingSettings).validate_json(values, strict=True)
        except ValidationError as error:
            raise SidelightError(f"Setting {_complaint(error, _SETTINGS)}") from error
        settings = {name: getattr(checked, name) for name in self.settings}
        return suggested_settings(self.spec().name).changed(**settings)

    def changed(self, parameter: str, value: Value) -> "ProbeRow":
        """With another value of a setting or an option, which the name tells."""
        row = replace(self, name=f"{self.name}, {parameter} {value}")
        if parameter in _SETTINGS:
            return replace(row, settings={**self.settings, parameter: value})
        return replace(row, options={**self.options, parameter: value})

    def describe(self) -> dict[str, Any]:
        """Everything that decides a result besides texts and seed, for its hash."""
        return {"spec": asdict(self.spec()), "settings": asdict(self.training_settings())}


@dataclass(frozen=True)
class BaselineRow:
    """A baseline with the options that differ from its defaults."""

    name: str
    baseline: str | None = None  # its key in ``BASELINES``; None takes the row's name
    options: Mapping[str, Any] = field(default_factory=dict)
    # 1 for one in which nothing is random; None means the table's seeds.
    seeds: PositiveInt | None = None

    @property
    def kind(self) -> type[Baseline]:
        key = self.baseline or self.name
        if key not in BASELINES:
            raise SidelightError(f"Unknown baseline '{key}'.{did_you_mean(key, BASELINES)}")
        return BASELINES[key]

    @property
    def title(self) -> str:
        """A row that has its own name tells two configurations of one baseline apart."""
        return self.kind.title if self.baseline in (None, self.name) else self.name

    @property
    def is_single_pass(self) -> bool:
        return self.kind.is_single_pass

    def model(self) -> Baseline:
        """The baseline, ready to be fitted."""
        known = [option.name for option in fields(self.kind)]  # pyright: ignore[reportArgumentType]
        try:
            return TypeAdapter(self.kind).validate_python(self.options)
        except ValidationError as error:
            raise SidelightError(f"Row '{self.name}': {_complaint(error, known)}") from error

    def describe(self) -> dict[str, Any]:
        """Everything that decides a result besides texts and seed, for its hash."""
        return {"baseline": self.kind.__name__, "options": repr(self.model())}


Row = ProbeRow | BaselineRow


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
        like: Another recipe, whose rows this one has too; a row of the same name replaces its row.
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
    like: str | None = None
    data: str = ""
    test_data: str | None = None
    metric: str = "auprc"
    ours: tuple[str, ...] = ()
    reads: Reads = field(default_factory=Reads)
    max_tokens: PositiveInt = 512
    seeds: PositiveInt = 3
    labels_per_class: PositiveInt = 64
    draws: PositiveInt = 10
    sweep: Sweep | None = None
    probe: tuple[ProbeRow, ...] = ()
    baseline: tuple[BaselineRow, ...] = ()

    def names(self) -> tuple[str, ...]:
        """The rows, in the order of the file."""
        return tuple(row.name for row in (*self.probe, *self.baseline))

    def rows(self) -> tuple[Row, ...]:
        """The rows in the order of the file; a sweep makes one of each probe and value."""
        if self.sweep is None:
            return (*self.probe, *self.baseline)
        parameter, values = self.sweep.parameter, self.sweep.values
        return tuple(row.changed(parameter, value) for row in self.probe for value in values)

    def only(self, names: Iterable[str]) -> "Recipe":
        """The recipe with these rows only; nothing is compared if no row of ours is left."""
        chosen = set(names)
        if not chosen:
            raise SidelightError(f"No row is named. Choose from: {', '.join(self.names())}.")
        for name in sorted(chosen - set(self.names())):
            raise SidelightError(f"No row '{name}'.{did_you_mean(name, self.names())}")
        return replace(
            self,
            ours=tuple(name for name in self.ours if name in chosen),
            probe=tuple(row for row in self.probe if row.name in chosen),
            baseline=tuple(row for row in self.baseline if row.name in chosen),
        )


_SECTIONS = (Recipe, ProbeRow, BaselineRow, Sweep, Reads)
_KEYS = {key.name for section in _SECTIONS for key in fields(section)}


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
            f"Unknown recipe '{name}'.{did_you_mean(name, recipe_names())} To use your own file, "
            "name one that ends in .toml."
        )
    try:
        return Path(name).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise SidelightError(f"Cannot read the recipe {name}: {error}.") from error


def parse_recipe(text: str, *, name: str, likes: tuple[str, ...] = ()) -> Recipe:
    """A recipe from its TOML; ``name`` stands in messages, after ``likes`` that led to it."""
    try:
        # Through JSON: in strict mode a list may then become a tuple, while "3" is still no number.
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(tomllib.loads(text)))
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise SidelightError(f"Recipe {name} is not valid TOML: {error}.") from error
    except ValidationError as error:
        raise SidelightError(f"Recipe {name}: {_complaint(error, _KEYS)}") from error
    if recipe.like is not None:
        if recipe.like in likes:
            raise SidelightError(f"Recipe {name}: 'like' leads back to {recipe.like}.")
        likes = (*likes, recipe.like)
        parent = parse_recipe(recipe_text(recipe.like), name=recipe.like, likes=likes)
        probes = {row.name: row for row in (*parent.probe, *recipe.probe)}
        baselines = {row.name: row for row in (*parent.baseline, *recipe.baseline)}
        recipe = replace(recipe, probe=tuple(probes.values()), baseline=tuple(baselines.values()))
    for requirement, holds in _requirements(recipe).items():
        if not holds:
            raise SidelightError(f"Recipe {name}: {requirement}.")
    return recipe


def _complaint(error: ValidationError, known: Iterable[str]) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown key '{place}'.{did_you_mean(str(first['loc'][-1]), known)}"
    return f"{place} cannot be {first['input']!r}: {first['msg']}."


def _requirements(recipe: Recipe) -> dict[str, bool]:
    """Each requirement across keys, and whether it is met."""
    rows, kind = recipe.names(), recipe.kind
    swept = recipe.sweep.values if recipe.sweep else None
    return {
        f"'metric' must be one of {', '.join(METRICS)}": recipe.metric in METRICS,
        "every row needs a unique name": len(set(rows)) == len(rows),
        "a table needs a [[probe]] or a [[baseline]]": bool(rows),
        "'data' must name a data set": bool(recipe.data),
        f"'ours' must name rows of the table ({', '.join(rows)})": set(recipe.ours) <= set(rows),
        "'test_data' is required for a transfer and not allowed otherwise": (
            (kind == "transfer") == (recipe.test_data is not None)
        ),
        "a [sweep] is required for a sensitivity table and not allowed otherwise": (
            (kind == "sensitivity") == (swept is not None)
        ),
        "the values of a [sweep] must be distinct": swept is None
        or 0 < len(swept) == len(set(swept)),
        "a sensitivity table cannot have a [[baseline]] or 'ours', because each of its rows is a "
        "probe with one of the values": swept is None or not (recipe.baseline or recipe.ours),
    }
