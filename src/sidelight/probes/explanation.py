"""Explanations of verdicts: how a logit divides among a text's tokens and layers.

They are computed from the projections of the pass that classified the text, so they need no further
pass of the model.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.errors import VerdictError
from sidelight.models.conversation import EncodedPrompt, Place, read_tokens, split_segments
from sidelight.probes.probe import Probe, ProbeOutput
from sidelight.probes.ragged import Ragged
from sidelight.types import Verdict

Method = Literal["exact", "integrated_gradients"]


@dataclass(frozen=True)
class Explanation:
    """The shares of tokens and layers in the logit behind one verdict.

    ``baseline`` and all ``shares`` sum to ``logit`` within 1e-4. This is the logit before
    calibration; probabilities and thresholds are not attributed.

    Attributes:
        verdict: At the probe's own thresholds.
        label: The label of the logit: the positive one of a binary probe, otherwise the verdict's.
        logit: The logit of the deciding turn, if the verdict names one. For a multi-class probe,
            the mean of all logits is subtracted, because a common shift changes no verdict.
        baseline: The logit of a text whose tokens are all like the mean of the training texts.
        steps: Number of integrated gradients; 0 if the shares are exact.
        shares: In logits, by token that the probe read for this logit and by layer; layer 0 is the
            embedding.
        places: Position of each token in the texts; None for tokens of the chat template or the
            tokenizer.
    """

    verdict: Verdict
    label: str
    logit: float
    baseline: float
    steps: int
    shares: Float[np.ndarray, "token layer"]
    places: tuple[Place | None, ...]

    @property
    def method(self) -> Method:
        """``exact`` if the logit is a sum of weights times values, such as gates times readouts.

        In this case, a share is the sum of the token's own terms, with the weights held fixed.
        Otherwise gradients are integrated from the baseline to the text.
        """
        return "integrated_gradients" if self.steps else "exact"

    @property
    def template(self) -> float:
        """Total share of the tokens that are not part of the texts."""
        is_template = [place is None for place in self.places]
        return float(self.shares[is_template].sum())

    def to_dict(self, *, matrix: bool = False) -> dict[str, Any]:
        """As JSON values: the shares of each token of the texts, and of each layer.

        Args:
            matrix: Whether to add each token's share in each layer, as its ``layers``.
        """
        rows = zip(self.places, self.shares.sum(1).tolist(), self.shares, strict=True)
        return {
            "probe": self.verdict.probe,
            "label": self.label,
            "method": self.method,
            "steps": self.steps,
            "logit": self.logit,
            "baseline": self.baseline,
            "template": self.template,
            "layers": self.shares.sum(0).tolist(),
            "tokens": [
                {
                    "message": place.message,
                    "start": place.start,
                    "end": place.end,
                    "share": share,
                    **({"layers": layers.tolist()} if matrix else {}),
                }
                for place, share, layers in rows
                if place is not None
            ],
        }


def explain(
    probe: Probe, projections: Float[Tensor, "token layer projection"], prompt: EncodedPrompt
) -> Explanation:
    """Return the verdict on one text with its explanation.

    Args:
        probe: The probe, in evaluation mode.
        projections: The probe's projections of every token.
        prompt: The text, with any response, and the positions of its tokens.

    Raises:
        VerdictError: A logit is not finite, or a probe of chats was given plain text.
    """
    if not probe.can_classify(prompt):
        raise VerdictError(
            f"Probe '{probe.name}' was trained only on chats and cannot classify plain text. "
            "Pass the text as a chat message."
        )
    token_roles = bytes(prompt.token_roles)
    segments = split_segments(token_roles) if probe.classifies_turns else []
    is_read = read_tokens(token_roles, probe.reads)
    members = [*(segment.tokens for segment in segments), np.arange(len(token_roles))]
    read = [tokens[is_read[tokens]] for tokens in members]
    # On the CPU, because Apple's GPUs do not support float64.
    projections, mechanism = projections.cpu(), deepcopy(probe.mechanism).cpu()
    with torch.inference_mode():
        logits = mechanism.logits(_texts(projections, read)).double().numpy()
    decisive = probe.highest(logits[:-1], segments, ProbeOutput(logits[-1]))
    verdict = probe.verdict(decisive.logits, turn=decisive.turn)
    labels = probe.task.output_labels
    # The negative class of a binary task has no logit.
    label = verdict.label if verdict.label in labels else labels[0]
    targets = probe.task.logit_weights(label)
    segment = int(logits[:, labels.index(label)].argmax())
    shares = mechanism.shares(_texts(projections, [read[segment]]), torch.from_numpy(targets)[None])
    return Explanation(
        verdict=verdict,
        label=label,
        logit=float(logits[segment] @ targets),
        baseline=float(shares.baseline),
        steps=shares.steps,
        shares=shares.values.numpy(),
        places=tuple(_as_sent(prompt, prompt.places[row]) for row in read[segment].tolist()),
    )


def _as_sent(prompt: EncodedPrompt, place: Place | None) -> Place | None:
    if place is None or place.start == place.end:
        return place
    start, end = prompt.as_sent(place.message, place.start, place.end)
    return replace(place, start=start, end=end)


def _texts(
    projections: Float[Tensor, "token layer projection"], tokens: Sequence[Int[np.ndarray, " _"]]
) -> Ragged:
    """These tokens of each text, concatenated."""
    rows = torch.from_numpy(np.concatenate(tokens))
    return Ragged(projections[rows], torch.tensor([*map(len, tokens)]))
