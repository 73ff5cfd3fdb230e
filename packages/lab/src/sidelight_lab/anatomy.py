"""Layer and token attributions of a trained probe, and its score when some are ablated.

``examine`` runs the backbone over labelled texts and analyses the probe's projections, without
training. ``write_anatomy`` writes a table, a figure and JSON.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from sidelight.classifier import Classifier
from sidelight.data.examples import LabelledExamples
from sidelight.data.plots import save_figure
from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt, Reads, TokenRole
from sidelight.probes.bank import Bank
from sidelight.probes.ragged import Ragged, by_length
from sidelight.progress import progress
from sidelight.scoring import encode
from sidelight.storage import write_json, write_text
from sidelight.training.optimisation import validation_score
from sidelight.types import Task
from sidelight_lab.search import score_name

# A token belongs to the first of these groups that applies.
GROUPS = ("first", "last", "template", "content")
# Number of layers that the report names for each class.
_NAMED_LAYERS = 3
# Tolerated loss of score when only the deepest layers are read.
_NEGLIGIBLE = 0.01
_DRAWN_CLASSES = 6
_NO_LABEL = "(none)"
_ABLATIONS = {"drop": "all but this layer", "only": "this layer only", "from": "from this layer on"}


@dataclass(frozen=True)
class Use:
    """Mean attributions of a probe on the texts of a class.

    Attributes:
        texts: Number of texts.
        layer_shares: Each layer's share of the absolute contributions to the logit.
        layer_effects: Each layer's contribution, in logits.
        token_shares: Share of the absolute contributions by token group, in the order of
            ``GROUPS``.
        tokens: Share of the tokens by group, which uniform weights would give.
    """

    texts: int
    layer_shares: list[float]
    layer_effects: list[float]
    token_shares: list[float]
    tokens: list[float]


@dataclass(frozen=True)
class Anatomy:
    """Attributions and ablations of a probe, as stored in ``anatomy.json``.

    Attributes:
        probe: Name of the probe.
        mechanism: Name of its mechanism.
        options: Options of the mechanism.
        metric: Name of the metric of every score, computed by ``validation_score``.
        score: Score on all texts.
        token_groups: ``GROUPS``.
        use: Attributions by true class.
        layer_ablation: Scores by layer for each of ``_ABLATIONS``.
        token_ablation: Scores without some of the tokens; see ``token_masks``.
    """

    probe: str
    mechanism: str
    options: Mapping[str, Any]
    metric: str
    score: float
    token_groups: tuple[str, ...]
    use: Mapping[str, Use]
    layer_ablation: Mapping[str, list[float]]
    token_ablation: Mapping[str, float]


def examine(classifier: Classifier, examples: LabelledExamples) -> Anatomy:
    """Examine a probe on texts that it was not trained on.

    Contributions come from ``Mechanism.shares``. An ablated layer is set to its training mean, and
    an ablated token is not read.

    Raises:
        SidelightError: All texts are of one class, so there is no score.
    """
    task, mechanism = examples.task, classifier.probe.mechanism
    members = _members(examples)
    if len(members) < 2:
        raise SidelightError(
            f"All {len(examples)} texts are of class '{next(iter(members), None)}', but "
            "`anatomy` compares classes. Give texts of two or more classes with --data."
        )
    prompts = encode(classifier.backbone.encoder, examples.items)
    targets = true_targets(task, examples.labels)
    logits: dict[str, np.ndarray] = {}
    shares: list[np.ndarray] = [np.empty(0)] * len(examples)
    groups = [token_groups(prompt, classifier.probe.reads) for prompt in prompts]
    with progress("Examining", len(examples), unit="texts") as advance:
        for rows, tokens in read_projections(classifier, prompts):
            placed = targets[rows].to(tokens.values.device)
            values = mechanism.shares(tokens, placed).values.double().cpu()
            for row, row_shares in zip(rows, values.split(tokens.lengths.tolist()), strict=True):
                shares[row] = row_shares.numpy()
            group_masks = torch.cat([groups[row] for row in rows]).to(tokens.values.device)
            for ablation, ablated_tokens in ablated(tokens, group_masks).items():
                with torch.no_grad():
                    found = mechanism.logits(ablated_tokens).double().cpu().numpy()
                logits.setdefault(ablation, np.empty((len(examples), task.outputs)))[rows] = found
            advance(len(rows))
    scores = {
        ablation: validation_score(task, ablated_logits, examples.labels)
        for ablation, ablated_logits in logits.items()
    }
    layers, probe = range(classifier.backbone.fingerprint.layers), classifier.probe
    return Anatomy(
        probe.name,
        probe.card.mechanism.name,
        dict(probe.card.mechanism.options),
        score_name(task),
        scores["everything"],
        GROUPS,
        {
            name: _use(
                [shares[row] for row in rows_of_label],
                [groups[row].numpy() for row in rows_of_label],
            )
            for name, rows_of_label in members.items()
        },
        {ablation: [scores[f"{ablation} {layer}"] for layer in layers] for ablation in _ABLATIONS},
        {ablation: scores[ablation] for ablation in token_masks(groups[0])},
    )


def read_projections(
    classifier: Classifier, prompts: Sequence[EncodedPrompt]
) -> Iterator[tuple[list[int], Ragged]]:
    """Yield batches of the probe's projections of the tokens that it reads.

    A batch is the row numbers of its texts and their projections ``[token, layer, projection]``.
    Projections have no constant term, so zeros represent a layer at its training mean (or at zero
    for a probe that reads raw states).
    """
    backbone, reads = classifier.backbone, classifier.probe.reads
    bank = Bank([classifier.probe], device=backbone.device)
    tap = bank.tap()
    for rows in by_length([len(prompt) for prompt in prompts]):
        with backbone.tapped(tap):
            backbone.run([prompts[row] for row in rows])
        masks = [prompts[row].mask(reads).to(backbone.device) for row in rows]
        texts = zip(tap.projected(), masks, strict=True)
        columns = [text[: len(mask)][mask] for text, mask in texts]
        lengths = torch.tensor([len(text) for text in columns], device=backbone.device)
        yield list(rows), Ragged(torch.cat(columns), lengths)


def token_groups(prompt: EncodedPrompt, reads: Reads) -> Bool[Tensor, "token group"]:
    """Return the one-hot group of each token that a probe reads, in the order of ``GROUPS``."""
    places = prompt.mask(reads).nonzero()[:, 0].tolist()
    outside = Reads().token_roles - {TokenRole.PROMPT}
    names = [
        "first"
        if order == 0
        else "last"
        if order == len(places) - 1
        else "template"
        if prompt.token_roles[place] in outside
        else "content"
        for order, place in enumerate(places)
    ]
    return torch.tensor([[name == group for group in GROUPS] for name in names])


def token_masks(groups: Bool[Tensor, "token group"]) -> dict[str, Bool[Tensor, " token"]]:
    """Return a mask of the remaining tokens for each ablation."""
    first, last, template, content = groups.unbind(1)
    return {
        "without template tokens": ~template,
        "without content": ~content,
        "without the first token": ~first,
        "without the last token": ~last,
        "the last token only": last,
    }


def ablated(tokens: Ragged, groups: Bool[Tensor, "token group"]) -> dict[str, Ragged]:
    """Return the projections by ablation, and unchanged as ``everything``.

    A text without remaining tokens gets one mean token.
    """
    layers = tokens.values.shape[1]
    one = torch.eye(layers, dtype=torch.bool, device=tokens.values.device)
    layer_masks = {"drop": ~one, "only": one, "from": torch.ones_like(one).triu()}
    return {
        "everything": tokens,
        **{
            f"{ablation} {layer}": Ragged(
                tokens.values * layer_masks[ablation][layer][:, None], tokens.lengths
            )
            for ablation in _ABLATIONS
            for layer in range(layers)
        },
        **{ablation: _only(tokens, mask) for ablation, mask in token_masks(groups).items()},
    }


def _only(tokens: Ragged, is_included: Bool[Tensor, " token"]) -> Ragged:
    is_empty = Ragged(is_included.float(), tokens.lengths).sums() == 0
    stand_ins = (tokens.lengths.cumsum(0) - 1)[is_empty]
    values, is_included = tokens.values.clone(), is_included.clone()
    values[stand_ins], is_included[stand_ins] = 0.0, True
    return Ragged(values[is_included], Ragged(is_included.float(), tokens.lengths).sums().long())


def true_targets(task: Task, labels: Int[np.ndarray, "text ..."]) -> Float[Tensor, "text output"]:
    """Return each text's weights of the logits whose sum is attributed to tokens and layers.

    For a binary task, this is the logit. For a multi-class task, it is the logit of the true class
    minus the mean of all logits, because a common shift changes no verdict. For a multi-label task,
    it is the mean logit of the text's labels, or of all labels if the text has none.
    """
    if task.kind == "binary":
        return torch.ones(len(labels), 1)
    if task.kind == "multiclass":
        return torch.eye(task.outputs)[torch.from_numpy(labels)] - 1 / task.outputs
    targets = torch.from_numpy(labels).float()
    targets = torch.where(targets.any(1, keepdim=True), targets, 1.0)
    return targets / targets.sum(1, keepdim=True)


def _members(examples: LabelledExamples) -> dict[str, list[int]]:
    """Return the rows of each non-empty true class; a multi-label text may be in several."""
    names = [labels or [_NO_LABEL] for labels in examples.label_names()]
    members = {
        name: [row for row, labels in enumerate(names) if name in labels]
        for name in (*examples.task.labels, _NO_LABEL)
    }
    return {name: rows for name, rows in members.items() if rows}


def _use(shares: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> Use:
    """Average shares ``[token, layer]`` and groups ``[token, group]`` over texts."""
    by_layer = np.stack([share.sum(0) for share in shares])
    by_group = np.stack(
        [abs(share).sum(1) @ is_member for share, is_member in zip(shares, groups, strict=True)]
    )
    return Use(
        len(shares),
        layer_shares=_proportions(abs(by_layer)).mean(0).tolist(),
        layer_effects=by_layer.mean(0).tolist(),
        token_shares=_proportions(by_group).mean(0).tolist(),
        tokens=np.mean([is_member.mean(0) for is_member in groups], 0).tolist(),
    )


def _proportions(values: Float[np.ndarray, "text part"]) -> Float[np.ndarray, "text part"]:
    return values / values.sum(1, keepdims=True).clip(1e-30)


def write_anatomy(anatomy: Anatomy, directory: Path) -> list[Path]:
    """Write anatomy.json, anatomy.png and report.md, and return their paths."""
    values, picture, report = (directory / n for n in ("anatomy.json", "anatomy.png", "report.md"))
    write_json(values, asdict(anatomy))
    write_text(report, _to_markdown(anatomy))
    save_figure(_draw(anatomy), picture)
    return [values, picture, report]


def _to_markdown(anatomy: Anatomy) -> str:
    classes: list[list[str]] = []
    for name, use in anatomy.use.items():
        ranked = np.argsort(-np.array(use.layer_shares), kind="stable")[:_NAMED_LAYERS]
        layers = ", ".join(f"{layer} ({use.layer_shares[layer]:.0%})" for layer in ranked)
        shares = zip(use.token_shares, use.tokens, strict=True)
        tokens = [f"{share:.0%} ({of_all:.0%})" for share, of_all in shares]
        classes.append([name.replace("|", "/"), str(use.texts), layers, *tokens])
    ablations = [
        [what, f"{score:.3f}", f"{score - anatomy.score:+.3f}"]
        for what, score in _ablations(anatomy).items()
    ]
    heads = ["class", "texts", "layers by share", *GROUPS], ["what", anatomy.metric, "change"]
    tables = [
        tabulate(rows, head, "github", disable_numparse=True)
        for rows, head in zip((classes, ablations), heads, strict=True)
    ]
    return f"""# {anatomy.probe}: {anatomy.mechanism}

{anatomy.metric} {anatomy.score:.3f}. Shares are of the absolute contributions to the logit; those
of the tokens stand in brackets. *first* and *last* are one token each, which may belong to the
template; *template* is the rest of the template.

{tables[0]}

The score when some parts are left out; nothing is trained again. A layer that is left out stays at
its mean in training.

{tables[1]}
"""


def _ablations(anatomy: Anatomy) -> dict[str, float]:
    drop, only, later = (np.array(anatomy.layer_ablation[ablation]) for ablation in _ABLATIONS)
    worst, best = int(drop.argmin()), int(only.argmax())
    start = int(np.flatnonzero(later >= anatomy.score - _NEGLIGIBLE).max())
    return {
        "everything": anatomy.score,
        f"without layer {worst}, the costliest one to lose": drop[worst],
        f"layer {best} only, the best one alone": only[best],
        f"from layer {start} on, the deepest start that loses at most {_NEGLIGIBLE}": later[start],
        **anatomy.token_ablation,
    }


def _draw(anatomy: Anatomy) -> Figure:
    """Plot the layer shares of the six largest classes, and the scores of the layer ablations."""
    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    shares, scores = figure.subplots(1, 2)
    largest = sorted(anatomy.use, key=lambda name: -anatomy.use[name].texts)[:_DRAWN_CLASSES]
    for name in largest:
        # A dollar sign starts a formula in matplotlib, and a leading underscore hides a name.
        label = name.replace("$", r"\$").lstrip("_")
        shares.plot(anatomy.use[name].layer_shares, label=label, marker="o", markersize=3)
    shares.set(xlabel="Layer", ylabel="Share of contributions", ylim=(0, None))
    for ablation, label in _ABLATIONS.items():
        scores.plot(anatomy.layer_ablation[ablation], label=label, marker="o", markersize=3)
    scores.axhline(anatomy.score, color="grey", linestyle="--", label="all layers")
    scores.set(xlabel="Layer", ylabel=anatomy.metric)
    for axes in (shares, scores):
        axes.legend(frameon=False, fontsize=8)
    return figure
