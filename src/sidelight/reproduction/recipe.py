"""What a table is made of. Knows names, not what they build."""

from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from sidelight.errors import SidelightError, did_you_mean

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
