"""LoRA: the backbone itself fine-tuned, the ceiling for anything that leaves it frozen.

Each linear layer's output gets ``(alpha / r) B A x`` added, with ``A`` of shape [r, in] and ``B``
of shape [out, r] (Hu et al. 2022). Adapters are hooks on a copy of the model's structure that
shares its weights, which are frozen: the backbone is left as it was, and its weights are held once.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from sidelight.backbones.embedded import cache_root
from sidelight.baselines.base import Baseline, Rival
from sidelight.baselines.fine_tuning import FineTuning, Labelled, Lesson, fine_tune
from sidelight.baselines.sequences import Pooling, SequenceClassifier, Sequences, score_sequences
from sidelight.errors import SidelightError
from sidelight.study import Split, Study


@dataclass(frozen=True)
class Lora(Baseline):
    """LoRA on every linear layer of the decoder blocks, and a linear head.

    Not single-pass: generating text needs a pass of the unchanged weights.

    Attributes:
        rank: Of the update of each weight (r).
        alpha: The update counts ``alpha / rank`` times.
        dropout: On the ``rank`` numbers between A and B: as good here as on the input, and free.
        pooling: What the head reads of the final-norm hidden states.
        learning_rate: At the end of the warm-up.
        epochs: The best on validation data is kept.
        batch_size: Texts per step.
        checkpoints: Folder that a killed run goes on from; None is one in the user's cache.
    """

    title: ClassVar[str] = "LoRA fine-tuning"
    is_single_pass: ClassVar[bool] = False
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    pooling: Pooling = "mean"
    learning_rate: float = 5e-4
    epochs: int = 3
    batch_size: int = 32
    checkpoints: Path | None = None

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Fits adapters and head; the epoch is chosen on the validation texts."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self._adapted(study)
        lesson = Lesson(
            task=study.task,
            training=_labelled(study.training),
            validation=_labelled(study.validation),
            settings=FineTuning(self.learning_rate, epochs=self.epochs, batch_size=self.batch_size),
            seed=seed,
            title=self.title,
        )
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        tuned = fine_tune(model, lesson, checkpoint=self._checkpoint(lesson, study))
        return _Fitted(parameters, model, seconds_before=tuned.seconds_before)

    def _adapted(self, study: Study) -> SequenceClassifier:
        body = _sharing_weights(study.backbone.model.base_model)
        # The fused kernel's backward pass is several times slower than the plain one on CPUs.
        body.set_attn_implementation("eager")
        adapters = _adapt(body, rank=self.rank, scale=self.alpha / self.rank, dropout=self.dropout)
        return SequenceClassifier(
            body,
            width=study.backbone.fingerprint.width,
            outputs=study.task.outputs,
            pooling=self.pooling,
            adapters=adapters,
        ).to(study.backbone.device)

    def _checkpoint(self, lesson: Lesson, study: Study) -> Path:
        model = (self.rank, self.alpha, self.dropout, self.pooling)
        who = study.backbone.fingerprint.digest
        reads = study.training.states.reads
        folder = self.checkpoints or cache_root() / "checkpoints"
        return folder / f"lora-{lesson.key(model, who, reads)}.safetensors"


@dataclass(frozen=True)
class _Fitted(Rival):
    model: SequenceClassifier

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        return score_sequences(self.model, Sequences.of(split), title="Judging")


class _Adapter(nn.Module):
    """Adds a low-rank update to the output of one linear layer."""

    def __init__(self, layer: nn.Linear, *, rank: int, scale: float, dropout: float):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, layer.in_features))
        # Zero: the first step starts from the backbone as it is.
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self._scale = scale
        self._dropout = dropout

    def forward(self, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """As a forward hook of the layer."""
        inner = functional.dropout(
            functional.linear(args[0], self.down), self._dropout, self.training
        )
        rows = output.reshape(-1, output.shape[-1])
        inner = inner.reshape(len(rows), -1)
        return torch.addmm(rows, inner, self.up.T, alpha=self._scale).view(output.shape)


def _adapt(body: nn.Module, *, rank: int, scale: float, dropout: float) -> nn.ModuleList:
    layers = [layer for layer in body.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise SidelightError(
            f"{type(body).__name__} has no nn.Linear layers, which LoRA adapts. "
            "Choose another baseline for this backbone."
        )
    adapters = [_Adapter(layer, rank=rank, scale=scale, dropout=dropout) for layer in layers]
    for layer, adapter in zip(layers, adapters, strict=True):
        layer.register_forward_hook(adapter)
    return nn.ModuleList(adapters)


def _sharing_weights(model: nn.Module) -> Any:
    """A copy of the modules, to hang hooks on, around the same parameters."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def _labelled(split: Split) -> Labelled:
    return Labelled(Sequences.of(split), split.labels)
