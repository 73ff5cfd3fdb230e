"""The published data sets by name."""

from sidelight.datasets.emotion import EMOTION
from sidelight.datasets.imdb import IMDB
from sidelight.datasets.publication import Published
from sidelight.datasets.sst2 import SST2
from sidelight.datasets.toxicchat import TOXICCHAT
from sidelight.datasets.wildguardmix import WILDGUARDMIX
from sidelight.errors import SidelightError, did_you_mean

_PUBLISHED = {each.name: each for each in (EMOTION, IMDB, SST2, TOXICCHAT, WILDGUARDMIX)}


def data_set_names() -> tuple[str, ...]:
    """All names that `load_data_set` knows, in alphabetical order."""
    return tuple(sorted(_PUBLISHED))


def published(name: str) -> Published:
    """The description of a data set.

    Raises:
        SidelightError: The name is unknown; the message lists the known ones.
    """
    if name not in _PUBLISHED:
        raise SidelightError(
            f"Unknown data set '{name}'.{did_you_mean(name, _PUBLISHED)} "
            "For other data, give files of training and test texts."
        )
    return _PUBLISHED[name]
