"""What the LLM would say first: log-odds of every vocabulary entry after the prompt."""

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sidelight.backbones import TransformersBackbone
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt

# 1 - p below this cannot be told from zero in float32; log-odds end at 16.
_ROOM = 1e-7


@dataclass(frozen=True, eq=False)
class FirstToken:
    """The LLM's final norm and language-model head, in float32.

    Attributes:
        norm: Of a state after the last block.
        weight: Of the head.
        bias: Of the head; zero where it has none.
    """

    norm: nn.Module
    weight: Float[Tensor, "entry width"]
    bias: Float[Tensor, " entry"]

    @staticmethod
    def of(backbone: TransformersBackbone, prompt: EncodedPrompt) -> "FirstToken":
        """A backbone's, checked against its own logits after a prompt.

        Raises:
            SidelightError: The logits are not a linear head on one final norm.
        """
        first = FirstToken.unchecked(backbone)
        first._check(backbone, prompt)
        return first

    @staticmethod
    def unchecked(backbone: TransformersBackbone) -> "FirstToken":
        """That of a backbone which ``of`` has accepted: a large copy, not to be kept."""
        head: Any = backbone.model.get_output_embeddings()
        weight = head.weight.detach().float().cpu()
        bias = torch.zeros(len(weight)) if head.bias is None else head.bias.float().cpu()
        return FirstToken(_final_norm(backbone), weight, bias)

    @torch.no_grad()
    def directions(self, states: Float[Tensor, "text width"]) -> Float[Tensor, "text width"]:
        """States as the head reads them.

        Args:
            states: Of the prompt's last token, after the last block.
        """
        return self.norm(states)

    def logits(self, directions: Float[Tensor, "text width"]) -> Float[Tensor, "text entry"]:
        """Of the first token of the answer."""
        return torch.addmm(self.bias, directions, self.weight.T)

    def log_odds(self, directions: Float[Tensor, "text width"]) -> Float[Tensor, "text entry"]:
        """The log p - log(1 - p) of each entry; hand it a few hundred texts at a time."""
        log_chance = self.logits(directions).log_softmax(1).clamp(max=-_ROOM)
        return log_chance - torch.log(-torch.expm1(log_chance))

    def _check(self, backbone: TransformersBackbone, prompt: EncodedPrompt) -> None:
        kept: list[Tensor] = []

        def keep_last(layer: int, hidden: Float[Tensor, "batch token width"]) -> None:
            if layer == backbone.fingerprint.layers - 1:
                kept.append(hidden[:, -1].float().cpu())

        ids = torch.tensor([prompt.token_ids], device=backbone.device)
        with backbone.tapped(keep_last), torch.no_grad():
            told = backbone.model(input_ids=ids, use_cache=False).logits[:, -1].float().cpu()
        error = (self.logits(self.directions(kept[0])) - told).abs().max()
        # The model rounds its own logits to its dtype.
        tolerance = max(1e-3, 4 * torch.finfo(backbone.model.dtype).eps)
        if not error <= tolerance * told.abs().max():
            raise SidelightError(
                f"The logits of {backbone.name} are off by up to {error:.3g} from its head on its "
                "final norm: it transforms them further. First-token log-odds need a plain head, "
                "as Llama, Qwen, Mistral, GPT-2 and GPT-NeoX have. Use another baseline."
            )


def _final_norm(backbone: TransformersBackbone) -> nn.Module:
    """Of the modules beside the blocks, the only one whose parameters are all of a state's size."""
    width = (backbone.fingerprint.width,)
    found = [
        module
        for module in backbone.model.base_model.children()
        if {tuple(parameter.shape) for parameter in module.parameters()} == {width}
    ]
    if len(found) != 1:
        raise SidelightError(
            f"{type(backbone.model).__name__} has {len(found)} norms beside its decoder blocks "
            "where one final norm was expected, as Llama, Qwen, Mistral, GPT-2 and GPT-NeoX have. "
            "Use a baseline that does not read the LLM's logits."
        )
    return deepcopy(found[0]).float().cpu()


def text_chunks(texts: int, entries: int) -> int:
    """How many chunks keep a chunk's log-odds within 64 MiB."""
    return max(1, math.ceil(texts * entries / 2**24))
