"""Anatomies as files: pictures, token by layer heat maps, ``anatomy.json`` and ``report.md``."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from sidelight.plots import save_figure
from sidelight.storage import write_json, write_text
from sidelight.training.optimisation import score_name
from sidelight_lab.anatomy.attribution import GROUPS
from sidelight_lab.anatomy.examine import Anatomy, HeatMap
from sidelight_lab.plots import COLOURS, LEGEND, literal, open_frame

# Layers that the report names for each class.
_NAMED_LAYERS = 3
# Score that may be lost by reading the deepest layers only.
_NEGLIGIBLE = 0.01


def write_anatomies(
    anatomies: Sequence[Anatomy], directory: Path, *, decode: Callable[[int], str]
) -> list[Path]:
    """Writes all files, replacing those of the same names, and returns their paths.

    Files are named after the mechanisms, so each may occur once. ``decode`` gives the text of a
    token id.
    """
    written: list[Path] = []
    for one in anatomies:
        name = one.probe.spec.name
        picture, page = directory / f"{name}.png", directory / f"{name}_heat_maps.html"
        _draw(one, picture)
        title = f"{one.probe.name}: where {name} looks"
        write_text(page, _page(one.heat_maps, title=title, decode=decode))
        written += [picture, page]
    table, values = directory / "report.md", directory / "anatomy.json"
    write_text(table, "\n".join(map(_to_markdown, anatomies)))
    write_json(values, list(map(_to_json, anatomies)))
    return [*written, table, values]


def _to_json(anatomy: Anatomy) -> dict[str, Any]:
    """All figures as JSON values; None where a mechanism has no such weights."""
    return {
        "probe": anatomy.probe.name,
        "mechanism": anatomy.probe.spec.name,
        "options": dict(anatomy.probe.spec.options),
        "texts": dict(anatomy.texts),
        "metric": score_name(anatomy.probe.task),
        "score": anatomy.score,
        "token_groups": list(GROUPS),
        "use": {
            name: {
                field: None if np.isnan(values).any() else values.tolist()
                for field, values in asdict(own).items()
            }
            for name, own in anatomy.use.items()
        },
        "layer_ablation": {view: own.tolist() for view, own in anatomy.layers.items()},
        "token_ablation": dict(anatomy.tokens),
        "first_token_opens_input": anatomy.opening,
        "contribution_error": anatomy.error,
    }


def _to_markdown(anatomy: Anatomy) -> str:
    metric = score_name(anatomy.probe.task)
    classes = tabulate(
        [_class_row(anatomy, name) for name in anatomy.texts],
        ["class", "texts", "layers by weight", "layers by share", *GROUPS],
        "github",
        disable_numparse=True,
    )
    ablations = tabulate(
        [
            (what, f"{score:.3f}", f"{score - anatomy.score:+.3f}")
            for what, score in _ablations(anatomy).items()
        ],
        ["what", metric, "change"],
        "github",
        disable_numparse=True,
    )
    return f"""# {anatomy.probe.name}: {anatomy.probe.spec.name}

{sum(anatomy.texts.values())} texts, {metric} {anatomy.score:.3f}. Shares are shares of the absolute
contributions to the logit; the share of the tokens stands in brackets. *first* and *last* are one
token each, which may belong to the template; *template* is the rest of the template.

{classes}

The score when some parts are left out; nothing is trained again. A layer that is left out stays at
its mean. All template tokens are left out together, including a first or last one.

{ablations}

The first token that is read opens the input in {anatomy.opening:.0%} of texts. Contributions
sum to the change of the logit within {anatomy.error:.1g}.
"""


def _class_row(anatomy: Anatomy, name: str) -> list[str]:
    own = anatomy.use[name]
    pairs = zip(own.token_shares, own.tokens, strict=True)
    return [
        name.replace("|", "/"),
        str(anatomy.texts[name]),
        _top(own.layer_weights),
        _top(own.layer_shares),
        *(f"{share:.0%} ({tokens:.0%})" for share, tokens in pairs),
    ]


def _ablations(anatomy: Anatomy) -> dict[str, float]:
    drop, only, later = (anatomy.layers[view] for view in ("drop", "only", "from"))
    worst, best = int(drop.argmin()), int(only.argmax())
    start = int(np.flatnonzero(later >= anatomy.score - _NEGLIGIBLE).max())
    return {
        "everything": anatomy.score,
        f"without layer {worst}, the costliest one to lose": drop[worst],
        f"layer {best} only, the best one alone": only[best],
        f"from layer {start} on, the deepest start that loses at most {_NEGLIGIBLE}": later[start],
        **anatomy.tokens,
    }


def _top(amounts: Float[np.ndarray, " layer"]) -> str:
    if np.isnan(amounts).any():
        return "-"
    chosen = np.argsort(-amounts, kind="stable")[:_NAMED_LAYERS]
    return ", ".join(f"{layer} ({amounts[layer]:.0%})" for layer in chosen)


_STYLE = (
    "body{font:13px sans-serif;color:#222;margin:2em}table{border-collapse:collapse}"
    "td,th{padding:0;font-weight:normal}td.c{min-width:12px;height:14px}"
    "th.t{font-family:monospace;text-align:right;padding-right:6px;white-space:pre}"
    "th.l{font-size:9px;color:#8a8a8a}"
)
_BLANKS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


def _page(maps: Sequence[HeatMap], *, title: str, decode: Callable[[int], str]) -> str:
    """One page of HTML with a table per text: a row per token, a column per layer.

    The darkest cell of a table is its largest weight.
    """
    body = "\n".join(_section(one, decode) for one in maps)
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style>"
    page = f"<!doctype html><html><head>{head}</head><body><h1>{escape(title)}</h1>\n{body}"
    return f"{page}</body></html>\n"


def _section(one: HeatMap, decode: Callable[[int], str]) -> str:
    what = "token-stage weights" if one.is_weighted else "shares of absolute contributions"
    layers = "".join(f"<th class='l'>{layer}</th>" for layer in range(one.weights.shape[1]))
    top = max(float(one.weights.max()), 1e-30)
    rows = "\n".join(
        f"<tr><th class='t'>{escape(decode(token).translate(_BLANKS))}</th>{_cells(own, top)}</tr>"
        for token, own in zip(one.token_ids, one.weights, strict=True)
    )
    heading = f"<h2>{escape(one.label)}: {what}, at most {top:.3f}</h2>"
    return f"{heading}<table><tr><th></th>{layers}</tr>\n{rows}</table>"


def _cells(weights: Float[np.ndarray, " layer"], top: float) -> str:
    return "".join(
        f"<td class='c' style='background:rgba(0,114,178,{weight / top:.2f})' "
        f"title='layer {layer}: {weight:.4f}'></td>"
        for layer, weight in enumerate(weights)
    )


_INK, _MUTED = "#222222", "#8a8a8a"
_DOTS: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.2}
_VIEWS = {"drop": "all but this layer", "only": "this layer only", "from": "from this layer on"}


def _draw(anatomy: Anatomy, path: Path) -> None:
    """Layers on the left, tokens on the right; what is used per class, then what ablation costs.

    The six classes with the most texts are drawn.
    """
    figure = Figure(figsize=(11.0, 9.0), layout="constrained")
    title = literal(f"{anatomy.probe.name}: anatomy of {anatomy.probe.spec.name}")
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=11, color=_INK)
    _draw_layer_use(anatomy, _axes(figure, 1), _axes(figure, 3))
    _draw_layer_ablation(anatomy, _axes(figure, 5))
    _draw_token_use(anatomy, _axes(figure, (2, 4)))
    _draw_token_ablation(anatomy, _axes(figure, 6))
    save_figure(figure, path)


def _draw_layer_use(anatomy: Anatomy, upper: Axes, lower: Axes) -> None:
    for name, colour in zip(_largest(anatomy), COLOURS, strict=False):
        own = anatomy.use[name]
        has_weights = not np.isnan(own.layer_weights).any()
        shown = own.layer_weights if has_weights else own.layer_shares
        upper.plot(shown, color=colour, label=literal(name), **_DOTS)
        upper.set(ylabel="Layer-stage weight" if has_weights else "Share of contributions")
        lower.plot(own.layer_effects, color=colour, **_DOTS)
    upper.set(ylim=(0, None), xlabel="Layer")
    upper.legend(**LEGEND)
    lower.axhline(0, color=_MUTED, linewidth=1)
    lower.set(xlabel="Layer", ylabel="Contribution, logits")


def _draw_layer_ablation(anatomy: Anatomy, axes: Axes) -> None:
    for (view, label), colour in zip(_VIEWS.items(), COLOURS, strict=False):
        axes.plot(anatomy.layers[view], color=colour, label=label, **_DOTS)
    axes.axhline(anatomy.score, color=_MUTED, linestyle="--", linewidth=1, label="all layers")
    axes.set(xlabel="Layer", ylabel=_begun(score_name(anatomy.probe.task)))
    # The legend may lie on a curve, which must not show behind its words.
    axes.legend(**{**LEGEND, "frameon": True, "framealpha": 1.0, "edgecolor": "none"})


def _draw_token_use(anatomy: Anatomy, axes: Axes) -> None:
    names = _largest(anatomy)
    height = 0.8 / len(names)
    for place, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        own = anatomy.use[name]
        at = np.arange(len(GROUPS)) + place * height
        axes.barh(at, own.token_shares, height * 0.9, color=colour, label=literal(name))
        axes.plot(own.tokens, at, "|", color=_INK, markersize=14)
    axes.plot([], [], "|", color=_INK, label="share of tokens")
    axes.set_yticks(np.arange(len(GROUPS)) + 0.4 - height / 2, GROUPS)
    axes.invert_yaxis()
    axes.set(xlabel="Share of contributions", xlim=(0, 1))
    axes.legend(**LEGEND)


def _draw_token_ablation(anatomy: Anatomy, axes: Axes) -> None:
    axes.barh(list(anatomy.tokens), list(anatomy.tokens.values()), color=COLOURS[0])
    axes.axvline(anatomy.score, color=_MUTED, linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel=_begun(score_name(anatomy.probe.task)), xlim=(0, 1))


def _largest(anatomy: Anatomy) -> list[str]:
    ranked = sorted(anatomy.texts, key=lambda name: -anatomy.texts[name])
    return [name for name in anatomy.texts if name in ranked[: len(COLOURS)]]


def _begun(text: str) -> str:
    """With a capital letter, and AUPRC left as it is."""
    return text[:1].upper() + text[1:]


def _axes(figure: Figure, place: int | tuple[int, int]) -> Axes:
    axes = figure.add_subplot(3, 2, place)
    open_frame(axes)
    return axes
