"""What a data set is once loaded. Reads nothing.

How a published data set is described: what it is called, where it lies, how many rows it has.

Which test rows belong to a named subset, by a column of truth values.

Emotion: one of six emotions of an English tweet (Saravia et al. 2018).

IMDB: positive or negative film reviews of many sentences (Maas et al. 2011).

SST-2: positive or negative sentences of film reviews (Socher et al. 2013).

ToxicChat: toxic prompts among those that users sent to a chat model (Lin et al. 2023).

WildGuardMix: harmful prompts, plain and adversarial, mostly synthetic (Han et al. 2024).

The published data sets by name.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from sidelight.data.examples import LabelledExamples
from sidelight.data.loading import OnMissingLabel
from sidelight.errors import SidelightError, did_you_mean


@dataclass(frozen=True, eq=False)
class DataSet:
    """Examples to train on, to choose by and to measure on, all with the task of the first.

    Attributes:
        name: As recipes write it.
        title: As tables show it.
        training: What probes learn from.
        validation: The official validation split, or training rows that were held out.
        test: Touched once, at the end.
        subsets: Row positions of `test`, by the subset's name; may be empty.
        notes: What is partial, deviates, or must be known of the licence; one sentence each.
        training_notes: Those of training and validation, and of the set as a whole.
        test_notes: Those of the test, and of the set as a whole.
    """

    name: str
    title: str
    training: LabelledExamples
    validation: LabelledExamples
    test: LabelledExamples
    subsets: Mapping[str, Int[np.ndarray, " row"]]
    notes: tuple[str, ...]
    training_notes: tuple[str, ...]
    test_notes: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    """The splits as read.

    Attributes:
        training: The whole training split.
        validation: None where there is no official one.
        test: The test split.
    """

    training: LabelledExamples
    validation: LabelledExamples | None
    test: LabelledExamples


@dataclass(frozen=True)
class Columns:
    """Where the text and its label stand in a row."""

    text: str
    label: str


@dataclass(frozen=True)
class Part:
    """One published split.

    Attributes:
        split: The file's name without its ending, or the hub's name of the split.
        rows: How many rows the official split has, unlabelled ones among them.
        config: The hub's configuration; None means the only or default one.
    """

    split: str
    rows: int
    config: str | None = None


@dataclass(frozen=True)
class Layout:
    """How one form of a data set, local or on the hub, is laid out.

    Attributes:
        columns: The columns of every split.
        training: The training split.
        test: The test split.
        validation: None where there is no official one.
        notes: What must be known of this form, one sentence each.
    """

    columns: Columns
    training: Part
    test: Part
    validation: Part | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subset:
    """The test rows where a column of truth values holds, or where it does not.

    Attributes:
        name: As tables show it.
        column: The column of 0/1, true/false or yes/no.
        holds: Which of the two values chooses a row.
    """

    name: str
    column: str
    holds: bool = True


def no_remarks(_: LabelledExamples) -> tuple[str, ...]:
    """Nothing to say of the training split."""
    return ()


@dataclass(frozen=True)
class Published:
    """A data set as its authors published it.

    Attributes:
        name: As recipes write it.
        title: As tables show it.
        folder: Name of its local folder.
        repository: Its name on the Hugging Face hub.
        local: Layout of the local folder.
        hub: Layout on the hub.
        notes: What must be known of every form, one sentence each.
        positive: The positive class; None where the labels tell.
        on_missing_label: Whether unlabelled rows are an error, or are left out and counted.
        subsets: Parts of the test split that are reported on their own.
        remarks: Notes that depend on the whole training split as read.
    """

    name: str
    title: str
    folder: str
    repository: str
    local: Layout
    hub: Layout
    notes: tuple[str, ...]
    positive: str | None = None
    on_missing_label: OnMissingLabel = "error"
    subsets: tuple[Subset, ...] = ()
    remarks: Callable[[LabelledExamples], tuple[str, ...]] = no_remarks


def find_subsets(
    test: LabelledExamples, subsets: Iterable[Subset]
) -> dict[str, Int[np.ndarray, " row"]]:
    """Row positions of each subset; those whose column is absent, or that are empty, are left out.

    Raises:
        SidelightError: A cell of the column is neither empty nor a truth value.
    """
    rows = {subset.name: _rows(test, subset) for subset in subsets}
    return {name: positions for name, positions in rows.items() if len(positions)}


def _rows(test: LabelledExamples, subset: Subset) -> Int[np.ndarray, " row"]:
    if not any(subset.column in row for row in test.rows):
        return np.array([], dtype=np.int64)
    values = test.truth_values(subset.column)
    return np.flatnonzero([value is subset.holds for value in values])


# Rows: the hub's data set card, configuration `split`.
_TRAINING, _VALIDATION, _TEST = 16000, 2000, 2000

EMOTION = Published(
    name="emotion",
    title="Emotion",
    folder="emotion",
    repository="dair-ai/emotion",
    local=Layout(
        columns=Columns("text", "label_name"),
        training=Part("train", _TRAINING),
        validation=Part("validation", _VALIDATION),
        test=Part("test", _TEST),
    ),
    hub=Layout(
        columns=Columns("text", "label"),
        training=Part("train", _TRAINING, "split"),
        validation=Part("validation", _VALIDATION, "split"),
        test=Part("test", _TEST, "split"),
    ),
    notes=("Licence: for education and research only.",),
)


# Rows: Maas et al. 2011, the labelled reviews. The hub has the same columns as local files.
_LAYOUT = Layout(
    columns=Columns("text", "label"),
    training=Part("train", 25000),
    test=Part("test", 25000),
)

IMDB = Published(
    name="imdb",
    title="IMDB",
    folder="imdb",
    repository="stanfordnlp/imdb",
    local=_LAYOUT,
    hub=_LAYOUT,
    notes=("Licence: none is stated by the authors.",),
)


SST2 = Published(
    name="sst2",
    title="SST-2",
    folder="sst2",
    repository="stanfordnlp/sst2",
    # Rows: Socher et al. 2013, without the neutral sentences.
    local=Layout(
        columns=Columns("text", "label"),
        training=Part("train_sentences", 6920),
        validation=Part("validation", 872),
        test=Part("test", 1821),
        notes=(
            "Training texts are the whole sentences, not the 67,349 phrases that GLUE made of "
            "them; the test labels are those of the original treebank.",
        ),
    ),
    # Rows: Wang et al. 2019 (GLUE).
    hub=Layout(
        columns=Columns("sentence", "label"),
        training=Part("train", 67349),
        test=Part("validation", 872),
        notes=(
            "GLUE hides the labels of its 1,821 test rows: its validation split is the test here, "
            "not comparable with scores on the original test sentences.",
            "Training texts are phrases, and phrases of one sentence may be in both training and "
            "validation.",
        ),
    ),
    notes=("Licence: none is stated by the authors.",),
    positive="1",
)


_CONFIG = "toxicchat0124"
# Rows: the hub's data set card, version 0124.
_TOXICCHAT_TRAINING_ROWS, _TOXICCHAT_TEST_ROWS = 5082, 5083
# Share of toxic rows over both official splits: the same card.
_TOXIC_PERCENT = 7.33


def _remarks(training: LabelledExamples) -> tuple[str, ...]:
    """Says so if the machine-screened rows of the training split are missing."""
    column = "human_annotation"
    if len(training) >= _TOXICCHAT_TRAINING_ROWS or not any(column in r for r in training.rows):
        return ()
    if set(training.truth_values(column)) != {True}:
        return ()
    percent = 100 * float(training.labels.mean())
    return (
        "All training rows are human-annotated; the machine-screened, mostly harmless ones are "
        f"missing, so {percent:.1f} % are toxic, against {_TOXIC_PERCENT} % of the official rows.",
    )


TOXICCHAT = Published(
    name="toxicchat",
    title="ToxicChat",
    folder="toxicchat0124",
    repository="lmsys/toxic-chat",
    local=Layout(
        columns=Columns("text", "toxicity"),
        training=Part("train", _TOXICCHAT_TRAINING_ROWS),
        test=Part("test", _TOXICCHAT_TEST_ROWS),
    ),
    hub=Layout(
        columns=Columns("user_input", "toxicity"),
        training=Part("train", _TOXICCHAT_TRAINING_ROWS, _CONFIG),
        test=Part("test", _TOXICCHAT_TEST_ROWS, _CONFIG),
    ),
    notes=("Licence: CC BY-NC 4.0, no commercial use.",),
    positive="1",
    subsets=(Subset("human", "human_annotation"),),
    remarks=_remarks,
)


_COLUMNS = Columns("prompt", "prompt_harm_label")
# Rows: the hub's data set card.
_WILDGUARDMIX_TRAINING_ROWS, _WILDGUARDMIX_TEST_ROWS = 86759, 1725

WILDGUARDMIX = Published(
    name="wildguardmix",
    title="WildGuardMix (prompt harm)",
    folder="wildguardmix",
    repository="allenai/wildguardmix",
    local=Layout(
        columns=_COLUMNS,
        training=Part("train", _WILDGUARDMIX_TRAINING_ROWS),
        test=Part("test", _WILDGUARDMIX_TEST_ROWS),
    ),
    hub=Layout(
        columns=_COLUMNS,
        training=Part("train", _WILDGUARDMIX_TRAINING_ROWS, "wildguardtrain"),
        test=Part("test", _WILDGUARDMIX_TEST_ROWS, "wildguardtest"),
    ),
    notes=(
        "Licence: ODC-BY; the hub asks to accept AI2's guidelines for responsible use first.",
        "Training labels are GPT-4's, test labels are human.",
    ),
    positive="harmful",
    on_missing_label="skip",
    subsets=(
        Subset("adversarial", "adversarial"),
        Subset("vanilla", "adversarial", holds=False),
    ),
)


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
