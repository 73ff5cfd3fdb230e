"""Tables of the paper and beyond, each from one recipe: every row on the same splits and seeds."""

from sidelight.reproduction.cross_validation import RowScores, cross_validate
from sidelight.reproduction.environment import environment
from sidelight.reproduction.recipe import Recipe
from sidelight.reproduction.recipe_files import parse_recipe, recipe_names, recipe_text
from sidelight.reproduction.runner import reproduce
from sidelight.reproduction.tables import grid, terminal
from sidelight.reproduction.tools import Tools, searched
from sidelight.reproduction.writing import Made, describe, write_origin

__all__ = [
    "Made",
    "Recipe",
    "RowScores",
    "Tools",
    "cross_validate",
    "describe",
    "environment",
    "grid",
    "parse_recipe",
    "recipe_names",
    "recipe_text",
    "reproduce",
    "searched",
    "terminal",
    "write_origin",
]
