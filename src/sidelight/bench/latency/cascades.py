"""Two models one after the other: what a probe replaces."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification

from sidelight.bench.latency.subjects import Answer, Kind, Subject, module_bytes
from sidelight.prompts import EncodedPrompt

# The sizes of MiniLM-L6 (Wang et al. 2020), which the usual small text classifiers share.
_MINILM = BertConfig(
    vocab_size=30522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    max_position_embeddings=512,
)


class EncoderFirst:
    """An encoder of MiniLM's size classifies the prompts, then the LLM answers them.

    The encoder's weights are random, which does not change its speed. It reads the LLM's token ids
    folded into its vocabulary, so both models read the same number of tokens; a text longer than
    its 512 positions is read in windows.

    Args:
        name: Of the row.
        llm: What answers.
        device: Of the encoder.
        dtype: Of the encoder.
    """

    kind: Kind = "cascade"

    def __init__(self, name: str, llm: Subject, *, device: torch.device, dtype: torch.dtype):
        self.name = name
        self._llm = llm
        self._device = device
        with torch.random.fork_rng():
            encoder = BertForSequenceClassification(_MINILM).eval().requires_grad_(False)
        encoder.to(dtype).to(device)  # pyright: ignore[reportArgumentType]
        self._encoder = encoder
        self.weights_bytes = module_bytes(encoder) + llm.weights_bytes

    def accepts(self, batch: Sequence[EncodedPrompt]) -> bool:
        """Whatever the LLM does."""
        return self._llm.accepts(batch)

    def run(self, batch: Sequence[EncodedPrompt]) -> Answer:
        """The class of each prompt, read back before the LLM begins."""
        self._classify(batch)
        return self._llm.run(batch)

    @torch.inference_mode()
    def _classify(self, batch: Sequence[EncodedPrompt]) -> list[int]:
        windows = [window for prompt in batch for window in _windows(prompt)]
        mask = pad_sequence([torch.ones_like(window) for window in windows], batch_first=True)
        token_ids = pad_sequence(windows, batch_first=True)
        output = self._encoder(
            input_ids=token_ids.to(self._device), attention_mask=mask.to(self._device)
        )
        return output.logits.argmax(1).tolist()


def _windows(prompt: EncodedPrompt) -> tuple[Int[Tensor, " token"], ...]:
    token_ids = torch.tensor(prompt.token_ids) % _MINILM.vocab_size
    return token_ids.split(_MINILM.max_position_embeddings)


class GuardFirst:
    """A generative guard says its one-token verdict, then the LLM answers.

    Args:
        name: Of the row.
        guard: What judges; where one model stands for both, its weights count twice.
        llm: What answers.
    """

    kind: Kind = "cascade"

    def __init__(self, name: str, guard: Subject, llm: Subject):
        self.name = name
        self._guard = guard
        self._llm = llm
        self.weights_bytes = guard.weights_bytes + llm.weights_bytes

    def accepts(self, batch: Sequence[EncodedPrompt]) -> bool:
        """Whatever both do."""
        return self._guard.accepts(batch) and self._llm.accepts(batch)

    def run(self, batch: Sequence[EncodedPrompt]) -> Answer:
        """One token of each model, the guard's read back before the LLM begins."""
        self._guard.run(batch)
        return self._llm.run(batch)
