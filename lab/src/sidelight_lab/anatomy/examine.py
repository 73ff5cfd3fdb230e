"""What a probe uses on each text, and on the texts of a class.

The anatomy of a probe: what it uses, and what it can do without, on labelled texts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.mechanisms.base import Mechanism
from sidelight.probe import Probe
from sidelight.progress import progress
from sidelight.ragged import Ragged
from sidelight.training.dataset import Split
from sidelight.training.objective import validation_score
from sidelight.types import Task
from sidelight_lab.anatomy.attribution import (
    FIRST,
    OPENING,
    Piece,
    contributions,
    grouped,
    layer_weights,
    read_pieces,
    token_weights,
    true_targets,
    without_layers,
    without_tokens,
)


@dataclass(frozen=True)
class Use:
    """What a probe uses; per text, or the mean over texts.

    Attributes:
        layer_weights: The layer stage's weights; NaN for a mechanism without one.
        layer_shares: Each layer's share of the absolute contributions.
        layer_effects: Each layer's contribution, in logits; see ``contributions``.
        token_weights: The token stage's, by kind of token (``GROUPS``); NaN without them.
        token_shares: By kind of token, of the absolute contributions of all tokens and layers.
        tokens: By kind, the share of the tokens: what weighing all tokens alike would give.
    """

    layer_weights: Float[np.ndarray, "*text layer"]
    layer_shares: Float[np.ndarray, "*text layer"]
    layer_effects: Float[np.ndarray, "*text layer"]
    token_weights: Float[np.ndarray, "*text group layer"]
    token_shares: Float[np.ndarray, "*text group"]
    tokens: Float[np.ndarray, "*text group"]

    @staticmethod
    def pack(parts: "list[Use]") -> "Use":
        """All texts of all parts, in order."""
        names = [field.name for field in fields(Use)]
        return Use(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})

    def mean(self, chosen: Bool[np.ndarray, " text"]) -> "Use":
        """Over these texts."""
        return Use(**{f.name: getattr(self, f.name)[chosen].mean(0) for f in fields(Use)})


def use_of(
    mechanism: Mechanism,
    piece: Piece,
    parts: Float[Tensor, "token layer"],
    weights: Float[Tensor, "token layer"] | None,
) -> Use:
    """Per text.

    Args:
        mechanism: In evaluation mode.
        piece: The texts.
        parts: Contributions of its tokens.
        weights: Of the token stage.
    """
    lengths, groups = piece.tokens.lengths, grouped(piece.marks).float()

    def by_group(amounts: Float[Tensor, "token layer"]) -> Float[Tensor, "text group layer"]:
        return Ragged(groups[:, :, None] * amounts[:, None], lengths).sums()

    effects = Ragged(parts, lengths).sums()
    own = layer_weights(mechanism, piece.tokens)
    missing = torch.full_like(parts, torch.nan)
    return Use(
        layer_weights=array(missing[: len(lengths)] if own is None else own),
        layer_shares=array(_shares(effects)),
        layer_effects=array(effects),
        token_weights=array(by_group(missing if weights is None else weights)),
        token_shares=array(_shares(by_group(parts.abs()).sum(2))),
        tokens=array(_shares(Ragged(groups, lengths).sums())),
    )


def members(
    task: Task, labels: Int[np.ndarray, "text ..."]
) -> dict[str, Bool[np.ndarray, " text"]]:
    """The texts of each true class that has any; a multi-label text may be in several."""
    if task.kind == "multilabel":
        held = {name: labels[:, i] == 1 for i, name in enumerate(task.labels)}
        held["(none)"] = ~labels.any(1)
    else:
        held = {name: labels == i for i, name in enumerate(task.labels)}
    return {name: own for name, own in held.items() if own.any()}


def array(values: Tensor) -> Float[np.ndarray, "..."]:
    """In float64, on the CPU."""
    return values.detach().double().cpu().numpy()


def _shares(amounts: Float[Tensor, "text part"]) -> Float[Tensor, "text part"]:
    """Of the absolute sum; zeros where all are zero."""
    sizes = amounts.abs()
    return sizes / sizes.sum(1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)


@dataclass(frozen=True)
class HeatMap:
    """Where a probe looks in one text.

    Attributes:
        label: Its true class.
        token_ids: The tokens that are read.
        weights: The token stage's; without one, shares of the absolute contributions.
        is_weighted: Whether they are the token stage's.
    """

    label: str
    token_ids: tuple[int, ...]
    weights: Float[np.ndarray, "token layer"]
    is_weighted: bool


@dataclass(frozen=True)
class Anatomy:
    """What a probe uses, and what it can do without.

    Attributes:
        probe: The probe.
        texts: Of each true class, how many it was examined on.
        score: ``validation_score`` on all texts, as every score here.
        use: For each true class the mean over its texts.
        layers: For each of ``layer_views`` the score by layer.
        tokens: For each of ``token_views`` the score.
        opening: Share of texts whose first read token opens the whole input.
        error: Largest error of the contributions' sum, in logits.
        heat_maps: Of the first texts of each class.
    """

    probe: Probe
    texts: Mapping[str, int]
    score: float
    use: Mapping[str, Use]
    layers: Mapping[str, Float[np.ndarray, " layer"]]
    tokens: Mapping[str, float]
    opening: float
    error: float
    heat_maps: tuple[HeatMap, ...]


def examine(
    probe: Probe, split: Split, *, device: torch.device | str = "cpu", heat_maps: int = 2
) -> Anatomy:
    """Examines a probe on cached states; the backbone does not run.

    Args:
        probe: Of the split's backbone and task.
        split: Texts that it was not trained on.
        device: Where to compute.
        heat_maps: Texts of each class to keep token weights of.

    Raises:
        SidelightError: All texts are of one class, so that nothing can be scored.
    """
    classes = members(split.task, split.labels)
    if len(classes) < 2:
        raise SidelightError(
            f"All {len(split)} texts are of class '{next(iter(classes), None)}', but an anatomy "
            "compares classes. Give texts of two or more with --data."
        )
    shown = {
        i: name for name, own in classes.items() for i in np.flatnonzero(own)[:heat_maps].tolist()
    }
    mechanism = probe.mechanism.to(device).eval()
    findings: list[_Findings] = []
    with progress(f"Examining {probe.spec.name}", len(split), unit="texts") as done:
        for piece in read_pieces(probe, split, device=device):
            findings.append(_find(mechanism, piece, split, shown))
            done.advance(len(piece.texts))
    return _summarise(probe, split, findings)


@dataclass(frozen=True)
class _Findings:
    """Of one piece: its texts, what is used on each, and their logits in each view."""

    texts: Int[np.ndarray, " text"]
    use: Use
    whole: Float[np.ndarray, "text output"]
    layers: Mapping[str, Float[np.ndarray, "view text output"]]
    tokens: Mapping[str, Float[np.ndarray, "text output"]]
    openings: int
    error: float
    heat_maps: tuple[HeatMap, ...]


def _find(mechanism: Mechanism, piece: Piece, split: Split, shown: Mapping[int, str]) -> _Findings:
    tokens, texts = piece.tokens, piece.texts.numpy()
    targets = true_targets(split.task, split.labels[texts]).to(tokens.values.device)
    parts = contributions(mechanism, tokens, targets)
    weights = token_weights(mechanism, tokens)
    with torch.no_grad():
        whole = mechanism.finish(mechanism.summarise(tokens))
        at_mean = Ragged(torch.zeros_like(tokens.values), tokens.lengths)
        moved = ((whole - mechanism.finish(mechanism.summarise(at_mean))) * targets).sum(1)
    return _Findings(
        texts=texts,
        use=use_of(mechanism, piece, parts, weights),
        whole=array(whole),
        layers={view: array(own) for view, own in without_layers(mechanism, tokens).items()},
        tokens={view: array(own) for view, own in without_tokens(mechanism, piece).items()},
        openings=int((piece.marks[:, FIRST] & piece.marks[:, OPENING]).sum()),
        error=float((Ragged(parts.sum(1), tokens.lengths).sums() - moved).abs().max()),
        heat_maps=tuple(_heat_maps(piece, split, shown, parts, weights)),
    )


def _heat_maps(
    piece: Piece,
    split: Split,
    shown: Mapping[int, str],
    parts: Float[Tensor, "token layer"],
    weights: Float[Tensor, "token layer"] | None,
) -> Iterator[HeatMap]:
    amounts = (parts.abs() if weights is None else weights).split(piece.tokens.lengths.tolist())
    for text, own in zip(piece.texts.tolist(), amounts, strict=True):
        if text in shown:
            prompt = split.prompts[text]
            read = prompt.mask(split.states.reads).nonzero()[:, 0].tolist()
            ids = tuple(prompt.token_ids[i] for i in read)
            total = own.sum().clamp(min=1e-30) if weights is None else 1.0
            yield HeatMap(shown[text], ids, array(own / total), weights is not None)


def _summarise(probe: Probe, split: Split, findings: list[_Findings]) -> Anatomy:
    labels = split.labels[np.concatenate([own.texts for own in findings])]
    use = Use.pack([own.use for own in findings])
    classes = members(split.task, labels)

    def score(logits: Float[np.ndarray, "text output"]) -> float:
        return validation_score(split.task, logits, labels)

    views = findings[0]
    return Anatomy(
        probe=probe,
        texts={name: int(own.sum()) for name, own in classes.items()},
        score=score(np.concatenate([own.whole for own in findings])),
        use={name: use.mean(own) for name, own in classes.items()},
        layers={
            view: np.array(
                list(map(score, np.concatenate([own.layers[view] for own in findings], 1)))
            )
            for view in views.layers
        },
        tokens={
            view: score(np.concatenate([own.tokens[view] for own in findings]))
            for view in views.tokens
        },
        opening=sum(own.openings for own in findings) / len(split),
        error=max(own.error for own in findings),
        heat_maps=tuple(one for own in findings for one in own.heat_maps),
    )
