"""MULI: a sparse logistic regression on the log-odds of the answer's first token."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.backbones import TransformersBackbone
from sidelight.baselines.base import Baseline, Rival
from sidelight.baselines.first_token import FirstToken, text_chunks
from sidelight.baselines.linear import Linear, Scaling
from sidelight.baselines.log_odds_design import LogOddsDesign
from sidelight.baselines.sparse_logistic import Sparse, sparse_path
from sidelight.errors import SidelightError
from sidelight.study import Split, Study
from sidelight.training import validation_score


@dataclass(frozen=True)
class Muli(Baseline):
    """Moderation using LLM introspection (Hu et al., NeurIPS 2024, arXiv 2405.18822).

    Every vocabulary entry's log p - log(1 - p) after the prompt, standardised on training texts;
    L1 penalty, classes weighted by inverse frequency; softmax for more than two classes.

    Attributes:
        shares: Penalties; see ``sparse_path``. The paper has one; here validation texts choose.
        iterations: Steps per penalty.
    """

    title: ClassVar[str] = "MULI: first token's log-odds, L1 logistic regression"
    is_single_pass: ClassVar[bool] = True
    shares: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 0.003)
    iterations: int = 100

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Chooses the penalty on validation texts; nothing is random.

        Raises:
            SidelightError: The last token read is not the one before the answer, or the LLM's head
                is unknown; see ``FirstToken``.
        """
        _require_first_token(study.training)
        shortest = min(study.training.prompts, key=len)
        first = FirstToken.of(study.backbone, shortest)
        design = LogOddsDesign.of(first, _last_states(study.training))
        candidates = [
            _Fitted.of(study.backbone, sparse, design.scaling)
            for sparse in sparse_path(
                design,
                torch.from_numpy(study.training.labels),
                study.task,
                features=len(first.weight),
                shares=self.shares,
                iterations=self.iterations,
            )
        ]
        validation = study.validation
        return max(
            candidates,
            key=lambda each: validation_score(
                study.task, each.logits(validation), validation.labels
            ),
        )


@dataclass(frozen=True)
class _Fitted(Rival):
    """Holds the entries with a weight only, and no copy of the LLM's head."""

    backbone: TransformersBackbone
    entries: Int[Tensor, " kept"]
    linear: Linear

    @staticmethod
    def of(backbone: TransformersBackbone, sparse: Sparse, scaling: Scaling) -> "_Fitted":
        entries = sparse.weight.any(1).nonzero()[:, 0]
        kept = Scaling(scaling.mean[entries], scaling.scale[entries])
        linear = Linear.folded(sparse.weight[entries], sparse.bias, kept)
        return _Fitted(linear.parameters, backbone, entries, linear)

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        return torch.cat([self.linear(odds) for odds in self._odds(split)]).numpy()

    def _odds(self, split: Split) -> Iterator[Float[Tensor, "text kept"]]:
        first = FirstToken.unchecked(self.backbone)
        directions = first.directions(_last_states(split))
        for chunk in directions.chunk(text_chunks(len(directions), len(first.weight))):
            yield first.log_odds(chunk)[:, self.entries]


def _last_states(split: Split) -> Float[Tensor, "text width"]:
    return split.pooled.lasts[:, -1]


def _require_first_token(split: Split) -> None:
    reads = split.states.reads
    if reads.side != "prompt" or not all(bool(prompt.mask(reads)[-1]) for prompt in split.prompts):
        raise SidelightError(
            f"MULI reads the state that the answer's first token comes from, but these states are "
            f"of {reads}. Read the prompt with its template: Reads(side='prompt', template=True)."
        )
