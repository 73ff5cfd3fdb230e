"""MULI: sparse logistic regression on the log-odds of the response's first token."""

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

# In float32, smaller values of 1 - p are indistinguishable from zero. Caps log-odds at 16.
_ROOM = 1e-7


@dataclass(frozen=True, eq=False)
class FirstToken:
    """Float32 copy of the LLM's final norm and language-model head; too large to keep."""

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
        """Check these logits against the backbone's logits after a prompt.

        Raises:
            SidelightError: The backbone's logits are not a linear head on a single final norm.
        """
        captured: list[Tensor] = []

        def keep_last(layer: int, hidden: Float[Tensor, "batch token width"]) -> None:
            if layer == backbone.fingerprint.layers - 1:
                captured.append(hidden[:, -1].float().cpu())

        ids = torch.tensor([prompt.token_ids], device=backbone.device)
        with backbone.tapped(keep_last), torch.no_grad():
            theirs = backbone.model(input_ids=ids, use_cache=False).logits[:, -1].float().cpu()
        error = (self.logits(self.directions(captured[0])) - theirs).abs().max()
        # The model rounds its logits to its dtype.
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
        """Inputs of the head, from the last block's output at the last token of each prompt."""
        return self.norm(states)

    def logits(self, directions: Float[Tensor, "text width"]) -> Float[Tensor, "text entry"]:
        """Logits of the response's first token."""
        return torch.addmm(self.bias, directions, self.weight.T)

    def log_odds(self, directions: Float[Tensor, "text width"]) -> Float[Tensor, "text entry"]:
        """Log-odds log p - log(1 - p) of each entry; see ``chunks``."""
        log_chance = self.logits(directions).log_softmax(1).clamp(max=-_ROOM)
        return log_chance - torch.log(-torch.expm1(log_chance))

    def chunks(self, directions: Float[Tensor, "text width"]) -> tuple[Tensor, ...]:
        """Chunks of texts whose log-odds take at most 64 MiB."""
        return directions.split(max(1, 2**24 // len(self.weight)))


def _final_norm(backbone: TransformersBackbone) -> nn.Module:
    """The only module outside the blocks whose parameters all have the size of a state."""
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


# For less likely entries, log(1 - p) is taken as 0: an error of 0.001, far below bf16 rounding.
_LIKELY = 1e-3


@dataclass(frozen=True, eq=False)
class LogOddsDesign:
    """Product with the standardised log-odds of many texts, without materialising their matrix.

    The matrix would take 3 GB for 16,000 texts and 49,152 entries. Log-odds are
    logit - log sum exp(logits) - log(1 - p), whose terms are low-rank, rank-one and sparse.

    Attributes:
        first: Final norm and head.
        directions: Input of the head for each text.
        normaliser: Log sum exp of the logits of each text.
        likely: Sparse log(1 - p).
        mean: Mean log-odds of each entry over the texts.
        scale: Standard deviation of the log-odds of each entry; 1 where they are constant.
    """

    first: FirstToken
    directions: Float[Tensor, "text width"]
    normaliser: Float[Tensor, "text 1"]
    likely: Float[Tensor, "text entry"]
    mean: Float[Tensor, " entry"]
    scale: Float[Tensor, " entry"]

    @staticmethod
    def of(first: FirstToken, states: Float[Tensor, "text width"]) -> "LogOddsDesign":
        """Build the design from the last block's output at the last token of each text."""
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
        """Multiply the standardised log-odds by weights."""
        raw = weight / self.scale[:, None]
        # The order matters: multiplying the transposed head by a matrix takes ten times as long.
        low_rank = self.directions @ (raw.T @ self.first.weight).T
        rank_one = self.normaliser * raw.sum(0) + (self.mean - self.first.bias) @ raw
        return low_rank - rank_one - torch.sparse.mm(self.likely, raw)


@dataclass(frozen=True)
class Muli(Baseline):
    """Moderation using LLM introspection (Hu et al., NeurIPS 2024, arXiv 2405.18822).

    The features are log p - log(1 - p) of every vocabulary entry after the prompt, standardised on
    the training texts. The logistic regression has an L1 penalty, classes weighted by inverse
    frequency, and a softmax for more than two classes.

    Attributes:
        shares: Penalties; see ``sparse_path``. The paper has a single one; here, one is chosen on
            the validation texts.
        iterations: Steps per penalty.
    """

    title: ClassVar[str] = "MULI: first token's log-odds, L1 logistic regression"
    is_single_pass: ClassVar[bool] = True
    shares: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 0.003)
    iterations: int = 100

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Choose the penalty on the validation texts; deterministic.

        Raises:
            SidelightError: The last token read is not the one before the response, or the LLM's
                head is not supported; see ``FirstToken``.
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
    """Baseline that keeps only the entries with a nonzero weight, and no copy of the LLM's head."""
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
