"""Error analysis of a span probe: a plot over thresholds and a page of the worst texts."""

from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve

from sidelight.classifier import Classifier
from sidelight.data.examples import SpanExamples
from sidelight.data.plots import save_figure
from sidelight.data.spans import character_f1, labelled_characters
from sidelight.scoring import score_characters
from sidelight.storage import write_text
from sidelight.types import Flags, Span, Values

# Only the first labels are plotted.
_DRAWN_LABELS = 24
_NAME_LENGTH = 24
_WORST_TEXTS = 50
_KINDS = ("", "missed", "wrong", "found")
_STYLE = """body { font: 16px/1.5 sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em }
.found { background: #bfe5d3 } .missed { background: #ffd0a8 } .wrong { background: #cfe2f3 }
p { white-space: pre-wrap; border-top: 1px solid #ccc; padding-top: .5em }"""


def examine_spans(classifier: Classifier, examples: SpanExamples, directory: Path) -> list[Path]:
    """Write ``thresholds.png`` and ``worst.html``, and return their paths.

    Args:
        classifier: A span probe on its backbone.
        examples: Texts that the probe was not trained on.
        directory: Output folder; created if absent.
    """
    probe, rule = classifier.probe, classifier.probe.span_rule
    labels = examples.task.output_labels
    scores = [
        text_scores
        for _, text_scores in score_characters(classifier.backbone, probe, examples.items)
    ]
    picture = plot_thresholds(
        np.concatenate([labelled_characters(*row, labels) for row in examples.text_spans]),
        # As in the decoding of spans, the margins exclude some characters.
        np.concatenate([rule.within_margins(text_scores) for text_scores in scores]),
        labels,
        directory,
        thresholds=rule.thresholds,
        title=probe.name,
    )
    found = [rule.read(text_scores, labels) for text_scores in scores]
    page = directory / "worst.html"
    write_text(page, worst_spans_page(examples, found, title=probe.name))
    return [picture, page]


def plot_thresholds(
    actual: Bool[Flags, "character label"],
    scores: Float[Values, "character label"],
    labels: Sequence[str],
    directory: Path,
    *,
    thresholds: tuple[float, ...],
    title: str,
) -> Path:
    """Plot character-level precision, recall and F1 of spans over all thresholds.

    Args:
        actual: True labels of the characters of all texts.
        scores: Probabilities of the same characters.
        labels: Names of the labels; labels that occur on no character are not plotted.
        directory: Folder of ``thresholds.png``; created if absent.
        thresholds: The probe's thresholds, drawn as vertical lines.
        title: Title of the figure.
    """
    drawn = [label for label in range(len(labels)) if actual[:, label].any()][:_DRAWN_LABELS]
    columns = min(len(drawn), 4)
    rows = -(-len(drawn) // 4)
    size = (9.6, 2.8 * rows) if len(drawn) > 1 else (7.2, 5.4)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(_plain(title), fontsize=11)
    for place, label in enumerate(drawn, 1):
        axes = figure.add_subplot(rows, columns, place)
        precision, recall, points = precision_recall_curve(actual[:, label], scores[:, label])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        for name, values in {"precision": precision, "recall": recall, "F1": f1}.items():
            axes.plot(points, values[:-1], label=name)
        axes.axvline(thresholds[label], color="grey", linestyle=":", label="threshold")
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="threshold")
        axes.set_title(_plain(labels[label][:_NAME_LENGTH]), fontsize=9)
        if place == 1:
            axes.legend(fontsize=8)
    return save_figure(figure, directory / "thresholds.png")


def _plain(text: str) -> str:
    # A dollar sign starts a formula in matplotlib.
    return text.replace("$", r"\$")


def worst_spans_page(
    examples: SpanExamples, predicted: Sequence[Sequence[Span]], *, title: str
) -> str:
    """Return an HTML page of the texts with the lowest character F1, with annotated errors."""
    texts, labels = [text for text, _ in examples.text_spans], examples.task.output_labels
    rows = zip(examples.text_spans, predicted, strict=True)
    flags = [
        [labelled_characters(text, spans, labels) for spans in (actual, found)]
        for (text, actual), found in rows
    ]
    order = sorted(range(len(texts)), key=lambda i: character_f1(*flags[i]))[:_WORST_TEXTS]
    paragraphs: list[str] = []
    for i in order:
        holds, finds = flags[i]
        if (f1 := character_f1(holds, finds)) == 1:
            break
        html = ""
        # The kind of each character and label; each run of equal rows becomes one element.
        kinds = (holds + 2 * finds).tolist()
        for kind, run in groupby(zip(texts[i], kinds, strict=True), key=lambda pair: pair[1]):
            text = escape("".join(character for character, _ in run))
            named = [f"{_KINDS[k]}: {label}" for k, label in zip(kind, labels, strict=True) if k]
            title_of = escape(", ".join(named))
            first = _KINDS[next(filter(None, kind), 0)]
            html += f'<span class="{first}" title="{title_of}">{text}</span>' if named else text
        paragraphs.append(f"<p>{f1:.3f}, text {i + 1}\n{html}</p>")
    legend = " ".join(f'<span class="{name}">{name}</span>' for name in _KINDS[1:])
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
    heading = f"<h1>{escape(title)}: the worst {len(paragraphs)} texts</h1>\n{legend}"
    return "\n".join([f"{head}<style>{_STYLE}</style>", heading, *paragraphs, "</html>"]) + "\n"
