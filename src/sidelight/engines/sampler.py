"""Draws the next token of one request."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.engines.base import Sampling

# Below this, dividing by the temperature overflows before it changes the choice.
_GREEDY_BELOW = 1e-5


class Sampler:
    """Draws tokens by inverting the cumulative distribution at one uniform number per token.

    The numbers come from a generator of the request's own, so what a request draws does not depend
    on the requests beside it.
    """

    def __init__(self, sampling: Sampling):
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: Float[Tensor, " vocabulary"]) -> Int[Tensor, ""]:
        """The next token's id, on the device of ``logits``."""
        if self._temperature < _GREEDY_BELOW:
            return logits.argmax()
        probabilities = torch.softmax(logits.float() / self._temperature, dim=-1)
        if self._top_p >= 1:
            return self._invert(probabilities)
        ranked, token_ids = probabilities.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        kept = torch.where(before < self._top_p, ranked, 0.0)
        return token_ids[self._invert(kept)]

    def _invert(self, weights: Float[Tensor, " vocabulary"]) -> Int[Tensor, ""]:
        """The index at which the running sum of ``weights`` passes a uniform share of the whole."""
        cumulative = weights.double().cumsum(-1)
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        target = uniform.to(cumulative.device) * cumulative[-1]
        # Clamped: rounding may lift the target to the sum itself.
        return torch.searchsorted(cumulative, target, right=True).clamp(max=len(weights) - 1)
