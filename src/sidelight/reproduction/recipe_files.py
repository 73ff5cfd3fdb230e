"""Recipes as TOML files, of the package or of a user; every key is checked."""

import json
import tomllib
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sidelight.errors import SidelightError, did_you_mean
from sidelight.metrics import METRICS
from sidelight.reproduction.recipe import (
    BaselineRow,
    LatencyRow,
    ProbeRow,
    ReadsRow,
    Recipe,
    Sweep,
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
    folder = files("sidelight.reproduction") / "recipes"
    return tuple(sorted(file.name[:-5] for file in folder.iterdir() if file.name[-5:] == ".toml"))


def recipe_text(name: str) -> str:
    """A recipe's TOML.

    Args:
        name: Of a recipe of the package, or a path that ends in ``.toml``.

    Raises:
        SidelightError: There is no such recipe, or the file cannot be read.
    """
    if name in recipe_names():
        return (files("sidelight.reproduction") / "recipes" / f"{name}.toml").read_text("utf-8")
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
