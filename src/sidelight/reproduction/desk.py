"""What a recipe asks for, fetched: data sets, hidden states, rows."""

from dataclasses import asdict, dataclass
from pathlib import Path

from sidelight.data import Examples
from sidelight.fitting.screening import require_same_task
from sidelight.prompts import Reads
from sidelight.reproduction.data import LabelledData, Sampled
from sidelight.reproduction.environment import environment
from sidelight.reproduction.recipe import Recipe
from sidelight.reproduction.rows import Found, Rows, build_rows
from sidelight.reproduction.tools import Tools, suggested
from sidelight.reproduction.writing import write_origin
from sidelight.study import Split, Study, make_split


@dataclass(frozen=True)
class Desk:
    """A recipe with the tools to follow it.

    Attributes:
        recipe: The table.
        directory: Of the table.
        tools: Backbone, data sets, search.
        limit: Uses so many rows of each part only; None uses all.
    """

    recipe: Recipe
    directory: Path
    tools: Tools
    limit: int | None

    def check(self) -> None:
        """Refuses a misspelt name or a missing package, before hours of extraction."""
        for row in build_rows(self.recipe, suggested).baselines:
            row.baseline.require()

    def load(self, name: str) -> LabelledData:
        """A data set, or a sample of it."""
        data = self.tools.load(name)
        return data if self.limit is None else Sampled(data, self.limit)

    def write_origin(self, text: str, data: LabelledData, folder: Path | None = None) -> None:
        """Says what the table is made from, and with what: in its own folder, or in another."""
        made_with = environment(self.tools.backbone.fingerprint)
        as_run = {"recipe": asdict(self.recipe), "limit": self.limit}
        write_origin(
            folder or self.directory,
            recipe=text,
            environment={**made_with, **as_run},
            notes=data.notes if self.recipe.test_data is None else data.training_notes,
        )

    def study(self, data: LabelledData) -> Study:
        """Training and validation texts with their hidden states.

        Raises:
            SidelightError: Validation texts of another task, or that cannot choose between rows.
        """
        require_same_task(data.training, data.validation)
        return Study(
            self.tools.backbone,
            self.extract(data.training, "Training texts"),
            self.extract(data.validation, "Validation texts"),
        )

    def extract(self, examples: Examples, title: str) -> Split:
        """Texts with their hidden states."""
        reads = self.recipe.reads
        return make_split(
            self.tools.backbone,
            examples,
            reads=Reads(reads.side, reads.template),
            max_tokens=self.recipe.max_tokens,
            cache_root=self.tools.cache_root,
            title=title,
        )

    def rows(self, study: Study, *, searches: str = "search") -> Rows:
        """The rows, searched on the study where the recipe says so.

        Args:
            study: What to search on.
            searches: Where in the folder the trials are kept; one place for each study.
        """
        folder = self.directory / searches
        return build_rows(self.recipe, lambda mechanism: self._search(study, mechanism, folder))

    def _search(self, study: Study, mechanism: str, folder: Path) -> Found:
        folder.mkdir(parents=True, exist_ok=True)
        return self.tools.search(study, mechanism, folder / f"{mechanism}.journal")
