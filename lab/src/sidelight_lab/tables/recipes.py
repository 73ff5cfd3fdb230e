"""What a table is made of. Knows names, not what they build.

Recipes as TOML files, of the package or of a user; every key is checked.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sidelight.errors import SidelightError, did_you_mean
from sidelight.metrics import METRICS

Kind = Literal["comparison", "transfer", "few-shot", "sensitivity", "latency"]
Value = int | float | str

_CHECKED = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=_CHECKED)
class ReadsRow:
    """Which tokens probes read; see ``prompts.Reads``."""

    side: Literal["prompt", "response", "both"] = "prompt"
    template: bool = True


@dataclass(frozen=True, config=_CHECKED)
class ProbeRow:
    """A mechanism in the table.

    Attributes:
        name: Of the row.
        mechanism: A registered mechanism.
        options: Of the mechanism, over its defaults.
        settings: Of its training, over the suggested ones.
        search: Whether options and settings are searched on validation data instead.
    """

    name: str
    mechanism: str
    options: Mapping[str, int | str] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)
    search: bool = False


@dataclass(frozen=True, config=_CHECKED)
class BaselineRow:
    """A baseline in the table.

    Attributes:
        name: Of the row.
        baseline: Its key in ``BASELINES``; None means that it is the row's name.
        options: Over its defaults.
        seeds: 1 for a baseline in which nothing is random; None means the table's.
    """

    name: str
    baseline: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: int | None = None

    @property
    def key(self) -> str:
        """Its name in ``BASELINES``."""
        return self.baseline or self.name


@dataclass(frozen=True, config=_CHECKED)
class Sweep:
    """What a sensitivity table varies: every probe is trained with every value.

    Attributes:
        parameter: A training setting, such as ``learning_rate``, or an option of the mechanisms.
        values: What it takes.
    """

    parameter: str
    values: tuple[Value, ...]


@dataclass(frozen=True, config=_CHECKED)
class LatencyRow:
    """What a latency table measures.

    Attributes:
        batch_sizes: Requests of one forward pass.
        tokens: Lengths of prompts of random tokens.
        texts: Validation texts of the data set that are run as well, if the table names one.
        repeats: Timed rounds.
    """

    batch_sizes: tuple[int, ...] = (1, 16)
    tokens: tuple[int, ...] = (16, 64, 256, 512, 1024, 2048)
    texts: int = 64
    repeats: int = 5


@dataclass(frozen=True, config=_CHECKED)
class Recipe:
    """A table.

    Attributes:
        title: Of the table.
        kind: ``comparison``; ``transfer``: trained on one data set, tested on another;
            ``few-shot``: a few labels a class, drawn anew for each seed; ``sensitivity``: one
            parameter swept; ``latency``: milliseconds of every registered mechanism
            and of what it replaces, nothing is trained.
        data: Name of the data set.
        test_data: Of the one that a transfer is tested on.
        metric: What rows are compared by, one of ``METRICS``.
        ours: The row that the others are compared with; of several, validation's choice. None in a
            sensitivity table.
        reads: The tokens that probes and baselines read.
        max_tokens: Longer texts are cut.
        seeds: Runs of each row.
        labels_per_class: Training labels of a few-shot draw.
        draws: Few-shot draws.
        sweep: Of a sensitivity table.
        latency: Of a latency table.
        probe: Rows of mechanisms.
        baseline: Rows of baselines.
    """

    title: str
    kind: Kind
    data: str = ""
    test_data: str | None = None
    metric: str = "auprc"
    ours: tuple[str, ...] = ()
    reads: ReadsRow = field(default_factory=ReadsRow)
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
        """The table with these rows alone; nothing is compared where no row of ours is left.

        Raises:
            SidelightError: There is no such row.
        """
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


_ADAPTER = TypeAdapter(Recipe)
# By where in the file an unknown key stands, what may stand there.
_PLACES: dict[str, type[Any]] = {
    "probe": ProbeRow,
    "baseline": BaselineRow,
    "sweep": Sweep,
    "latency": LatencyRow,
    "reads": ReadsRow,
}


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    folder = files("sidelight_lab.tables") / "recipes"
    return tuple(sorted(file.name[:-5] for file in folder.iterdir() if file.name[-5:] == ".toml"))


def recipe_text(name: str) -> str:
    """A recipe's TOML.

    Args:
        name: Of a recipe of the package, or a path that ends in ``.toml``.

    Raises:
        SidelightError: There is no such recipe, or the file cannot be read.
    """
    if name in recipe_names():
        return (files("sidelight_lab.tables") / "recipes" / f"{name}.toml").read_text("utf-8")
    if not name.endswith(".toml"):
        raise SidelightError(
            f"Unknown recipe '{name}'.{did_you_mean(name, recipe_names())} "
            "Or name your own file, which ends in .toml."
        )
    try:
        return Path(name).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise SidelightError(f"Cannot read the recipe {name}: {error}.") from error


def parse_recipe(text: str, *, name: str) -> Recipe:
    """A recipe from its TOML.

    Args:
        text: The file's contents.
        name: How messages call it.

    Raises:
        SidelightError: Not TOML, an unknown key, a value of another type, or keys that do not fit
            the kind of table.
    """
    try:
        # Through JSON, where a list may become a tuple and yet "3" is no number.
        recipe = _ADAPTER.validate_json(json.dumps(tomllib.loads(text)))
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise SidelightError(f"Recipe {name} is not plain TOML: {error}.") from error
    except ValidationError as error:
        raise SidelightError(f"Recipe {name}: {_first_complaint(error)}") from error
    _require_sense(recipe, name)
    return recipe


def _first_complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] != "unexpected_keyword_argument":
        return f"{place}: {first['msg']}."
    outer, _, key = place.rpartition(".")
    known = fields(_PLACES[outer.partition(".")[0]] if outer else Recipe)
    return f"unknown key '{place}'.{did_you_mean(key, [one.name for one in known])}"


def _require_sense(recipe: Recipe, name: str) -> None:
    rows = recipe.names()
    trains = recipe.kind != "latency"
    swept = recipe.sweep is not None
    claims = {
        f"metric is one of {', '.join(METRICS)}": recipe.metric in METRICS,
        "every row has a name of its own": len(set(rows)) == len(rows),
        "there is a [[probe]] or a [[baseline]], but for latency": bool(rows) == trains,
        "'data' names a data set": bool(recipe.data) or not trains,
        f"'ours' lists rows ({', '.join(rows)})": set(recipe.ours) <= set(rows),
        "a transfer, and only a transfer, has 'test_data'": (
            (recipe.kind == "transfer") == (recipe.test_data is not None)
        ),
        "a sensitivity, and only a sensitivity, has a [sweep]": (
            (recipe.kind == "sensitivity") == swept
        ),
        "a [sweep] has values": recipe.sweep is None or bool(recipe.sweep.values),
        "the values of a [sweep] differ": (
            recipe.sweep is None or len(set(recipe.sweep.values)) == len(recipe.sweep.values)
        ),
        "a sensitivity has no [[baseline]]": not (swept and recipe.baseline),
        "a sensitivity has no 'ours', for its rows are probes with a value": (
            not (swept and recipe.ours)
        ),
        "a searched probe has no options and settings of its own": not any(
            row.search and (row.options or row.settings) for row in recipe.probe
        ),
        "probes are searched on the whole training split only": (
            recipe.kind in ("comparison", "transfer") or not any(row.search for row in recipe.probe)
        ),
        "seeds, draws, labels_per_class and max_tokens are 1 or more": (
            min(recipe.seeds, recipe.draws, recipe.labels_per_class, recipe.max_tokens) >= 1
        ),
        "a baseline's seeds are 1 or more": all(
            row.seeds is None or row.seeds >= 1 for row in recipe.baseline
        ),
    }
    for claim, holds in claims.items():
        if not holds:
            raise SidelightError(f"Recipe {name}: it must be that {claim}.")
