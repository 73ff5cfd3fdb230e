"""Recipes of tables as TOML files, of the package or of a user.

Every key is checked here; `rows.py` looks up what the names in a recipe stand for.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pydantic.dataclasses
from pydantic import ConfigDict, TypeAdapter, ValidationError

from sidelight.errors import SidelightError, did_you_mean
from sidelight.metrics import METRICS
from sidelight.prompts import Reads

Kind = Literal["comparison", "transfer", "few-shot", "sensitivity", "latency"]
Value = int | float | str

_FOLDER = files("sidelight_lab.tables") / "recipes"


@dataclass(frozen=True)
class ProbeRow:
    """A mechanism in the table.

    Attributes:
        options: Options of the mechanism that differ from its defaults.
        settings: Training settings that differ from the suggested ones.
        search: Search options and settings on validation data instead.
    """

    name: str
    mechanism: str
    options: Mapping[str, int | str] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)
    search: bool = False


@dataclass(frozen=True)
class BaselineRow:
    """A baseline in the table.

    Attributes:
        baseline: Its key in ``BASELINES``; None takes the row's name.
        options: Options that differ from the baseline's defaults.
        seeds: 1 for a baseline in which nothing is random; None means the seeds of the table.
    """

    name: str
    baseline: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: int | None = None

    @property
    def key(self) -> str:
        """The key in ``BASELINES``."""
        return self.baseline or self.name


@dataclass(frozen=True)
class Sweep:
    """The parameter that a sensitivity table varies; every probe is trained with every value.

    Attributes:
        parameter: A training setting, such as ``learning_rate``, or an option of the mechanisms.
    """

    parameter: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class LatencyRow:
    """What a latency table measures.

    Attributes:
        batch_sizes: Prompts per forward pass.
        tokens: Lengths of prompts of random tokens.
        texts: Number of validation texts to run as well, if the recipe names a data set.
        repeats: Number of timed rounds.
    """

    batch_sizes: tuple[int, ...] = (1, 16)
    tokens: tuple[int, ...] = (16, 64, 256, 512, 1024, 2048)
    texts: int = 64
    repeats: int = 5


# The strict configuration holds for the nested dataclasses as well.
@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Recipe:
    """A table.

    Attributes:
        kind: ``comparison``; ``transfer``: trained on one data set, tested on another;
            ``few-shot``: a few labels per class, drawn again for each seed; ``sensitivity``: one
            parameter is swept; ``latency``: the time of every mechanism and of what it replaces,
            without any training.
        data: Name of the data set.
        test_data: Name of the data set that a transfer is tested on.
        metric: The metric that rows are compared by, one of ``METRICS``.
        ours: The row that the others are compared with; validation chooses one of several. Empty in
            a sensitivity table.
        reads: The tokens that probes and baselines read.
        max_tokens: Longer texts are cut.
        seeds: Number of runs of each row.
        labels_per_class: Training labels per class of a few-shot draw.
        draws: Number of few-shot draws.
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
    latency: LatencyRow = field(default_factory=LatencyRow)
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
    "latency": LatencyRow,
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
        raise SidelightError(f"Recipe {name}: {_first_complaint(error)}") from error
    for requirement, holds in _requirements(recipe).items():
        if not holds:
            raise SidelightError(f"Recipe {name}: {requirement}.")
    return recipe


def _first_complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] != "unexpected_keyword_argument":
        return f"{place}: {first['msg']}."
    section, _, key = place.rpartition(".")
    known = fields(_SECTIONS[section.partition(".")[0]] if section else Recipe)
    return f"unknown key '{place}'.{did_you_mean(key, [one.name for one in known])}"


def _requirements(recipe: Recipe) -> dict[str, bool]:
    """Each requirement across keys, and whether it is met."""
    rows, kind, probes = recipe.names(), recipe.kind, recipe.probe
    swept = recipe.sweep.values if recipe.sweep else None
    counts = (recipe.seeds, recipe.draws, recipe.labels_per_class, recipe.max_tokens)
    return {
        f"'metric' must be one of {', '.join(METRICS)}": recipe.metric in METRICS,
        "every row needs a name of its own": len(set(rows)) == len(rows),
        "a latency table takes no rows, and any other kind needs a [[probe]] or a [[baseline]]": (
            bool(rows) == (kind != "latency")
        ),
        "'data' must name a data set": bool(recipe.data) or kind == "latency",
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
        "a searched probe takes no options and settings of its own": not any(
            row.search and (row.options or row.settings) for row in probes
        ),
        "only a comparison or a transfer can search its probes": (
            kind in ("comparison", "transfer") or not any(row.search for row in probes)
        ),
        "'seeds', 'draws', 'labels_per_class' and 'max_tokens' must be 1 or more": min(counts) >= 1,
        "the 'seeds' of a baseline must be 1 or more": all(
            row.seeds is None or row.seeds >= 1 for row in recipe.baseline
        ),
    }
