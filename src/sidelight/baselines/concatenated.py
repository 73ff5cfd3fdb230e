"""Linear probe on all layers of each token, its logits smoothed over a sliding window."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from sidelight.baselines.base import Baseline, Rival
from sidelight.baselines.targets import class_targets
from sidelight.baselines.token_source import TokenSource
from sidelight.baselines.token_training import TokenModel, token_logits, train_on_tokens
from sidelight.baselines.windows import Windows
from sidelight.cache import Shard
from sidelight.mechanisms import online_softmax
from sidelight.ragged import Ragged
from sidelight.standardisation import Standardisation
from sidelight.study import Split, Study
from sidelight.training import TrainingSettings
from sidelight.types import Task

_SETTINGS = TrainingSettings(learning_rate=1e-3, epochs=6, patience=2)


class SmoothedLinear(TokenModel):
    """The largest sliding-window mean of a text's token logits, z_t = b + sum_l w_l . x_lt.

    Trained by the cross-entropy of every window's mean, the windows of a text weighted by a softmax
    of those means. Classes of a multi-class task are trained one against the rest.

    Args:
        scaling: Of all layers.
        task: The classes.
        window: Tokens of a window; a shorter text is one window.
    """

    def __init__(self, scaling: Standardisation, task: Task, *, window: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*scaling.mean.shape, task.outputs))
        self.bias = nn.Parameter(torch.zeros(task.outputs))
        self._scaling = scaling
        self._task = task
        self._window = window

    def forward(self, batch: Shard) -> Float[Tensor, "text output"]:
        """The largest smoothed logit, per output; in float32, as probes are scored."""
        return self.smoothed(batch, dtype=torch.float32).maxima()

    def loss(self, batch: Shard, labels: Int[Tensor, "text ..."]) -> Float[Tensor, ""]:
        """The softmax-weighted loss over windows, from products in the states' own dtype."""
        smoothed = self.smoothed(batch, dtype=batch.hidden.dtype)
        logits = smoothed.values
        target = class_targets(labels, self._task)[smoothed.segments]
        losses = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        state = online_softmax.summarise(logits[:, None], losses[:, None, :, None], smoothed)
        return online_softmax.finish(state).mean()

    def smoothed(self, batch: Shard, *, dtype: torch.dtype) -> Ragged:
        """``[window, output]``: the mean logit of each window.

        Args:
            batch: The texts.
            dtype: Of the products of states and weights.
        """
        folded = self._scaling.fold(self.weight, dtype=dtype)
        # Layer by layer: a thin batched product of bf16 views is several times slower on a CPU.
        parts = [
            # The shift before the rounding to bf16: it takes away most of a large product.
            torch.addmm(shift.to(dtype), states.to(dtype), weight)
            for shift, states, weight in zip(folded.shift, batch.hidden, folded.weight, strict=True)
        ]
        logits = torch.stack(parts).float().sum(0) + self.bias
        return Windows.of(batch.lengths, size=self._window).means(logits)


@dataclass(frozen=True)
class Concatenated(Baseline):
    """The probe of Constitutional Classifiers++ (arXiv 2601.04603), scored by its largest window.

    Attributes:
        window: Tokens over which logits are averaged.
        settings: Of the optimisation.
    """

    title: ClassVar[str] = "All layers concatenated, sliding mean"
    is_single_pass: ClassVar[bool] = True
    window: int = 16
    settings: TrainingSettings = _SETTINGS

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Chooses the epoch on validation texts; reads the training states once per epoch."""
        training = TokenSource.all_layers(study.training)
        scaling = training.scaling()
        trained = train_on_tokens(
            lambda: SmoothedLinear(scaling, study.task, window=self.window),
            task=study.task,
            training=training,
            validation=TokenSource.all_layers(study.validation),
            settings=self.settings,
            seed=seed,
        )
        return _Fitted(trained.parameters, trained.model)


@dataclass(frozen=True)
class _Fitted(Rival):
    model: SmoothedLinear

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        return token_logits(self.model, TokenSource.all_layers(split))
