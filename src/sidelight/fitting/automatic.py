"""Which mechanisms to train where the user leaves it open: what so many labels can support."""

from sidelight.mechanisms import MechanismSpec, mechanism_spec

AUTO = "auto"
# Training texts below which extremes and features overfit; docs/results.md has the runs.
_FEW_TEXTS = 1000


def automatic_mechanisms(texts: int) -> tuple[MechanismSpec, ...]:
    """The candidates among which validation texts choose.

    Args:
        texts: For training.
    """
    if texts < _FEW_TEXTS:
        return (mechanism_spec("readout"),)
    return (mechanism_spec("readout", {"extremes": "pair"}), mechanism_spec("blend"))
