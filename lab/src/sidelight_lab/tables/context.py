"""A recipe with everything to follow it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import LabelledExamples
from sidelight.storage import write_json, write_text
from sidelight.training.dataset import ProbeDataset, Split, make_split, require_same_task
from sidelight.training.settings import FitOptions
from sidelight_lab.datasets import DataSet
from sidelight_lab.environment import environment
from sidelight_lab.tables.recipes import (
    BaselineConfig,
    Recipe,
    build_rows,
)


@dataclass(frozen=True)
class RecipeContext:
    """A recipe with everything to follow it.

    Attributes:
        text: The TOML of the recipe.
        directory: Folder of the table.
        load: Loads a data set by name.
        limit: The most rows to use of each split; None uses all.
    """

    recipe: Recipe
    text: str
    directory: Path
    backbone: TransformersBackbone
    load: Callable[[str], DataSet]
    cache_root: Path
    limit: int | None = None

    def check(self) -> None:
        """Raises for a misspelt name or a missing package, before hours of extraction."""
        for row in build_rows(self.recipe):
            if isinstance(row, BaselineConfig):
                row.baseline.require()

    def sample(self, examples: LabelledExamples) -> LabelledExamples:
        """The rows of a split that are used: all, or a sample of ``limit`` rows."""
        if self.limit is None:
            return examples
        return examples.select(examples.draw(self.limit, seed=0))

    def notes(self, notes: Sequence[str]) -> tuple[str, ...]:
        """The notes on the data, and one on the limit if there is any."""
        if self.limit is None:
            return tuple(notes)
        return (
            *notes,
            f"At most {self.limit} rows of each split were used, drawn at random, class by class.",
        )

    def dataset(self, data: DataSet) -> ProbeDataset:
        """Training and validation texts with their hidden states."""
        training, validation = self.sample(data.training), self.sample(data.validation)
        require_same_task(training, validation)
        return ProbeDataset(
            self.backbone,
            self.extract(training, "Training texts"),
            self.extract(validation, "Validation texts"),
        )

    def extract(self, examples: LabelledExamples, title: str) -> Split:
        return make_split(
            self.backbone,
            examples,
            FitOptions(
                reads=self.recipe.reads,
                max_tokens=self.recipe.max_tokens,
                cache_root=self.cache_root,
                keep_cache=True,
            ),
            title=title,
        )

    def write_origin(self, folder: Path, data: DataSet | None = None) -> None:
        """Records the recipe, the environment and the data, before the work begins."""
        notes: tuple[str, ...] = ()
        if data is not None:
            notes = data.notes if self.recipe.test_data is None else data.training_notes
        write_text(folder / "recipe.toml", self.text)
        write_json(
            folder / "environment.json",
            {
                **environment(),
                "backbone": asdict(self.backbone.fingerprint),
                "recipe": asdict(self.recipe),
                "limit": self.limit,
            },
        )
        write_text(folder / "data.md", "".join(f"- {note}\n" for note in self.notes(notes)))
