"""Labelled data sets: published ones by name, in their official splits, or your own files.

A published set is read from its local folder, with one file per split in any format of
`load_examples` (.jsonl, .csv, .parquet, ...), or else from the Hugging Face hub. A local file may
have the hub's columns, for example if it was saved from there. This module handles texts, not token
ids.
"""

import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int

from sidelight.data.examples import LabelledExamples, validation_share
from sidelight.data.labels import is_missing, truth_value
from sidelight.data.loading import OnMissingLabel, load_examples
from sidelight.data.readers import is_readable, read_file
from sidelight.errors import SidelightError, SidelightWarning, did_you_mean
from sidelight.types import Task

_VARIABLE = "SIDELIGHT_DATA"
_FORMATS = ".jsonl, .jsonl.gz, .csv or .parquet"
_CHECKOUT = Path(__file__).parents[4]


@dataclass(frozen=True, eq=False)
class DataSet:
    """Training, validation and test examples, all with the task of the training examples.

    Attributes:
        title: Name in tables.
        validation: The official validation split, or held-out training rows.
        subsets: Row positions in `test` by name of the subset; may be empty.
        notes: Missing data, deviations from the official set, and licence terms, one sentence
            each.
    """

    title: str
    training: LabelledExamples
    validation: LabelledExamples
    test: LabelledExamples
    subsets: Mapping[str, Int[np.ndarray, " row"]]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """A data set as its authors published it.

    Attributes:
        source: Name on the hub, with the configuration after a colon; `{split}` is replaced by the
            split.
        rows: Official number of rows by split: training, test and, if there is one, validation.
        notes: Facts to know about the set, one sentence each.
        folder: Name of the local folder.
        text: Column of the texts in local files, then on the hub.
        label: Column of the labels in local files, then on the hub.
        training_file: Name of the local file with the training split, without suffixes.
        positive: Positive class; None if it can be inferred.
        on_missing_label: Whether unlabelled rows are an error, or are left out and counted.
        subsets: Subsets of the test split that are reported separately, by name: the rows in which
            a Boolean column has this value.
    """

    title: str
    source: str
    rows: Mapping[str, int]
    notes: tuple[str, ...]
    folder: str
    text: tuple[str, str] = ("text", "text")
    label: tuple[str, str] = ("label", "label")
    training_file: str = "train"
    positive: str | None = None
    on_missing_label: OnMissingLabel = "error"
    subsets: Mapping[str, tuple[str, bool]] = field(default_factory=dict[str, tuple[str, bool]])


PUBLISHED: Mapping[str, Published] = {
    # English tweets with six emotions (Saravia et al. 2018). Rows: the hub's configuration `split`.
    "emotion": Published(
        "Emotion",
        "dair-ai/emotion:split",
        rows={"train": 16_000, "validation": 2_000, "test": 2_000},
        notes=("Licence: for education and research only.",),
        folder="emotion",
        label=("label_name", "label"),
    ),
    # Film reviews of many sentences, positive or negative (Maas et al. 2011, labelled reviews).
    "imdb": Published(
        "IMDB",
        "stanfordnlp/imdb",
        rows={"train": 25_000, "test": 25_000},
        notes=("Licence: none is stated by the authors.",),
        folder="imdb",
    ),
    # Sentences from film reviews, positive or negative (Socher et al. 2013, without neutral ones).
    "sst2": Published(
        "SST-2",
        "SetFit/sst2",
        rows={"train": 6_920, "validation": 872, "test": 1_821},
        notes=(
            "Training texts are the whole sentences, not the 67,349 phrases that GLUE made of "
            "them; the test labels are those of the original treebank.",
            "Licence: none is stated by the authors.",
        ),
        folder="sst2",
        training_file="train_sentences",
        positive="1",
    ),
    # User prompts to a chat model, toxic or not (Lin et al. 2023). Rows: the hub's data set card,
    # version 0124.
    "toxicchat": Published(
        "ToxicChat",
        "lmsys/toxic-chat:toxicchat0124",
        rows={"train": 5_082, "test": 5_083},
        notes=("Licence: CC BY-NC 4.0, no commercial use.",),
        folder="toxicchat0124",
        text=("text", "user_input"),
        label=("toxicity", "toxicity"),
        positive="1",
        subsets={"human": ("human_annotation", True)},
    ),
    # Harmful and harmless prompts, plain and adversarial, mostly synthetic (Han et al. 2024). Rows:
    # the hub's.
    "wildguardmix": Published(
        "WildGuardMix (prompt harm)",
        "allenai/wildguardmix:wildguard{split}",
        rows={"train": 86_759, "test": 1_725},
        notes=(
            "Licence: ODC-BY; the hub first asks you to accept AI2's guidelines for responsible "
            "use.",
            "Training labels are GPT-4's, test labels are human.",
        ),
        folder="wildguardmix",
        text=("prompt", "prompt"),
        label=("prompt_harm_label", "prompt_harm_label"),
        positive="harmful",
        on_missing_label="skip",
        subsets={"adversarial": ("adversarial", True), "vanilla": ("adversarial", False)},
    ),
}


def default_root() -> Path:
    """Folder named by `SIDELIGHT_DATA`, or else `../shared/data` relative to the checkout.

    The latter may not exist.

    Raises:
        SidelightError: The variable does not name an existing folder.
    """
    named = os.environ.get(_VARIABLE)
    if not named:
        return _CHECKOUT.parent / "shared" / "data"
    root = Path(named).expanduser()
    if not root.is_dir():
        raise SidelightError(
            f"{_VARIABLE} is '{named}', but there is no such folder. Set it to a folder that "
            "contains one folder per data set, or unset it."
        )
    return root


def load_data_set(name: str, *, root: Path | None = None) -> DataSet:
    """Load a published data set in its official splits.

    Args:
        name: Key of `PUBLISHED`.
        root: Folder with one folder per data set; no other source is tried. None means
            `SIDELIGHT_DATA`, or else `../shared/data` relative to the checkout; a set without a
            folder there is read from the Hugging Face hub, which needs the extra `datasets`.

    Raises:
        SidelightError: The name is unknown, the data cannot be found, or a row is malformed; the
            message names the place and the remedy.
    """
    if name not in PUBLISHED:
        raise SidelightError(
            f"Unknown data set '{name}'.{did_you_mean(name, PUBLISHED)} "
            "For other data, give files of training and test texts."
        )
    entry = PUBLISHED[name]
    folder = (default_root() if root is None else root) / entry.folder
    if folder.is_dir():
        return _load(entry, folder)
    splits = ", ".join(entry.training_file if split == "train" else split for split in entry.rows)
    absence = f"There is no folder '{folder}' with {splits}, each as {_FORMATS}."
    if root is not None:
        raise SidelightError(f"{absence} Put the files there.")
    try:
        return _load(entry, None)
    except SidelightError as error:
        raise SidelightError(
            f"{absence} Reading the data set from the hub failed too: {error} Put the files "
            f"there, or set {_VARIABLE} to the folder that contains '{entry.folder}'."
        ) from error


def _load(entry: Published, folder: Path | None) -> DataSet:
    """Load the data set from its local folder, or from the hub if the folder is None."""
    notes: list[str] = []

    def read(split: str, task: Task | None = None) -> LabelledExamples:
        local, hub = zip(entry.text, entry.label, strict=True)
        source, (text, label) = entry.source.format(split=split), hub
        if folder is not None:
            source = _split_file(folder, entry.training_file if split == "train" else split)
            # Reads the file twice, which is cheap compared with a forward pass over its texts.
            columns = {column for row in read_file(source) for column in row.cells}
            text, label = hub if columns.issuperset(hub) > columns.issuperset(local) else local
        with _noted(notes, split):
            return load_examples(
                source,
                text=text,
                label=label,
                split=split if folder is None else None,
                positive=entry.positive if task is None else None,
                task=task,
                on_missing_label=entry.on_missing_label,
            )

    training = read("train")
    validation = read("validation", training.task) if "validation" in entry.rows else None
    test = read("test", training.task)
    return _assemble(training, validation, test, entry.title, notes, entry)


def _split_file(folder: Path, split: str) -> Path:
    """The only readable file of a split, in any format."""
    files = sorted(path for path in folder.iterdir() if is_readable(path))
    matches = [path for path in files if path.name.partition(".")[0] == split]
    if len(matches) == 1:
        return matches[0]
    names = ", ".join(path.name for path in matches or files) or "no readable file"
    if matches:
        raise SidelightError(
            f"'{folder}' has several files for '{split}': {names}. Keep only one of them."
        )
    raise SidelightError(
        f"'{folder}' lacks the split '{split}'; it contains {names}. Add a file named {split} "
        f"that ends in {_FORMATS}."
    )


def from_files(
    training: str | Path,
    test: str | Path,
    validation: str | Path | None = None,
    *,
    text: str = "text",
    label: str = "label",
    positive: str | None = None,
) -> DataSet:
    """Load a data set from files that `load_examples` can read, all with the same columns.

    Args:
        training: File of the training rows, whose labels define the task.
        test: File of the test rows.
        validation: File of the validation rows; None holds out some training rows.
        text: Column of the text.
        label: Column of the label, or names of several columns separated by commas.
        positive: Positive class of a binary task; None infers it as `load_examples` does.

    Raises:
        SidelightError: A file is missing or malformed, or has a label that the training rows lack.
    """
    path = Path(training).expanduser()
    notes: list[str] = []
    with _noted(notes, "train"):
        learned = load_examples(path, text=text, label=label, positive=positive)

    def read(file: str | Path, split: str) -> LabelledExamples:
        with _noted(notes, split):
            return load_examples(Path(file).expanduser(), text=text, label=label, task=learned.task)

    training_name, test_name = (Path(file).name.partition(".")[0] for file in (training, test))
    held_out = None if validation is None else read(validation, "validation")
    title = f"{training_name}, tested on {test_name}"
    return _assemble(learned, held_out, read(test, "test"), title, notes)


@contextmanager
def _noted(notes: list[str], split: str) -> Generator[None]:
    """Collect warnings about a split as notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SidelightWarning)
        yield
    for each in caught:
        if issubclass(each.category, SidelightWarning):
            notes.append(f"The {split} split: {each.message}")
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _assemble(
    training: LabelledExamples,
    validation: LabelledExamples | None,
    test: LabelledExamples,
    title: str,
    notes: list[str],
    entry: Published | None = None,
) -> DataSet:
    """Combine the splits into a data set, and add notes on them to the notes from loading."""
    splits = {"train": training, "validation": validation, "test": test}
    for split, examples in splits.items():
        if examples is None:
            continue
        rows = len(examples) + examples.skipped.missing_label + examples.skipped.empty_text
        official = entry.rows[split] if entry else rows
        if rows != official:
            notes.append(f"The {split} split has {rows:,} rows; the official one has {official:,}.")
    shared = overlap_notes(training, test)
    if validation is None:
        share = validation_share(len(training))
        training, validation = training.split(share, seed=0)
        notes.append(
            f"There is no validation split: {100 * share:.0f} % of the training rows are held out."
        )
    subsets: dict[str, Int[np.ndarray, " row"]] = {}
    for subset, (column, value) in (entry.subsets if entry else {}).items():
        cells = [row.get(column) for row in test.rows]
        positions = [
            row
            for row, cell in enumerate(cells)
            if not is_missing(cell) and truth_value(cell, test.items[row].place, column) is value
        ]
        if positions:
            subsets[subset] = np.array(positions)
        else:
            notes.append(
                f"No test row is known to be in the subset '{subset}' (column '{column}')."
            )
    notes += (*(entry.notes if entry else ()), *shared)
    return DataSet(title, training, validation, test, subsets, tuple(notes))


def overlap_notes(training: LabelledExamples, test: LabelledExamples) -> tuple[str, ...]:
    """A note if test texts also occur in the training data, ignoring case and spacing."""
    seen = {item.text_key for item in training.items}
    count = sum(item.text_key in seen for item in test.items)
    note = f"{count:,} of {len(test):,} test texts also occur in the training data."
    return (note,) if count else ()
