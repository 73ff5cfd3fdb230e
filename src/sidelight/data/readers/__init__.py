"""Rows from files, the Hugging Face hub and memory: one file per kind of source."""

from sidelight.data.readers.files import is_readable, read_file
from sidelight.data.readers.hub import is_hub_name, read_hub
from sidelight.data.readers.memory import InMemory, read_memory

__all__ = ["InMemory", "is_hub_name", "is_readable", "read_file", "read_hub", "read_memory"]
