"""Token x layer heat maps as one page of HTML that needs nothing else."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from jaxtyping import Float

from sidelight.anatomy.examine import HeatMap
from sidelight.storage import write_text

_STYLE = (
    "body{font:13px sans-serif;color:#222;margin:2em}table{border-collapse:collapse}"
    "td,th{padding:0;font-weight:normal}td.c{min-width:12px;height:14px}"
    "th.t{font-family:monospace;text-align:right;padding-right:6px;white-space:pre}"
    "th.l{font-size:9px;color:#8a8a8a}"
)
_BLANKS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


def write_heat_maps(
    maps: Sequence[HeatMap], path: Path, *, title: str, decode: Callable[[int], str]
) -> Path:
    """Writes a page with a table per text: a row per token, a column per layer.

    Args:
        maps: What to show; the darkest cell of a table is its largest weight.
        path: The file.
        title: Heading of the page.
        decode: The text of a token id.
    """
    body = "\n".join(_section(one, decode) for one in maps)
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style>"
    page = f"<!doctype html><html><head>{head}</head><body><h1>{escape(title)}</h1>\n{body}"
    write_text(path, f"{page}</body></html>\n")
    return path


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
