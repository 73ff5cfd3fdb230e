"""WildGuardMix: harmful prompts, plain and adversarial, mostly synthetic (Han et al. 2024)."""

from sidelight.datasets.publication import Columns, Layout, Part, Published, Subset

_COLUMNS = Columns("prompt", "prompt_harm_label")
# Rows: the hub's data set card.
_TRAINING_ROWS, _TEST_ROWS = 86759, 1725

WILDGUARDMIX = Published(
    name="wildguardmix",
    title="WildGuardMix (prompt harm)",
    folder="wildguardmix",
    repository="allenai/wildguardmix",
    local=Layout(
        columns=_COLUMNS,
        training=Part("train", _TRAINING_ROWS),
        test=Part("test", _TEST_ROWS),
    ),
    hub=Layout(
        columns=_COLUMNS,
        training=Part("train", _TRAINING_ROWS, "wildguardtrain"),
        test=Part("test", _TEST_ROWS, "wildguardtest"),
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
