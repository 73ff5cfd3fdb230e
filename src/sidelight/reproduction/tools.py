"""What a table takes from outside: the backbone, data sets by name, and a search."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sidelight.backbones import TransformersBackbone
from sidelight.mechanisms import mechanism_spec
from sidelight.reproduction.data import LabelledData
from sidelight.reproduction.rows import Found
from sidelight.study import Study
from sidelight.training import suggested_settings

Load = Callable[[str], LabelledData]
Search = Callable[[Study, str, Path], Found]


@dataclass(frozen=True)
class Tools:
    """What a table takes from outside.

    Attributes:
        backbone: The frozen LLM.
        load: Gives a data set by name.
        search: Gives the best configuration of a mechanism on a study's validation texts; the path
            is a file that it keeps its trials in.
        cache_root: Folder of activations.
    """

    backbone: TransformersBackbone
    load: Load
    search: Search
    cache_root: Path


def suggested(mechanism: str) -> Found:
    """The configuration that needs no search."""
    return Found(mechanism_spec(mechanism), suggested_settings(mechanism))


def searched(*, trials: int) -> Search:
    """The search of the package.

    Args:
        trials: Configurations of each mechanism.
    """
    from sidelight.search import search_settings

    def search(study: Study, mechanism: str, storage: Path) -> Found:
        best = search_settings(study, mechanism, trials=trials, seed=0, storage=storage)
        return Found(best.spec, best.settings)

    return search
