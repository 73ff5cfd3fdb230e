"""Which mechanisms to train where the user leaves it open: what so many labels can support."""

from sidelight.mechanisms import MechanismSpec, mechanism_spec

AUTO = "auto"
# Texts below which extremes overfit, and features; docs/results.md has the runs.
FEW_TEXTS, _MANY_TEXTS = 1000, 5000


def automatic_mechanisms(texts: int, *, long_inputs: bool = False) -> tuple[MechanismSpec, ...]:
    """The candidates; of several, validation texts choose.

    Args:
        texts: For training.
        long_inputs: Whether they are also trained on as parts of long inputs.
    """
    # Extremes of long inputs overfit too.
    if texts < FEW_TEXTS or long_inputs:
        return (mechanism_spec("readout"),)
    extremes = mechanism_spec("readout", {"extremes": "pair"})
    if texts < _MANY_TEXTS:
        return (extremes,)
    return (extremes, mechanism_spec("blend"))
