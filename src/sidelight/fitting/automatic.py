"""Which mechanisms to train where the user leaves it open: what so many labels can support."""

from sidelight.mechanisms import DEFAULT_MECHANISM, MechanismSpec, mechanism_spec
from sidelight.training.ridge import MOST_TEXTS

AUTO = "auto"
# Training texts below which gates and features overfit; docs/results.md has the runs.
_FEW_TEXTS = 300


def automatic_mechanisms(texts: int) -> tuple[MechanismSpec, ...]:
    """The candidates among which validation texts choose.

    Few labels are enough for the closed form only; with many, it is left behind.

    Args:
        texts: For training.
    """
    names = ["linear"] if texts <= MOST_TEXTS else []
    if texts > _FEW_TEXTS:
        names.append(DEFAULT_MECHANISM)
    return tuple(map(mechanism_spec, names))
