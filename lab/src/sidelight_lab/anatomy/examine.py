"""The anatomy of a probe on labelled texts: what it uses, and what it can do without."""

from collections.abc import Iterator, Mapping, Sequence
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
from sidelight.training.optimisation import validation_score
from sidelight.types import Task
from sidelight_lab.anatomy.attribution import (
    FIRST,
    OPENING,
    Piece,
    contributions,
    grouped,
    layer_views,
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
        layer_weights: The layer stage's weights; NaN for a mechanism without any.
        layer_shares: Each layer's share of the absolute contributions.
        layer_effects: Each layer's contribution, in logits; see ``contributions``.
        token_weights: The token stage's weights by kind of token (``GROUPS``); NaN without any.
        token_shares: Share of the absolute contributions by kind of token.
        tokens: Share of the tokens by kind: what weighing all tokens alike would give.
    """

    layer_weights: Float[np.ndarray, "*text layer"]
    layer_shares: Float[np.ndarray, "*text layer"]
    layer_effects: Float[np.ndarray, "*text layer"]
    token_weights: Float[np.ndarray, "*text group layer"]
    token_shares: Float[np.ndarray, "*text group"]
    tokens: Float[np.ndarray, "*text group"]

    @staticmethod
    def mean(parts: "Sequence[Use]", chosen: Bool[np.ndarray, " text"]) -> "Use":
        """The mean over some of the texts of all parts."""
        names = [field.name for field in fields(Use)]
        joined = {n: np.concatenate([getattr(part, n) for part in parts]) for n in names}
        return Use(**{name: values[chosen].mean(0) for name, values in joined.items()})


@dataclass(frozen=True)
class HeatMap:
    """Where a probe looks in one text.

    Attributes:
        token_ids: The tokens that are read.
        weights: The token stage's weights; without any, shares of the absolute contributions.
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
        texts: Number of texts of each true class.
        score: ``validation_score`` on all texts, like every score here.
        use: The mean over the texts of each true class.
        layers: For each of ``layer_views`` the score by layer.
        tokens: For each of ``token_views`` the score.
        opening: Share of texts whose first read token opens the whole input.
        error: The largest error of the sum of the contributions, in logits.
        heat_maps: The first texts of each class.
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


_WHOLE = "everything"


def examine(
    probe: Probe, split: Split, *, device: torch.device | str = "cpu", heat_maps: int = 2
) -> Anatomy:
    """Examines a probe on cached states; the backbone does not run.

    Args:
        probe: Trained on the split's backbone and task.
        split: Texts that the probe was not trained on.
        device: Where to compute.
        heat_maps: Texts of each class to keep token weights of.

    Raises:
        SidelightError: All texts are of one class, so that nothing can be scored.
    """
    classes = _members(split.task, split.labels)
    if len(classes) < 2:
        raise SidelightError(
            f"All {len(split)} texts are of class '{next(iter(classes), None)}', but an anatomy "
            "compares classes. Give texts of two or more classes with --data."
        )
    shown = {
        i: name for name, own in classes.items() for i in np.flatnonzero(own)[:heat_maps].tolist()
    }
    mechanism = probe.mechanism.to(device).eval()
    texts: list[Int[np.ndarray, " text"]] = []
    uses: list[Use] = []
    # For each view ``[..., text, output]``.
    logits: dict[str, list[np.ndarray]] = {}
    maps: list[HeatMap] = []
    openings, error = 0, 0.0
    with progress(f"Examining {probe.spec.name}", len(split), unit="texts") as done:
        for piece in read_pieces(probe, split, device=device):
            tokens = piece.tokens
            targets = true_targets(split.task, split.labels[piece.texts.numpy()])
            targets = targets.to(tokens.values.device)
            parts = contributions(mechanism, tokens, targets)
            weights = token_weights(mechanism, tokens)
            with torch.no_grad():
                whole = mechanism.finish(mechanism.summarise(tokens))
                at_mean = Ragged(torch.zeros_like(tokens.values), tokens.lengths)
                moved = whole - mechanism.finish(mechanism.summarise(at_mean))
            missed = Ragged(parts.sum(1), tokens.lengths).sums() - (moved * targets).sum(1)
            error = max(error, float(missed.abs().max()))
            openings += int((piece.marks[:, FIRST] & piece.marks[:, OPENING]).sum())
            ablated = {**without_layers(mechanism, tokens), **without_tokens(mechanism, piece)}
            for view, own in {_WHOLE: whole, **ablated}.items():
                logits.setdefault(view, []).append(_array(own))
            uses.append(_use_of(mechanism, piece, parts, weights))
            maps += _heat_maps(piece, split, shown, parts, weights)
            texts.append(piece.texts.numpy())
            done.advance(len(piece.texts))
    labels = split.labels[np.concatenate(texts)]

    def score(view: str) -> Float[np.ndarray, "..."]:
        joined = np.concatenate(logits[view], axis=-2)
        each = joined.reshape(-1, *joined.shape[-2:])
        scores = [validation_score(split.task, own, labels) for own in each]
        return np.array(scores).reshape(joined.shape[:-2])

    by_layer = layer_views(probe.fingerprint.layers)
    classes = _members(split.task, labels)
    return Anatomy(
        probe=probe,
        texts={name: int(own.sum()) for name, own in classes.items()},
        score=float(score(_WHOLE)),
        use={name: Use.mean(uses, own) for name, own in classes.items()},
        layers={view: score(view) for view in by_layer},
        tokens={view: float(score(view)) for view in logits if view not in {_WHOLE, *by_layer}},
        opening=openings / len(split),
        error=error,
        heat_maps=tuple(maps),
    )


def _members(
    task: Task, labels: Int[np.ndarray, "text ..."]
) -> dict[str, Bool[np.ndarray, " text"]]:
    """The texts of each true class that has any; a multi-label text may be in several."""
    if task.kind == "multilabel":
        held = {name: labels[:, i] == 1 for i, name in enumerate(task.labels)}
        held["(none)"] = ~labels.any(1)
    else:
        held = {name: labels == i for i, name in enumerate(task.labels)}
    return {name: own for name, own in held.items() if own.any()}


def _array(values: Tensor) -> Float[np.ndarray, "..."]:
    """The values in float64, on the CPU."""
    return values.detach().double().cpu().numpy()


def _shares(amounts: Float[Tensor, "text part"]) -> Float[Tensor, "text part"]:
    """Shares of the absolute sum; zeros where all are zero."""
    sizes = amounts.abs()
    return sizes / sizes.sum(1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)


def _use_of(
    mechanism: Mechanism,
    piece: Piece,
    parts: Float[Tensor, "token layer"],
    weights: Float[Tensor, "token layer"] | None,
) -> Use:
    """What is used on each text, from its contributions and the weights of the token stage."""
    lengths, groups = piece.tokens.lengths, grouped(piece.marks).float()

    def by_group(amounts: Float[Tensor, "token layer"]) -> Float[Tensor, "text group layer"]:
        return Ragged(groups[:, :, None] * amounts[:, None], lengths).sums()

    effects = Ragged(parts, lengths).sums()
    own = layer_weights(mechanism, piece.tokens)
    missing = torch.full_like(parts, torch.nan)
    return Use(
        layer_weights=_array(missing[: len(lengths)] if own is None else own),
        layer_shares=_array(_shares(effects)),
        layer_effects=_array(effects),
        token_weights=_array(by_group(missing if weights is None else weights)),
        token_shares=_array(_shares(by_group(parts.abs()).sum(2))),
        tokens=_array(_shares(Ragged(groups, lengths).sums())),
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
            yield HeatMap(shown[text], ids, _array(own / total), weights is not None)
