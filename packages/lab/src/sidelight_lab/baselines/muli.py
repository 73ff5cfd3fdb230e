"""MULI: a sparse logistic regression on the log-odds of the answer's first token."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt
from sidelight.training.dataset import Split
from sidelight.training.preparing import ProbeDataset
from sidelight_lab.baselines.base import Baseline, FittedBaseline, best_on_validation
from sidelight_lab.baselines.pooled import pooled_states
from sidelight_lab.baselines.siren import sparse_path

# 1 - p below this cannot be told from zero in float32; log-odds end at 16.
_ROOM = 1e-7


@dataclass(frozen=True, eq=False)
class FirstToken:
    """The LLM's final norm and language-model head, in float32: a large copy, not to be kept."""

    norm: nn.Module
    weight: Float[Tensor, "entry width"]
    bias: Float[Tensor, " entry"]

    @staticmethod
    def of(backbone: TransformersBackbone) -> "FirstToken":
        head: Any = backbone.model.get_output_embeddings()
        weight = head.weight.detach().float().cpu()
        bias = torch.zeros(len(weight)) if head.bias is None else head.bias.float().cpu()
        return FirstToken(_final_norm(backbone), weight, bias)

    def require(self, backbone: TransformersBackbone, prompt: EncodedPrompt) -> None:
        """Check these logits against the backbone's own after a prompt.

        Raises:
            SidelightError: The backbone's logits are not a linear head on one final norm.
        """
        captured: list[Tensor] = []

        def keep_last(layer: int, hidden: Float[Tensor, "batch token width"]) -> None:
            if layer == backbone.fingerprint.layers - 1:
                captured.append(hidden[:, -1].float().cpu())

        ids = torch.tensor([prompt.token_ids], device=backbone.device)
        with backbone.tapped(keep_last), torch.no_grad():
            theirs = backbone.model(input_ids=ids, use_cache=False).logits[:, -1].float().cpu()
        error = (self.logits(self.directions(captured[0])) - theirs).abs().max()
        # The model rounds its own logits to its dtype.
        tolerance = max(1e-3, 4 * torch.finfo(backbone.model.dtype).eps)
        if not error <= tolerance * theirs.abs().max():
            raise SidelightError(
                f"The logits of {backbone.name} differ by up to {error:.3g} from its head "
                "applied to its final norm, so the model transforms them further. First-token "
                "log-odds need a plain head, as in Llama, Qwen, Mistral, GPT-2 and GPT-NeoX. Use "
                "another baseline."
            )

    @torch.no_grad()
    def directions(self, states: Float[Tensor, "text width"]) -> Float[Tensor, "text width"]:
        """The head's inputs, from the states of the prompts' last tokens after the last block."""
        return self.norm(states)

    def logits(self, directions: Float[Tensor, "text width"]) -> Float[Tensor, "text entry"]:
        """The logits of the answer's first token."""
        return torch.addmm(self.bias, directions, self.weight.T)

    def log_odds(self, directions: Float[Tensor, "text width"]) -> Float[Tensor, "text entry"]:
        """The log p - log(1 - p) of each entry; see ``chunks``."""
        log_chance = self.logits(directions).log_softmax(1).clamp(max=-_ROOM)
        return log_chance - torch.log(-torch.expm1(log_chance))

    def chunks(self, directions: Float[Tensor, "text width"]) -> tuple[Tensor, ...]:
        """Parts of the texts whose log-odds take at most 64 MiB."""
        return directions.split(max(1, 2**24 // len(self.weight)))


def _final_norm(backbone: TransformersBackbone) -> nn.Module:
    """The only module beside the blocks whose parameters all have the size of a state."""
    width = (backbone.fingerprint.width,)
    found = [
        module
        for module in backbone.model.base_model.children()
        if {tuple(parameter.shape) for parameter in module.parameters()} == {width}
    ]
    if len(found) != 1:
        raise SidelightError(
            f"{type(backbone.model).__name__} has {len(found)} norms outside its decoder blocks, "
            "but MULI needs a single final norm, as in Llama, Qwen, Mistral, GPT-2 and GPT-NeoX. "
            "Use a baseline that does not read the LLM's logits."
        )
    return deepcopy(found[0]).float().cpu()


# log(1 - p) of a less likely entry is taken as 0: an error of .001, far below bf16's rounding.
_LIKELY = 1e-3


@dataclass(frozen=True, eq=False)
class LogOddsDesign:
    """Standardised log-odds of many texts, multiplied without the matrix (16,000 x 49,152: 3 GB).

    A log-odds is logit - log sum exp(logits) - log(1 - p): low rank, rank one, and sparse.

    Attributes:
        first: Final norm and head.
        directions: The head's input for each text.
        normaliser: log sum exp of the logits of each text.
        likely: log(1 - p), sparse.
        mean: Mean log-odds of each entry over the texts.
        scale: Standard deviation of the log-odds; 1 where they are constant.
    """

    first: FirstToken
    directions: Float[Tensor, "text width"]
    normaliser: Float[Tensor, "text 1"]
    likely: Float[Tensor, "text entry"]
    mean: Float[Tensor, " entry"]
    scale: Float[Tensor, " entry"]

    @staticmethod
    def of(first: FirstToken, states: Float[Tensor, "text width"]) -> "LogOddsDesign":
        """From the states of each text's last token after the last block."""
        directions = first.directions(states)
        sums, squares = torch.zeros(2, len(first.weight), dtype=torch.float64)
        normalisers: list[Tensor] = []
        likely: list[Tensor] = []
        for chunk in first.chunks(directions):
            logits = first.logits(chunk)
            normaliser = logits.logsumexp(1, keepdim=True)
            odds = first.log_odds(chunk)
            sums += odds.sum(0)
            squares += odds.square().sum(0)
            chance = (logits - normaliser).exp_()
            normalisers.append(normaliser)
            likely.append(torch.where(chance > _LIKELY, logits - normaliser - odds, 0).to_sparse())
        mean = sums / len(states)
        scale = (squares / len(states) - mean.square()).clamp(min=0).sqrt()
        return LogOddsDesign(
            first,
            directions,
            torch.cat(normalisers),
            torch.cat(likely).coalesce(),
            mean.float(),
            torch.where(scale > 1e-6, scale, 1.0).float(),
        )

    def __call__(self, weight: Float[Tensor, "entry output"]) -> Float[Tensor, "text output"]:
        """Standardised log-odds times weights."""
        raw = weight / self.scale[:, None]
        # In this order: the transposed head times a matrix takes ten times as long.
        low_rank = self.directions @ (raw.T @ self.first.weight).T
        rank_one = self.normaliser * raw.sum(0) + (self.mean - self.first.bias) @ raw
        return low_rank - rank_one - torch.sparse.mm(self.likely, raw)


@dataclass(frozen=True)
class Muli(Baseline):
    """Moderation using LLM introspection (Hu et al., NeurIPS 2024, arXiv 2405.18822).

    Every vocabulary entry's log p - log(1 - p) after the prompt, standardised on training texts;
    L1 penalty, classes weighted by inverse frequency; softmax for more than two classes.

    Attributes:
        shares: Penalties; see ``sparse_path``. The paper has one; here validation texts choose one.
        iterations: Steps per penalty.
    """

    title: ClassVar[str] = "MULI: first token's log-odds, L1 logistic regression"
    is_single_pass: ClassVar[bool] = True
    shares: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 0.003)
    iterations: int = 100

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Choose the penalty on validation texts; nothing is random.

        Raises:
            SidelightError: The last token read is not the one before the answer, or the LLM's head
                is unknown; see ``FirstToken``.
        """
        reads, prompts = dataset.training.states.reads, dataset.training.states.prompts
        if reads.side != "prompt" or not all(bool(prompt.mask(reads)[-1]) for prompt in prompts):
            raise SidelightError(
                "MULI reads the state that predicts the response's first token, but these states "
                f"were read with {reads}. Read the prompt with its template: "
                "Reads(side='prompt', template=True)."
            )
        backbone = dataset.reader
        assert isinstance(backbone, TransformersBackbone)
        first = FirstToken.of(backbone)
        first.require(backbone, min(prompts, key=len))
        design = LogOddsDesign.of(first, _last_states(dataset.training))
        path = sparse_path(
            design,
            torch.from_numpy(dataset.training.labels),
            dataset.task,
            features=len(first.weight),
            shares=self.shares,
            iterations=self.iterations,
        )
        candidates = (_fitted(backbone, design, weight, bias) for weight, bias in path)
        return best_on_validation(candidates, dataset)


def _fitted(
    backbone: TransformersBackbone,
    design: LogOddsDesign,
    weight: Float[Tensor, "entry output"],
    bias: Float[Tensor, " output"],
) -> FittedBaseline:
    """The baseline, which keeps only the entries with a weight, and no copy of the LLM's head."""
    entries = weight.any(1).nonzero()[:, 0]
    raw = weight[entries] / design.scale[entries, None]
    shift = bias - design.mean[entries] @ raw

    def logits(split: Split) -> Float[np.ndarray, "text output"]:
        first = FirstToken.of(backbone)
        chunks = first.chunks(first.directions(_last_states(split)))
        return torch.cat(
            [first.log_odds(odds)[:, entries] @ raw + shift for odds in chunks]
        ).numpy()

    return FittedBaseline(logits, raw.numel() + shift.numel())


def _last_states(split: Split) -> Float[Tensor, "text width"]:
    _, lasts = pooled_states(split)
    return lasts[:, -1]
