"""What the LLM would say first: log-odds of every vocabulary entry after the prompt.

Standardised log-odds of many texts as a matrix that never exists: 16,000 x 49,152 are 3 GB.

MULI: a sparse logistic regression on the log-odds of the answer's first token.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sidelight.backbone import TransformersBackbone
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.training.objective import validation_score
from sidelight_lab.baselines.base import Baseline, FittedBaseline
from sidelight_lab.baselines.linear import Linear, Scaling
from sidelight_lab.baselines.siren import Sparse, sparse_path

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


# log(1 - p) of a less likely entry is taken as 0: an error of .001, far below bf16's rounding.
_LIKELY = 1e-3


@dataclass(frozen=True, eq=False)
class LogOddsDesign:
    """Log-odds are logit - log sum exp(logits) - log(1 - p): low rank, rank one, and sparse.

    Attributes:
        first: Final norm and head.
        directions: Of the texts; see ``FirstToken``.
        normaliser: log sum exp of each text's logits.
        likely: log(1 - p), sparse.
        scaling: Of the log-odds.
    """

    first: FirstToken
    directions: Float[Tensor, "text width"]
    normaliser: Float[Tensor, "text 1"]
    likely: Float[Tensor, "text entry"]
    scaling: Scaling

    @staticmethod
    def of(first: FirstToken, states: Float[Tensor, "text width"]) -> "LogOddsDesign":
        """Reads the texts once, a few hundred at a time.

        Args:
            first: Final norm and head.
            states: Of each text's last token, after the last block.
        """
        directions = first.directions(states)
        entries = len(first.weight)
        sums, squares = torch.zeros(2, entries, dtype=torch.float64)
        normalisers: list[Tensor] = []
        likely: list[Tensor] = []
        for chunk in directions.chunk(text_chunks(len(states), entries)):
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
            Scaling(mean.float(), torch.where(scale > 1e-6, scale, 1.0).float()),
        )

    def __call__(self, weight: Float[Tensor, "entry output"]) -> Float[Tensor, "text output"]:
        """Standardised log-odds times weights."""
        raw = weight / self.scaling.scale[:, None]
        # In this order: the transposed head times a matrix takes ten times as long.
        low_rank = self.directions @ (raw.T @ self.first.weight).T
        rank_one = self.normaliser * raw.sum(0) + (self.scaling.mean - self.first.bias) @ raw
        return low_rank - rank_one - torch.sparse.mm(self.likely, raw)


@dataclass(frozen=True)
class Muli(Baseline):
    """Moderation using LLM introspection (Hu et al., NeurIPS 2024, arXiv 2405.18822).

    Every vocabulary entry's log p - log(1 - p) after the prompt, standardised on training texts;
    L1 penalty, classes weighted by inverse frequency; softmax for more than two classes.

    Attributes:
        shares: Penalties; see ``sparse_path``. The paper has one; here validation texts choose.
        iterations: Steps per penalty.
    """

    title: ClassVar[str] = "MULI: first token's log-odds, L1 logistic regression"
    is_single_pass: ClassVar[bool] = True
    shares: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 0.003)
    iterations: int = 100

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Chooses the penalty on validation texts; nothing is random.

        Raises:
            SidelightError: The last token read is not the one before the answer, or the LLM's head
                is unknown; see ``FirstToken``.
        """
        _require_first_token(dataset.training)
        shortest = min(dataset.training.prompts, key=len)
        first = FirstToken.of(dataset.backbone, shortest)
        design = LogOddsDesign.of(first, _last_states(dataset.training))
        candidates = [
            _Fitted.of(dataset.backbone, sparse, design.scaling)
            for sparse in sparse_path(
                design,
                torch.from_numpy(dataset.training.labels),
                dataset.task,
                features=len(first.weight),
                shares=self.shares,
                iterations=self.iterations,
            )
        ]
        validation = dataset.validation
        return max(
            candidates,
            key=lambda each: validation_score(
                dataset.task, each.logits(validation), validation.labels
            ),
        )


@dataclass(frozen=True)
class _Fitted(FittedBaseline):
    """Holds the entries with a weight only, and no copy of the LLM's head."""

    backbone: TransformersBackbone
    entries: Int[Tensor, " kept"]
    linear: Linear

    @staticmethod
    def of(backbone: TransformersBackbone, sparse: Sparse, scaling: Scaling) -> "_Fitted":
        entries = sparse.weight.any(1).nonzero()[:, 0]
        kept = Scaling(scaling.mean[entries], scaling.scale[entries])
        linear = Linear.folded(sparse.weight[entries], sparse.bias, kept)
        return _Fitted(linear.parameters, backbone, entries, linear)

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        return torch.cat([self.linear(odds) for odds in self._odds(split)]).numpy()

    def _odds(self, split: Split) -> Iterator[Float[Tensor, "text kept"]]:
        first = FirstToken.unchecked(self.backbone)
        directions = first.directions(_last_states(split))
        for chunk in directions.chunk(text_chunks(len(directions), len(first.weight))):
            yield first.log_odds(chunk)[:, self.entries]


def _last_states(split: Split) -> Float[Tensor, "text width"]:
    return split.pooled.lasts[:, -1]


def _require_first_token(split: Split) -> None:
    reads = split.states.reads
    if reads.includes_response or not all(bool(prompt.mask(reads)[-1]) for prompt in split.prompts):
        raise SidelightError(
            f"MULI reads the state that the answer's first token comes from, but these states are "
            f"of {reads}. Read the prompt with its template: Reads(side='prompt', template=True)."
        )
