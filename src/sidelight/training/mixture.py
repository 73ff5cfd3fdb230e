"""The default probe: a readout and a linear solution, mixed as left-out texts decide."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from sidelight.calibration import CalibrationKind
from sidelight.data.examples import LabelledExamples
from sidelight.mechanisms.base import mechanism_spec
from sidelight.mechanisms.linear import Linear
from sidelight.mechanisms.readout import Readout
from sidelight.training.dataset import ProbeDataset
from sidelight.training.linear import LinearSolution
from sidelight.training.loop import Trained
from sidelight.training.measuring import calibrate_examples, measuring_folds

# Shares of the linear solution.
_SHARES = (0.25, 0.5, 0.75)
# Standard errors of a difference that make TF-IDF clearly better, and texts of the rarest label
# that are enough to say so.
_CLEAR, _ENOUGH_TEXTS = 2.0, 30


def mix(
    trained: Sequence[Trained], dataset: ProbeDataset, *, kind: CalibrationKind | None
) -> list[Trained]:
    """Each readout mixed with the linear solution; as they are if there is none.

    The share is the one with the lowest log loss of left-out texts.

    Args:
        trained: Readouts, and at most one linear mechanism, with logits of the measured texts.
        dataset: The texts.
        kind: How logits are calibrated before they are compared.
    """
    linear = next((one for one in trained if isinstance(one.mechanism, Linear)), None)
    readouts = [one for one in trained if isinstance(one.mechanism, Readout)]
    if linear is None or not readouts:
        return [*trained]
    examples = dataset.validation.examples
    folds = measuring_folds(examples, folds=dataset.folds, kind=kind)

    def loss(candidate: Trained) -> float:
        logits = candidate.logits[: len(examples)]
        return float(
            calibrate_examples(logits, examples, folds, kind=kind, bootstrap=0).losses.mean()
        )

    return [min(mixtures(linear, readout) or [readout], key=loss) for readout in readouts]


def mixtures(linear: Trained, readout: Trained) -> list[Trained]:
    """Readouts whose logits are between a readout's and a linear mechanism's.

    Such a mixture is a readout again, with one more gate, which is zero. There is none if the two
    read different states.
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


def better_words(
    losses: Float[np.ndarray, " text"],
    of_words: Float[np.ndarray, " text"],
    examples: LabelledExamples,
) -> list[str]:
    """A warning if TF-IDF's loss is clearly below that of the probe.

    Args:
        losses: Log loss of each left-out text by the probe.
        of_words: The same by TF-IDF.
        examples: The texts; with few of a label, chance could decide.
    """
    lost = losses - of_words
    is_clear = lost.mean() > _CLEAR * lost.std() / np.sqrt(len(lost))
    if not is_clear or examples.label_counts.min() < _ENOUGH_TEXTS:
        return []
    return [
        "The words alone (TF-IDF) predict left-out texts better than the probe: a log loss of "
        f"{of_words.mean():.3f} against {losses.mean():.3f}. Add texts, or try another model "
        "(--model)."
    ]
