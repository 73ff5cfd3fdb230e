"""What ``auto`` takes: the candidate that best predicts texts it did not train on.

Candidates are compared by the log loss of calibrated probabilities on the same left-out texts. A
candidate that costs more to serve is taken only if its gain stands out from that of single texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from sidelight.mechanisms.base import mechanism_spec
from sidelight.mechanisms.linear import Linear
from sidelight.mechanisms.readout import Readout
from sidelight.training.linear import LinearSolution
from sidelight.training.loop import Trained

# The title of a mixture.
MIXTURE = "readout and linear"
# Standard errors of a gain that make it one.
_LEAST_GAIN = 0.5
# And that make a rival clearly better.
_CLEAR = 2.0
# Shares of the linear mechanism in a mixture.
_SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Choice:
    """Which candidate was taken, and what it was compared with.

    Attributes:
        taken: Its title.
        losses: The mean log loss of left-out texts by title, the cheapest candidate first.
        rivals: That of models without a mechanism, by title.
    """

    taken: str
    losses: Mapping[str, float]
    rivals: Mapping[str, float]

    def __str__(self) -> str:
        """One line with the figures of all candidates and rivals."""
        others = [f"{title} {loss:.3f}" for title, loss in self.losses.items()]
        rivals = [f"{title} {loss:.3f}" for title, loss in self.rivals.items()]
        return (
            f"Took {self.taken} by the log loss of left-out texts (a costlier one only for a clear "
            f"gain): {', '.join(others)}. Rivals: {', '.join(rivals)}."
        )


def best_of(losses: Sequence[Float[np.ndarray, " text"]]) -> int:
    """The candidate to take, of losses of the same texts, the cheapest candidate first.

    A later one has to gain more than half a standard error of the difference.
    """
    best = 0
    for index in range(1, len(losses)):
        gains = losses[best] - losses[index]
        if gains.mean() > _LEAST_GAIN * gains.std() / np.sqrt(len(gains)):
            best = index
    return best


def better_rivals(
    taken: Float[np.ndarray, " text"], rivals: Mapping[str, Float[np.ndarray, " text"]]
) -> list[str]:
    """A warning for each rival whose loss is clearly below that of what was taken."""
    found: list[str] = []
    for title, losses in rivals.items():
        lost = taken - losses
        if lost.mean() > _CLEAR * lost.std() / np.sqrt(len(lost)):
            found.append(
                f"{title} predicts left-out texts better than any probe: a log loss of "
                f"{losses.mean():.3f} against {taken.mean():.3f}. Add texts, try another model "
                "(--model), or use it in place of a probe."
            )
    return found


def mixtures(linear: Trained, readout: Trained) -> list[Trained]:
    """Readouts whose logits are between a readout's and a linear mechanism's.

    Such a mixture is a readout again, with one more gate, which is zero. None if the two read
    different states.
    """
    assert isinstance(linear.mechanism, Linear)
    assert isinstance(readout.mechanism, Readout)
    if linear.standardisation.is_normalised != readout.standardisation.is_normalised:
        return []
    solution = LinearSolution.of(linear.mechanism, linear.standardisation)
    device = readout.mechanism.bias.device
    moved = solution.standardised(readout.standardisation)
    parameters = {name: value.to(device) for name, value in moved.items()}
    spec = readout.job.spec
    heads = readout.mechanism.gate.shape[2] + 1
    return [
        replace(
            readout,
            job=replace(
                readout.job, spec=mechanism_spec(spec.name, {**spec.options, "heads": heads})
            ),
            mechanism=readout.mechanism.mixed(**parameters, share=share),
            logits=(1 - share) * readout.logits + share * linear.logits,
        )
        for share in _SHARES
    ]
