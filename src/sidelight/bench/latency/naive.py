"""The same probe without a tap: every hidden state is kept, stacked, and read afterwards.

This is what ``output_hidden_states=True`` invites, and why a probe is thought to be expensive: the
whole tensor of layers, tokens and width is written to memory and read again.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sidelight.backbones import TransformersBackbone
from sidelight.bench.latency.subjects import Answer, Kind, module_bytes
from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt
from sidelight.types import Verdict

# Pairs of tokens in a batch, B T^2. The dense attention holds a score of each, layer and head, so
# this many take a few gigabytes; 16 texts of 512 tokens and 1 of 2,048 are just within.
_MOST_PAIRS = 2**22


class Naive:
    """The LLM with ``output_hidden_states=True``, then the mechanism's dense form.

    The mechanism runs in the LLM's dtype, which is the faster choice; serving uses float32.

    Args:
        name: Of the row.
        backbone: The LLM.
        probe: What judges the prompts; its standardisation is the identity.
    """

    kind: Kind = "naive"

    def __init__(self, name: str, backbone: TransformersBackbone, probe: Probe):
        self.name = name
        self._backbone = backbone
        self._probe = probe
        self._mechanism = deepcopy(probe.mechanism).to(backbone.device, backbone.model.dtype)
        self.weights_bytes = module_bytes(backbone.model) + module_bytes(self._mechanism)

    def accepts(self, batch: Sequence[EncodedPrompt]) -> bool:
        """Up to the size at which the dense forms take a few gigabytes."""
        return len(batch) * max(map(len, batch)) ** 2 <= _MOST_PAIRS

    @torch.inference_mode()
    def run(self, batch: Sequence[EncodedPrompt]) -> Answer:
        """One forward pass, then the dense form on all that it kept."""
        mask = self._padded([torch.ones(len(prompt), dtype=torch.bool) for prompt in batch])
        output = self._backbone.model(
            input_ids=self._padded([torch.tensor(prompt.token_ids) for prompt in batch]),
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
            use_cache=True,
            logits_to_keep=self._backbone.last_position,
        )
        hidden = torch.stack(output.hidden_states, 1)  # (B, L, T, D)
        read = self._padded([prompt.mask(self._probe.reads) for prompt in batch])
        tokens = tuple(output.logits[:, -1].argmax(1).tolist())
        return Answer(tokens, self._judge(hidden, read))

    def _judge(
        self, hidden: Float[Tensor, "batch layer token width"], read: Bool[Tensor, "batch token"]
    ) -> tuple[tuple[Verdict, ...], ...]:
        logits = self._mechanism(hidden, read).double().cpu().numpy()
        return tuple((self._probe.verdict(row),) for row in logits)

    def _padded(self, rows: list[Tensor]) -> Tensor:
        """On the left, as served."""
        return pad_sequence(rows, batch_first=True, padding_side="left").to(self._backbone.device)
