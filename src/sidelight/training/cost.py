"""Estimates of the disk space and CPU time of a training run, before any text is run."""

from dataclasses import dataclass
from time import perf_counter

import torch

from sidelight.data.examples import LabelledExamples, located
from sidelight.models.encode import PromptEncoder
from sidelight.models.fingerprint import Fingerprint
from sidelight.states.cache import token_bytes
from sidelight.states.compression import compressed_token_bytes
from sidelight.training.contexts import context_budget
from sidelight.training.settings import MOST_UNCOMPRESSED_BYTES, TRAINING_MAX_TOKENS

# Operations per token and parameter, at the measured speed of matrix products: 2.7 for the forward
# pass, of which 2 are the products themselves, and the rest for the probe, its folds and their
# calibration. Measured with `sidelight guard --only injection` on SmolLM2-135M.
_OPERATIONS = 4.0
# Rows, depth and columns of the product that measures this CPU, as for a batch in one block.
_PRODUCT = (1024, 576, 1536)
_REPETITIONS = 20


@dataclass(frozen=True)
class TrainingEstimate:
    """Cost of training a probe; ``str`` formats it for a sentence.

    Attributes:
        tokens: Number of tokens of the texts and their contexts.
        disk_bytes: Disk space for hidden states, compressed if they would take more than 10 GiB
            uncompressed. They are removed at the end.
        seconds: Time on this CPU, accurate within a factor of two.
    """

    tokens: int
    disk_bytes: int
    seconds: float

    def __str__(self) -> str:
        minutes = max(2, round(self.seconds / 60))
        time = f"{minutes} minutes" if minutes < 100 else f"{minutes / 60:.0f} hours"
        return f"about {time} on this CPU, {self.disk_bytes / 1e9:.1f} GB of disk"


def estimate_training(
    texts: LabelledExamples,
    encoder: PromptEncoder,
    model: Fingerprint,
    *,
    operations_per_s: float | None = None,
) -> TrainingEstimate:
    """Estimate the cost of training a probe on these texts with the packaged background.

    The disk space is exact except for the drawn contexts. The time is proportional to tokens and
    parameters, of which a block of width D has about 12 D^2 (Kaplan et al. 2020, section 2.1); a
    mixture of experts takes less.

    Args:
        texts: The training texts.
        encoder: Encoder that counts their tokens.
        model: The frozen LLM, which need not be loaded.
        operations_per_s: Speed of this CPU in float32; None measures it in under a second.
    """
    tokens = sum(training_tokens(texts, encoder))
    if texts.takes_contexts and texts.items[0].response is None:
        tokens += context_budget(tokens)
    parameters = 12 * (model.layers - 1) * model.width**2
    speed = operations_per_s or _operations_per_s()
    disk_bytes = tokens * token_bytes(model)
    if disk_bytes > MOST_UNCOMPRESSED_BYTES:
        disk_bytes = tokens * compressed_token_bytes(model)
    return TrainingEstimate(tokens, disk_bytes, _OPERATIONS * parameters * tokens / speed)


def training_tokens(texts: LabelledExamples, encoder: PromptEncoder) -> list[int]:
    """The number of tokens that training reads from each text.

    Raises:
        SidelightError: The model's template cannot render a text.
    """
    limit = min(TRAINING_MAX_TOKENS, encoder.max_tokens)
    counts: list[int] = []
    for index, item in enumerate(texts.items):
        with located(item, index):
            prompt = encoder.encode_any_length(item.messages, item.response)
            counts.append(min(limit, len(prompt)))
    return counts


def _operations_per_s() -> float:
    """Measure the fastest of several matrix products, because other programs interrupt some of
    them.
    """
    rows, depth, width = _PRODUCT
    left, right = torch.randn(rows, depth), torch.randn(depth, width)
    seconds: list[float] = []
    for _ in range(_REPETITIONS):
        start = perf_counter()
        torch.mm(left, right)
        seconds.append(perf_counter() - start)
    return 2 * rows * depth * width / min(seconds)
