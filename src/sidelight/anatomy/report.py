"""Anatomies as files: pictures, heat maps, ``anatomy.json`` and a short ``report.md``."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sidelight.anatomy.examine import Anatomy
from sidelight.anatomy.heat_maps import write_heat_maps
from sidelight.anatomy.pictures import plot_anatomy
from sidelight.anatomy.tokens import GROUPS
from sidelight.storage import write_json, write_text
from sidelight.training import score_name

# Layers that the report names for each class.
_NAMED_LAYERS = 3
# Of score that may be lost by reading the deepest layers only.
_NEGLIGIBLE = 0.01


def write_anatomies(
    anatomies: Sequence[Anatomy], directory: Path, *, decode: Callable[[int], str]
) -> list[Path]:
    """Writes everything; files of the same names are replaced.

    Args:
        anatomies: Of probes with different mechanisms, or of one.
        directory: Made if absent.
        decode: The text of a token id.
    """
    written: list[Path] = []
    for one in anatomies:
        name = one.probe.spec.name
        page = directory / f"{name}_heat_maps.html"
        title = f"{one.probe.name}: where {name} looks"
        written.append(plot_anatomy(one, directory / f"{name}.png"))
        written.append(write_heat_maps(one.heat_maps, page, title=title, decode=decode))
    table, values = directory / "report.md", directory / "anatomy.json"
    write_text(table, "\n".join(map(to_markdown, anatomies)))
    write_json(values, list(map(to_json, anatomies)))
    return [*written, table, values]


def to_json(anatomy: Anatomy) -> dict[str, Any]:
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
            name: {field: _plain(values) for field, values in asdict(own).items()}
            for name, own in anatomy.use.items()
        },
        "layer_ablation": {view: own.tolist() for view, own in anatomy.layers.items()},
        "token_ablation": dict(anatomy.tokens),
        "first_token_opens_input": anatomy.opening,
        "contribution_error": anatomy.error,
    }


def to_markdown(anatomy: Anatomy) -> str:
    """One probe's part of the report."""
    metric = score_name(anatomy.probe.task)
    return f"""# {anatomy.probe.name}: {anatomy.probe.spec.name}

{sum(anatomy.texts.values())} texts, {metric} {anatomy.score:.3f}. Shares are of the absolute
contributions to the logit; in brackets the share of the tokens. *first* and *last* are one token
each, of the template where it opens or ends what is read, and *template* its other tokens.

| class | texts | layers by weight | layers by share | {" | ".join(GROUPS)} |
{"|---" * (4 + len(GROUPS))}|
{chr(10).join(_class_row(anatomy, name) for name in anatomy.texts)}

Without some parts, and without training again; a layer then stays at its mean. All tokens of the
template are left out together, a first or last one of it too.

| what | {metric} | change |
|---|---|---|
{chr(10).join(_ablation_rows(anatomy))}

The first token that is read opens the input in {anatomy.opening:.0%} of texts. Contributions
sum to the change of the logit within {anatomy.error:.1g}.
"""


def _class_row(anatomy: Anatomy, name: str) -> str:
    own = anatomy.use[name]
    pairs = zip(own.token_shares, own.tokens, strict=True)
    cells = [
        name.replace("|", "/"),
        str(anatomy.texts[name]),
        _top(own.layer_weights),
        _top(own.layer_shares),
        *(f"{share:.0%} ({tokens:.0%})" for share, tokens in pairs),
    ]
    return f"| {' | '.join(cells)} |"


def _ablation_rows(anatomy: Anatomy) -> list[str]:
    drop, only, later = (anatomy.layers[view] for view in ("drop", "only", "from"))
    worst, best = int(drop.argmin()), int(only.argmax())
    start = int(np.flatnonzero(later >= anatomy.score - _NEGLIGIBLE).max())
    scores = {
        "everything": anatomy.score,
        f"without layer {worst}, the costliest to lose": drop[worst],
        f"layer {best} only, the best one alone": only[best],
        f"from layer {start} on, the last start that loses at most {_NEGLIGIBLE}": later[start],
        **anatomy.tokens,
    }
    return [f"| {n} | {own:.3f} | {own - anatomy.score:+.3f} |" for n, own in scores.items()]


def _top(amounts: Float[np.ndarray, " layer"]) -> str:
    if np.isnan(amounts).any():
        return "-"
    chosen = np.argsort(-amounts, kind="stable")[:_NAMED_LAYERS]
    return ", ".join(f"{layer} ({amounts[layer]:.0%})" for layer in chosen)


def _plain(values: Float[np.ndarray, "..."]) -> Any:
    return None if np.isnan(values).any() else values.tolist()
