"""A classifier that runs a whole model: token ids in, logits out. Knows no text and no training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sidelight.backbones.prefixes import can_share, run_after, run_once
from sidelight.batching import by_length
from sidelight.progress import progress
from sidelight.prompts import shared_unread
from sidelight.study import Split

Pooling = Literal["mean", "last"]


@dataclass(frozen=True, eq=False)
class Padded:
    """Some texts, padded on the right.

    Attributes:
        prefix: Tokens that all of them begin with; not repeated in the other attributes.
        token_ids: Any id where there is no token.
        present: Where there is a token.
        read: Which tokens the pooling looks at.
    """

    prefix: Int[Tensor, " prefix"]
    token_ids: Int[Tensor, "text token"]
    present: Bool[Tensor, "text token"]
    read: Bool[Tensor, "text token"]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Texts as token ids.

    Attributes:
        prefix: Tokens that all texts begin with and the pooling does not look at, such as a chat
            template's system prompt: a causal model runs them once for a whole batch.
        token_ids: Of each text, after the prefix.
        read: For each text, which of its tokens the pooling looks at.
    """

    prefix: Int[Tensor, " prefix"]
    token_ids: tuple[Int[Tensor, " _"], ...]
    read: tuple[Bool[Tensor, " _"], ...]

    @staticmethod
    def of(split: Split) -> "Sequences":
        """The backbone's tokens; read are those that a probe would read."""
        shared = shared_unread(split.prompts, split.states.reads)
        read = tuple(prompt.mask(split.states.reads) for prompt in split.prompts)
        return Sequences(
            torch.tensor(split.prompts[0].token_ids[:shared], dtype=torch.long),
            tuple(torch.tensor(prompt.token_ids[shared:]) for prompt in split.prompts),
            tuple(mask[shared:] for mask in read),
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text after the prefix."""
        return [len(ids) for ids in self.token_ids]

    def padded(self, texts: Sequence[int], *, device: torch.device) -> Padded:
        """A batch of these texts."""
        ids = pad_sequence([self.token_ids[text] for text in texts], batch_first=True)
        present = [torch.ones_like(self.read[text]) for text in texts]
        return Padded(
            self.prefix.to(device),
            ids.to(device),
            pad_sequence(present, batch_first=True).to(device),
            pad_sequence([self.read[text] for text in texts], batch_first=True).to(device),
        )


class SequenceClassifier(nn.Module):
    """A linear head on the pooled last hidden states of a model.

    Args:
        body: A model of ``transformers`` without its language-model head.
        width: Of its hidden states.
        outputs: Logits.
        pooling: ``mean`` of the tokens that are read, or the ``last`` of them.
        adapters: Parameters that hooks on ``body`` use, for the optimiser to find.
    """

    def __init__(
        self,
        body: Any,
        *,
        width: int,
        outputs: int,
        pooling: Pooling = "mean",
        adapters: nn.Module | None = None,
    ):
        super().__init__()
        self.body = body
        self.adapters = adapters
        self.head = nn.Linear(width, outputs)
        self._pool = {"mean": _means, "last": _lasts}[pooling]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def forward(self, batch: Padded) -> Float[Tensor, "text output"]:
        """The logits, in float32; the body runs in bf16 whatever its weights are stored in."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            hidden = self._hidden(batch)
        return self.head(self._pool(hidden.float(), batch.read))

    def _hidden(self, batch: Padded) -> Float[Tensor, "text token width"]:
        skipped = len(batch.prefix)
        if skipped and can_share(self.body):
            begun = run_once(self.body, batch.prefix)
            return run_after(self.body, begun, batch.token_ids, batch.present).last_hidden_state
        prefix = batch.prefix.expand(len(batch.token_ids), -1)
        output = self.body(
            input_ids=torch.cat([prefix, batch.token_ids], 1),
            attention_mask=torch.cat([torch.ones_like(prefix), batch.present.long()], 1),
        )
        return output.last_hidden_state[:, skipped:]


@torch.inference_mode()
def score_sequences(
    model: SequenceClassifier, sequences: Sequences, *, title: str
) -> Float[np.ndarray, "text output"]:
    """The logits of all texts, in their order."""
    model.eval()
    lengths = sequences.lengths
    logits = np.empty((len(lengths), model.head.out_features), dtype=np.float32)
    with progress(title, sum(lengths), unit="tokens") as shown:
        for texts in by_length(lengths):
            logits[texts] = model(sequences.padded(texts, device=model.device)).cpu().numpy()
            shown.advance(sum(lengths[text] for text in texts))
    return logits


def _means(
    hidden: Float[Tensor, "text token width"], read: Bool[Tensor, "text token"]
) -> Float[Tensor, "text width"]:
    weight = read.float() / read.sum(1, keepdim=True)
    return (hidden * weight[:, :, None]).sum(1)


def _lasts(
    hidden: Float[Tensor, "text token width"], read: Bool[Tensor, "text token"]
) -> Float[Tensor, "text width"]:
    positions = torch.arange(read.shape[1], device=read.device)
    last = torch.where(read, positions, -1).amax(1)
    return hidden[torch.arange(len(hidden), device=read.device), last]
