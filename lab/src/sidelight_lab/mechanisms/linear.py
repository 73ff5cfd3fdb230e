"""A readout that weighs all tokens alike."""

import torch

from sidelight.mechanisms.base import Geometry
from sidelight.mechanisms.readout import Readout


class Linear(Readout):
    """A readout whose one gate is zero, so that it takes the mean over tokens.

    Args:
        geometry: Sizes.
    """

    def __init__(self, geometry: Geometry):
        super().__init__(geometry, heads=1)
        zeros = torch.zeros_like(self.gate)
        del self.gate
        self.register_buffer("gate", zeros, persistent=False)
