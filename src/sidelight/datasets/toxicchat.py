"""ToxicChat: toxic prompts among those that users sent to a chat model (Lin et al. 2023)."""

from sidelight.data import Examples
from sidelight.data.truth_values import Truth, truth_values
from sidelight.datasets.publication import Columns, Layout, Part, Published, Subset

_CONFIG = "toxicchat0124"
# Rows: the hub's data set card, version 0124.
_TRAINING_ROWS, _TEST_ROWS = 5082, 5083
# Share of toxic rows over both official splits: the same card.
_TOXIC_PERCENT = 7.33


def _remarks(training: Examples) -> tuple[str, ...]:
    """Says so if the machine-screened rows of the training split are missing."""
    human = truth_values(training, "human_annotation") or ()
    if len(training) >= _TRAINING_ROWS or not human or set(human) != {Truth.HOLDS}:
        return ()
    labels = training.labels
    percent = 0.0 if labels is None else 100 * float(labels.mean())
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
        training=Part("train", _TRAINING_ROWS),
        test=Part("test", _TEST_ROWS),
    ),
    hub=Layout(
        columns=Columns("user_input", "toxicity"),
        training=Part("train", _TRAINING_ROWS, _CONFIG),
        test=Part("test", _TEST_ROWS, _CONFIG),
    ),
    notes=("Licence: CC BY-NC 4.0, no commercial use.",),
    positive="1",
    subsets=(Subset("human", "human_annotation"),),
    remarks=_remarks,
)
