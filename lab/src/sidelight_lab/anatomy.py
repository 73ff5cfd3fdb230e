"""What a trained probe uses of the backbone, its layers and tokens, and what it can do without.

``examine`` runs the backbone over labelled texts and works on the probe's columns of them; nothing
is trained. ``write_anatomy`` makes a table, a picture and JSON of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from sidelight.bank import Bank
from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError
from sidelight.plots import save_figure
from sidelight.probe import Probe
from sidelight.progress import progress
from sidelight.prompts import EncodedPrompt, Part, Reads
from sidelight.ragged import Ragged, by_length
from sidelight.storage import write_json, write_text
from sidelight.training.classifier import Classifier
from sidelight.training.judging import encode
from sidelight.training.optimisation import score_name, validation_score
from sidelight.types import Task
from sidelight_lab.plots import COLOURS, LEGEND, literal, open_frame

# A token is in the first of these that applies.
GROUPS = ("first", "last", "template", "content")
# Layers that the report names for each class.
_NAMED_LAYERS = 3
# Score that may be lost by reading the deepest layers only.
_NEGLIGIBLE = 0.01
_VIEWS = {"drop": "all but this layer", "only": "this layer only", "from": "from this layer on"}


@dataclass(frozen=True)
class Use:
    """What a probe uses on the texts of a class, on average.

    Attributes:
        texts: How many.
        layer_shares: Each layer's share of the absolute contributions to the logit.
        layer_effects: Each layer's contribution, in logits.
        token_shares: Share of the absolute contributions by ``GROUPS``.
        tokens: Share of the tokens by group: what weighing all tokens alike would give.
    """

    texts: int
    layer_shares: Float[np.ndarray, " layer"]
    layer_effects: Float[np.ndarray, " layer"]
    token_shares: Float[np.ndarray, " group"]
    tokens: Float[np.ndarray, " group"]


@dataclass(frozen=True)
class Anatomy:
    """What a probe uses, and what it can do without.

    Attributes:
        score: ``validation_score`` on all texts, like every score here.
        use: By true class.
        layers: For each of ``_VIEWS`` the score by layer.
        tokens: The score without some tokens; see ``token_views``.
    """

    probe: Probe
    score: float
    use: Mapping[str, Use]
    layers: Mapping[str, Float[np.ndarray, " layer"]]
    tokens: Mapping[str, float]


def examine(classifier: Classifier, examples: LabelledExamples) -> Anatomy:
    """Examines a probe on texts that it was not trained on.

    Contributions are ``Mechanism.shares``. A layer that is left out stays at its mean in training;
    a token that is left out is not read.

    Raises:
        SidelightError: All texts are of one class, so that nothing can be scored.
    """
    task, mechanism = examples.task, classifier.probe.mechanism
    members = _members(task, examples.labels)
    if len(members) < 2:
        raise SidelightError(
            f"All {len(examples)} texts are of class '{next(iter(members), None)}', but an anatomy "
            "compares classes. Give texts of two or more classes with --data."
        )
    prompts = encode(classifier.backbone, examples.items)
    targets = true_targets(task, examples.labels)
    logits: dict[str, np.ndarray] = {}
    shares: list[np.ndarray] = [np.empty(0)] * len(examples)
    groups = [token_groups(prompt, classifier.probe.reads) for prompt in prompts]
    with progress("Examining", len(examples), unit="texts") as shown:
        for rows, tokens in read_columns(classifier, prompts):
            placed = targets[rows].to(tokens.values.device)
            values = mechanism.shares(tokens, placed).values.double().cpu()
            for row, own in zip(rows, values.split(tokens.lengths.tolist()), strict=True):
                shares[row] = own.numpy()
            marks = torch.cat([groups[row] for row in rows]).to(tokens.values.device)
            for view, part in ablated(tokens, marks).items():
                with torch.no_grad():
                    found = mechanism.logits(part).double().cpu().numpy()
                logits.setdefault(view, np.empty((len(examples), task.outputs)))[rows] = found
            shown.advance(len(rows))
    scores = {view: validation_score(task, own, examples.labels) for view, own in logits.items()}
    layers = range(classifier.backbone.fingerprint.layers)
    return Anatomy(
        classifier.probe,
        scores["everything"],
        {
            name: _use([shares[row] for row in own], [groups[row].numpy() for row in own])
            for name, own in members.items()
        },
        {view: np.array([scores[f"{view} {layer}"] for layer in layers]) for view in _VIEWS},
        {view: scores[view] for view in token_views(torch.zeros(1, len(GROUPS), dtype=torch.bool))},
    )


def read_columns(
    classifier: Classifier, prompts: Sequence[EncodedPrompt]
) -> Iterator[tuple[list[int], Ragged]]:
    """The probe's columns of the tokens that it reads, ``[token, layer, column]``, by batches.

    Columns have no constant term, so zeros stand for a layer at its mean in training (at zero for
    a probe that reads raw states).
    """
    backbone, reads = classifier.backbone, classifier.probe.reads
    tap = Bank([classifier.probe], device=backbone.device).tap()
    for rows in by_length([len(prompt) for prompt in prompts]):
        with backbone.tapped(tap):
            backbone.run([prompts[row] for row in rows])
        masks = [prompts[row].mask(reads).to(backbone.device) for row in rows]
        texts = zip(tap.projected(), masks, strict=True)
        columns = [text[: len(mask)][mask] for text, mask in texts]
        lengths = torch.tensor([len(own) for own in columns], device=backbone.device)
        yield list(rows), Ragged(torch.cat(columns), lengths)


def token_groups(prompt: EncodedPrompt, reads: Reads) -> Bool[Tensor, "token group"]:
    """Each token that a probe reads in one of ``GROUPS``."""
    places = prompt.mask(reads).nonzero()[:, 0].tolist()
    outside = Reads().parts - {Part.PROMPT}
    names = [
        "first"
        if order == 0
        else "last"
        if order == len(places) - 1
        else "template"
        if prompt.parts[place] in outside
        else "content"
        for order, place in enumerate(places)
    ]
    return torch.tensor([[name == group for group in GROUPS] for name in names])


def token_views(groups: Bool[Tensor, "token group"]) -> dict[str, Bool[Tensor, " token"]]:
    """The tokens that are kept in each ablation."""
    first, last, template, content = groups.unbind(1)
    return {
        "without template tokens": ~template,
        "without content": ~content,
        "without the first token": ~first,
        "without the last token": ~last,
        "the last token only": last,
    }


def ablated(tokens: Ragged, groups: Bool[Tensor, "token group"]) -> dict[str, Ragged]:
    """The columns with and without some layers or tokens.

    A text without any token left gets one mean token.
    """
    layers = tokens.values.shape[1]
    one = torch.eye(layers, dtype=torch.bool, device=tokens.values.device)
    kept = {"drop": ~one, "only": one, "from": torch.ones_like(one).triu()}
    return {
        "everything": tokens,
        **{
            f"{view} {layer}": Ragged(tokens.values * kept[view][layer][:, None], tokens.lengths)
            for view in _VIEWS
            for layer in range(layers)
        },
        **{view: _only(tokens, own) for view, own in token_views(groups).items()},
    }


def _only(tokens: Ragged, kept: Bool[Tensor, " token"]) -> Ragged:
    is_empty = Ragged(kept.float(), tokens.lengths).sums() == 0
    stand_ins = (tokens.lengths.cumsum(0) - 1)[is_empty]
    values, kept = tokens.values.clone(), kept.clone()
    values[stand_ins], kept[stand_ins] = 0.0, True
    return Ragged(values[kept], Ragged(kept.float(), tokens.lengths).sums().long())


def true_targets(task: Task, labels: Int[np.ndarray, "text ..."]) -> Float[Tensor, "text output"]:
    """For each text the weights of its logits whose sum is divided among tokens and layers.

    Binary: the logit. Multi-class: the logit of the true class less the mean of all, since a shift
    of all logits changes no verdict. Multi-label: the mean over the labels of the text, or over all
    labels if it has none.
    """
    if task.kind == "binary":
        return torch.ones(len(labels), 1)
    if task.kind == "multiclass":
        return torch.eye(task.outputs)[torch.from_numpy(labels)] - 1 / task.outputs
    held = torch.from_numpy(labels).float()
    held = torch.where(held.any(1, keepdim=True), held, 1.0)
    return held / held.sum(1, keepdim=True)


def _members(task: Task, labels: Int[np.ndarray, "text ..."]) -> dict[str, list[int]]:
    """The texts of each true class that has any; a multi-label text may be in several."""
    if task.kind == "multilabel":
        held = {name: labels[:, i] == 1 for i, name in enumerate(task.labels)}
        held["(none)"] = ~labels.any(1)
    else:
        held = {name: labels == i for i, name in enumerate(task.labels)}
    return {name: np.flatnonzero(own).tolist() for name, own in held.items() if own.any()}


def _use(shares: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> Use:
    """The mean over texts, of shares ``[token, layer]`` and groups ``[token, group]``."""
    pairs = list(zip(shares, groups, strict=True))
    totals = [max(abs(own).sum(), 1e-30) for own in shares]

    def mean(parts: Iterator[np.ndarray]) -> np.ndarray:
        return np.mean(list(parts), 0)

    return Use(
        texts=len(pairs),
        layer_shares=mean(abs(own.sum(0)) / max(abs(own.sum(0)).sum(), 1e-30) for own in shares),
        layer_effects=mean(own.sum(0) for own in shares),
        token_shares=mean(
            abs(own).sum(1) @ marks / total
            for (own, marks), total in zip(pairs, totals, strict=True)
        ),
        tokens=mean(marks.mean(0) for marks in groups),
    )


def write_anatomy(anatomy: Anatomy, directory: Path) -> list[Path]:
    """Writes anatomy.json, anatomy.png and report.md, and returns their paths."""
    values, picture, report = (directory / n for n in ("anatomy.json", "anatomy.png", "report.md"))
    write_json(values, _to_json(anatomy))
    write_text(report, _to_markdown(anatomy))
    _draw(anatomy, picture)
    return [values, picture, report]


def _to_json(anatomy: Anatomy) -> dict[str, Any]:
    return {
        "probe": anatomy.probe.name,
        "mechanism": anatomy.probe.spec.name,
        "options": dict(anatomy.probe.spec.options),
        "metric": score_name(anatomy.probe.task),
        "score": anatomy.score,
        "token_groups": list(GROUPS),
        "use": {
            name: {field: np.asarray(value).tolist() for field, value in vars(own).items()}
            for name, own in anatomy.use.items()
        },
        "layer_ablation": {view: own.tolist() for view, own in anatomy.layers.items()},
        "token_ablation": dict(anatomy.tokens),
    }


def _to_markdown(anatomy: Anatomy) -> str:
    metric = score_name(anatomy.probe.task)
    classes = [
        [
            name.replace("|", "/"),
            str(own.texts),
            ", ".join(
                f"{layer} ({own.layer_shares[layer]:.0%})"
                for layer in np.argsort(-own.layer_shares, kind="stable")[:_NAMED_LAYERS]
            ),
            *(
                f"{share:.0%} ({of_all:.0%})"
                for share, of_all in zip(own.token_shares, own.tokens, strict=True)
            ),
        ]
        for name, own in anatomy.use.items()
    ]
    ablations = [
        [what, f"{score:.3f}", f"{score - anatomy.score:+.3f}"]
        for what, score in _ablations(anatomy).items()
    ]
    heads = ["class", "texts", "layers by share", *GROUPS], ["what", metric, "change"]
    tables = [
        tabulate(rows, head, "github", disable_numparse=True)
        for rows, head in zip((classes, ablations), heads, strict=True)
    ]
    return f"""# {anatomy.probe.name}: {anatomy.probe.spec.name}

{metric} {anatomy.score:.3f}. Shares are shares of the absolute contributions to the logit; those
of the tokens stand in brackets. *first* and *last* are one token each, which may belong to the
template; *template* is the rest of the template.

{tables[0]}

The score when some parts are left out; nothing is trained again. A layer that is left out stays at
its mean in training.

{tables[1]}
"""


def _ablations(anatomy: Anatomy) -> dict[str, float]:
    drop, only, later = (anatomy.layers[view] for view in _VIEWS)
    worst, best = int(drop.argmin()), int(only.argmax())
    start = int(np.flatnonzero(later >= anatomy.score - _NEGLIGIBLE).max())
    return {
        "everything": anatomy.score,
        f"without layer {worst}, the costliest one to lose": drop[worst],
        f"layer {best} only, the best one alone": only[best],
        f"from layer {start} on, the deepest start that loses at most {_NEGLIGIBLE}": later[start],
        **anatomy.tokens,
    }


def _draw(anatomy: Anatomy, path: Path) -> None:
    """What is used per class, then what ablation costs; the six largest classes are drawn."""
    figure = Figure(figsize=(11.0, 7.0), layout="constrained")
    figure.suptitle(literal(f"{anatomy.probe.name}: anatomy of {anatomy.probe.spec.name}"))
    places: list[Axes] = figure.subplots(2, 2).ravel().tolist()
    layers, tokens, without_layers, without_tokens = places
    largest = sorted(anatomy.use, key=lambda name: -anatomy.use[name].texts)[: len(COLOURS)]
    height = 0.8 / len(largest)
    for number, (name, colour) in enumerate(zip(largest, COLOURS, strict=False)):
        own = anatomy.use[name]
        layers.plot(own.layer_shares, color=colour, label=literal(name), marker="o", markersize=3)
        places_of = np.arange(len(GROUPS)) + number * height
        tokens.barh(places_of, own.token_shares, height * 0.9, color=colour)
        tokens.plot(own.tokens, places_of, "|", color="#222222", markersize=14)
    layers.set(xlabel="Layer", ylabel="Share of contributions", ylim=(0, None))
    layers.legend(**LEGEND)
    tokens.set_yticks(np.arange(len(GROUPS)) + 0.4 - height / 2, GROUPS)
    tokens.set(xlabel="Share of contributions; the lines are shares of the tokens", xlim=(0, 1))
    for (view, label), colour in zip(_VIEWS.items(), COLOURS, strict=False):
        without_layers.plot(
            anatomy.layers[view], color=colour, label=label, marker="o", markersize=3
        )
    without_layers.set(xlabel="Layer", ylabel=score_name(anatomy.probe.task))
    without_layers.legend(**LEGEND)
    without_tokens.barh(list(anatomy.tokens), list(anatomy.tokens.values()), color=COLOURS[0])
    without_tokens.set(xlabel=score_name(anatomy.probe.task), xlim=(0, 1))
    without_layers.axhline(anatomy.score, color="#8a8a8a", linestyle="--")
    without_tokens.axvline(anatomy.score, color="#8a8a8a", linestyle="--")
    for axes in places:
        open_frame(axes)
    for axes in (tokens, without_tokens):
        axes.invert_yaxis()
    save_figure(figure, path)
