"""Chooses a mechanism's options and training settings on validation data, from the cache alone."""

from sidelight.search.results import describe, train_arguments, write_search
from sidelight.search.searching import search_settings
from sidelight.search.space import GENERIC, SPACES, Range, Space, possible_specs, space_of
from sidelight.search.trials import Best, Trial, best_of

__all__ = [
    "GENERIC",
    "SPACES",
    "Best",
    "Range",
    "Space",
    "Trial",
    "best_of",
    "describe",
    "possible_specs",
    "search_settings",
    "space_of",
    "train_arguments",
    "write_search",
]
