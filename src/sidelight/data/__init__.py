"""Labelled texts from files, the Hugging Face hub or memory. Knows texts, not token ids."""

from sidelight.data.examples import Example, Examples, Skipped, located, place_of
from sidelight.data.loading import OnMissingLabel, load_examples
from sidelight.data.readers import InMemory
from sidelight.data.splitting import validation_share

__all__ = [
    "Example",
    "Examples",
    "InMemory",
    "OnMissingLabel",
    "Skipped",
    "load_examples",
    "located",
    "place_of",
    "validation_share",
]
