"""Mechanisms: what turns the hidden states of all layers and tokens into logits.

To add one, write its file and import it here; the law tests find it in the registry (``base``).
"""

from sidelight.mechanisms import attention, gate, pooling, readout, spans

__all__ = [
    "attention",
    "gate",
    "pooling",
    "readout",
    "spans",
]
