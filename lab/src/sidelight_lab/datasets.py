"""Labelled data sets: published ones by name in their official splits, or files of your own.

A published set is read from a local folder of its own, with one file per split in any format of
`load_examples` (.jsonl, .csv, .parquet, ...), else from the Hugging Face hub. A local file may have
the hub's columns, as one saved from there does. This module knows texts, not token ids.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Int

from sidelight.data.examples import LabelledExamples, validation_share
from sidelight.data.loading import OnMissingLabel, load_examples
from sidelight.data.readers import is_readable, read_file
from sidelight.errors import SidelightError, did_you_mean
from sidelight.types import Task

_VARIABLE = "SIDELIGHT_DATA"
_FORMATS = ".jsonl, .jsonl.gz, .csv or .parquet"
_CHECKOUT = Path(__file__).parents[3]


@dataclass(frozen=True, eq=False)
class DataSet:
    """Examples to train on, to choose by and to measure on, all with the task of the first.

    Attributes:
        title: Its name in tables.
        validation: The official validation split, or training rows that were held out.
        subsets: Row positions of `test` by the name of the subset; may be empty.
        notes: What is missing, deviates from the official set, or must be known of the licence; one
            sentence each.
        training_notes: Those on training and validation, and on the set as a whole.
        test_notes: Those on the test, and on the set as a whole.
    """

    title: str
    training: LabelledExamples
    validation: LabelledExamples
    test: LabelledExamples
    subsets: Mapping[str, Int[np.ndarray, " row"]]
    notes: tuple[str, ...]
    training_notes: tuple[str, ...]
    test_notes: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One published split: its name (of the file, or on the hub), and its official row count."""

    split: str
    rows: int


@dataclass(frozen=True)
class Layout:
    """The columns and splits of a data set, in local files or on the hub.

    Attributes:
        source: Name on the hub, with the configuration after a colon; `{split}` stands for the
            split. Empty for local files.
        notes: What must be known of this layout, one sentence each.
    """

    text: str
    label: str
    training: Part
    test: Part
    validation: Part | None = None
    source: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """A data set as its authors published it.

    Attributes:
        folder: Name of its local folder.
        notes: What must be known of either layout, one sentence each.
        positive: The positive class; None where it can be inferred.
        on_missing_label: Whether unlabelled rows are an error, or are left out and counted.
        subsets: Parts of the test that are reported on their own: the rows where a column of truth
            values has this value.
        remarks: Notes that depend on the training split as read.
    """

    title: str
    folder: str
    local: Layout
    hub: Layout
    notes: tuple[str, ...]
    positive: str | None = None
    on_missing_label: OnMissingLabel = "error"
    subsets: Mapping[str, tuple[str, bool]] = field(default_factory=dict[str, tuple[str, bool]])
    remarks: Callable[[LabelledExamples], tuple[str, ...]] = lambda _: ()


# Film reviews of many sentences, positive or negative (Maas et al. 2011, the labelled ones).
_IMDB = Layout("text", "label", training=Part("train", 25_000), test=Part("test", 25_000))
# Six emotions of English tweets (Saravia et al. 2018). Rows: the hub's configuration `split`.
_EMOTION = Layout(
    "text",
    "label_name",
    training=Part("train", 16_000),
    test=Part("test", 2_000),
    validation=Part("validation", 2_000),
)
# Toxic prompts among those that users sent to a chat model (Lin et al. 2023). Rows and share of
# toxic ones: the hub's data set card, version 0124.
_TOXICCHAT = Layout("text", "toxicity", training=Part("train", 5_082), test=Part("test", 5_083))
_TOXIC_PERCENT = 7.33
# Harmful prompts, plain and adversarial, mostly synthetic (Han et al. 2024). Rows: the hub's card.
_WILDGUARDMIX = Layout(
    "prompt", "prompt_harm_label", training=Part("train", 86_759), test=Part("test", 1_725)
)


def _toxicchat_remarks(training: LabelledExamples) -> tuple[str, ...]:
    """Says so if the machine-screened rows of the training split are missing."""
    column = "human_annotation"
    if len(training) >= _TOXICCHAT.training.rows or not any(column in r for r in training.rows):
        return ()
    if set(training.truth_values(column)) != {True}:
        return ()
    percent = 100 * float(training.labels.mean())
    return (
        "All training rows are human-annotated; the machine-screened, mostly harmless ones are "
        f"missing, so {percent:.1f} % are toxic, against {_TOXIC_PERCENT} % of the official rows.",
    )


PUBLISHED: Mapping[str, Published] = {
    "emotion": Published(
        "Emotion",
        folder="emotion",
        local=_EMOTION,
        hub=replace(_EMOTION, label="label", source="dair-ai/emotion:split"),
        notes=("Licence: for education and research only.",),
    ),
    "imdb": Published(
        "IMDB",
        folder="imdb",
        local=_IMDB,
        hub=replace(_IMDB, source="stanfordnlp/imdb"),
        notes=("Licence: none is stated by the authors.",),
    ),
    # Sentences of film reviews, positive or negative.
    "sst2": Published(
        "SST-2",
        folder="sst2",
        # Rows: Socher et al. 2013, without the neutral sentences.
        local=Layout(
            "text",
            "label",
            training=Part("train_sentences", 6_920),
            test=Part("test", 1_821),
            validation=Part("validation", 872),
            notes=(
                "Training texts are the whole sentences, not the 67,349 phrases that GLUE made of "
                "them; the test labels are those of the original treebank.",
            ),
        ),
        # Rows: Wang et al. 2019 (GLUE).
        hub=Layout(
            "sentence",
            "label",
            training=Part("train", 67_349),
            test=Part("validation", 872),
            source="stanfordnlp/sst2",
            notes=(
                "GLUE hides the labels of its 1,821 test rows: its validation split is the test "
                "here, so scores cannot be compared with those on the original test sentences.",
                "Training texts are phrases, and phrases of one sentence may be in both training "
                "and validation.",
            ),
        ),
        notes=("Licence: none is stated by the authors.",),
        positive="1",
    ),
    "toxicchat": Published(
        "ToxicChat",
        folder="toxicchat0124",
        local=_TOXICCHAT,
        hub=replace(_TOXICCHAT, text="user_input", source="lmsys/toxic-chat:toxicchat0124"),
        notes=("Licence: CC BY-NC 4.0, no commercial use.",),
        positive="1",
        subsets={"human": ("human_annotation", True)},
        remarks=_toxicchat_remarks,
    ),
    "wildguardmix": Published(
        "WildGuardMix (prompt harm)",
        folder="wildguardmix",
        local=_WILDGUARDMIX,
        hub=replace(_WILDGUARDMIX, source="allenai/wildguardmix:wildguard{split}"),
        notes=(
            "Licence: ODC-BY; the hub first asks you to accept AI2's guidelines for responsible "
            "use.",
            "Training labels are GPT-4's, test labels are human.",
        ),
        positive="harmful",
        on_missing_label="skip",
        subsets={"adversarial": ("adversarial", True), "vanilla": ("adversarial", False)},
    ),
}


def default_root() -> Path:
    """The folder that `SIDELIGHT_DATA` names, else `../shared/data` beside the checkout.

    The latter need not exist.

    Raises:
        SidelightError: The variable names something that is not a folder.
    """
    named = os.environ.get(_VARIABLE)
    if not named:
        return _CHECKOUT.parent / "shared" / "data"
    root = Path(named).expanduser()
    if not root.is_dir():
        raise SidelightError(
            f"{_VARIABLE} is '{named}', but there is no such folder. Set it to the folder that has "
            "one folder per data set, or unset it."
        )
    return root


def load_data_set(name: str, *, root: Path | None = None) -> DataSet:
    """A published data set in its official splits.

    Args:
        name: A key of `PUBLISHED`.
        root: Folder with one folder per data set, and then nothing else is tried. None means
            `SIDELIGHT_DATA`, else `../shared/data` beside the checkout; a set that has no folder
            there comes from the Hugging Face hub, through the extra `datasets`.

    Raises:
        SidelightError: The name is unknown, the data is nowhere, or a row is malformed; the message
            names the place and the remedy.
    """
    if name not in PUBLISHED:
        raise SidelightError(
            f"Unknown data set '{name}'.{did_you_mean(name, PUBLISHED)} "
            "For other data, give files of training and test texts."
        )
    entry = PUBLISHED[name]
    folder = (default_root() if root is None else root) / entry.folder
    if folder.is_dir():
        return _load(name, entry.local, folder)
    parts = (entry.local.training, entry.local.validation, entry.local.test)
    splits = ", ".join(part.split for part in parts if part)
    absence = f"There is no folder '{folder}' with {splits}, each as {_FORMATS}."
    if root is not None:
        raise SidelightError(f"{absence} Put the files there.")
    put = f"Put the files there, or set {_VARIABLE} to the folder that holds '{entry.folder}'"
    if find_spec("datasets") is None:
        raise SidelightError(
            f"{absence} {put}, or run `pip install 'sidelight[datasets]'` to read them from the "
            "Hugging Face hub."
        )
    try:
        return _load(name, entry.hub, None)
    except SidelightError as error:
        raise SidelightError(
            f"{absence} Reading it from the hub failed too: {error} {put}."
        ) from error


def _load(name: str, layout: Layout, folder: Path | None) -> DataSet:
    """The data set from its local folder, or from the hub where the folder is None."""
    entry = PUBLISHED[name]

    def read(part: Part, task: Task | None) -> LabelledExamples:
        text, label = layout.text, layout.label
        if folder is None:
            source, split = layout.source.format(split=part.split), part.split
        else:
            source, split = _split_file(folder, part.split), None
            # Reads the file twice: cheap beside a forward pass over its texts.
            known = {column for row in read_file(source) for column in row.cells}
            if not {text, label} <= known and {entry.hub.text, entry.hub.label} <= known:
                text, label = entry.hub.text, entry.hub.label
        return load_examples(
            source,
            text=text,
            label=label,
            split=split,
            positive=entry.positive if task is None else None,
            task=task,
            on_missing_label=entry.on_missing_label,
        )

    training = read(layout.training, None)
    validation = read(layout.validation, training.task) if layout.validation else None
    test = read(layout.test, training.task)
    return _assemble(
        training,
        validation,
        test,
        title=entry.title,
        subsets=entry.subsets,
        layout=layout,
        on_training=entry.remarks(training),
        on_both=(*layout.notes, *entry.notes),
    )


def _split_file(folder: Path, split: str) -> Path:
    """The one readable file of a split, in any format."""
    files = sorted(path for path in folder.iterdir() if is_readable(path))
    matches = [path for path in files if path.name.partition(".")[0] == split]
    if len(matches) == 1:
        return matches[0]
    names = ", ".join(path.name for path in matches or files) or "no readable file"
    if matches:
        raise SidelightError(f"'{folder}' has several files for '{split}': {names}. Keep one.")
    raise SidelightError(
        f"'{folder}' lacks the split '{split}': it has {names}. Add it as {split} with the ending "
        f"{_FORMATS}."
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
    """A data set from files that `load_examples` can read; all splits share their columns.

    Args:
        training: File of the training rows, whose labels make the task.
        test: File of the test rows.
        validation: File of the validation rows; None holds some training rows out.
        text: Column of the text.
        label: Column of the label, or names of several columns separated by commas.
        positive: Positive class of a binary task; None infers it as `load_examples` does.

    Raises:
        SidelightError: A file is absent or malformed, or has a label that training lacks.
    """
    path = Path(training).expanduser()
    learned = load_examples(path, text=text, label=label, positive=positive)

    def read(file: str | Path) -> LabelledExamples:
        return load_examples(Path(file).expanduser(), text=text, label=label, task=learned.task)

    own, other = (Path(file).name.partition(".")[0] for file in (training, test))
    return _assemble(
        learned,
        None if validation is None else read(validation),
        read(test),
        title=f"{own}, tested on {other}",
        on_training=learned.warnings,
    )


def _assemble(
    training: LabelledExamples,
    validation: LabelledExamples | None,
    test: LabelledExamples,
    *,
    title: str,
    subsets: Mapping[str, tuple[str, bool]] | None = None,
    layout: Layout | None = None,
    on_training: tuple[str, ...] = (),
    on_both: tuple[str, ...] = (),
) -> DataSet:
    """The splits as a data set, with notes on them beside the given ones."""
    places: dict[str, Int[np.ndarray, " row"]] = {}
    absent: list[str] = []
    for subset, (column, value) in (subsets or {}).items():
        is_known = any(column in row for row in test.rows)
        values = test.truth_values(column) if is_known else ()
        rows = np.flatnonzero([own is value for own in values])
        if len(rows):
            places[subset] = rows
        else:
            absent.append(
                f"No test row is known to be in the subset '{subset}' (column '{column}')."
            )
    shared = overlap_notes(training, test)
    notes = [*_part_notes("training", training, layout and layout.training), *on_training]
    if validation is None:
        share = validation_share(len(training))
        training, validation = training.split(share, seed=0)
        notes.append(
            f"There is no validation split: {100 * share:.0f} % of the training rows are held out."
        )
    else:
        notes += _part_notes("validation", validation, layout and layout.validation)
    training_notes = (*notes, *on_both)
    test_notes = (*_part_notes("test", test, layout and layout.test), *absent, *on_both)
    return DataSet(
        title=title,
        training=training,
        validation=validation,
        test=test,
        subsets=places,
        notes=tuple(dict.fromkeys((*training_notes, *test_notes, *shared))),
        training_notes=training_notes,
        test_notes=test_notes,
    )


def _part_notes(name: str, examples: LabelledExamples, part: Part | None) -> list[str]:
    """How many rows a split lacks of its official number, and how many were left out."""
    skipped = examples.skipped
    counts = {"without a label": skipped.missing_label, "without a text": skipped.empty_text}
    rows = len(examples) + sum(counts.values())
    notes: list[str] = []
    if part and rows != part.rows:
        notes.append(f"The {name} split has {rows:,} rows; the official one has {part.rows:,}.")
    for reason, count in counts.items():
        if count:
            notes.append(f"{count:,} {name} rows {reason} are left out.")
    return notes


def overlap_notes(training: LabelledExamples, test: LabelledExamples) -> tuple[str, ...]:
    """A note if test texts were trained on; case and spacing do not count."""
    learned, tested = (
        [" ".join(item.text.split()).casefold() for item in examples.items]
        for examples in (training, test)
    )
    seen = set(learned)
    count = sum(text in seen for text in tested)
    note = f"{count:,} of {len(test):,} test texts are among the training texts too."
    return (note,) if count else ()
