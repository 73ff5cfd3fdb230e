"""How much a probe loses by training on compressed hidden states, form by form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.data.examples import LabelledExamples, SpanExamples
from sidelight.data.spans import token_labels
from sidelight.probes.mechanisms.base import mechanism_spec
from sidelight.progress import say
from sidelight.states.cache import ActivationCache, Memory
from sidelight.states.compression import CompressedStates, Compression
from sidelight.states.extraction import extract
from sidelight.states.reader import Backbone
from sidelight.training.dataset import Split, plan_split
from sidelight.training.loop import Candidate, divergence, train_mechanisms
from sidelight.training.settings import READS, FitOptions, suggested_settings
from sidelight.training.validation import FOLDS
from sidelight_lab.bench.measurement import Record, conditions, table

SHARES = (1.0, 0.5, 0.25)
# Tokens that directions are measured on.
_SAMPLE_TOKENS = 8192
_RESAMPLES = 1000
# Samples that are computed at once: of spans, each weighs tens of thousands of tokens.
_CHUNK = 50
# Probes of spans are measured on the first of these.
_SPAN_FOLDS = 4

# Of each text (or token), in the order of the texts: its scores, its labels, and its text.
Scores = tuple[Float[np.ndarray, "row output"], Int[np.ndarray, "row output"], np.ndarray]


@dataclass(frozen=True)
class Form:
    """A form in which states are stored.

    Attributes:
        share: Share of each layer's principal directions.
        bits: 8, or 16 for coordinates that are not rounded to integers.
    """

    share: float
    bits: int

    @property
    def title(self) -> str:
        return f"{self.share:g} of the directions, {self.bits} bits"


class _Unrounded(Compression):
    """The same directions, with coordinates in float16."""

    @property
    def token_bytes(self) -> int:
        layers, _, directions = self.directions.shape
        return layers * directions * 2

    def compress(self, hidden: Float[Tensor, "layer token width"]) -> CompressedStates:
        values: list[Tensor] = []
        for layer, states in enumerate(hidden):
            x = self.moments.standardised(states.float(), layer)
            z = x @ self.directions[layer].float() / self.scales[layer]
            values.append(z.half())
        stored = torch.stack(values)
        return CompressedStates(stored, torch.ones(stored.shape[:2], dtype=torch.float16))


def compare_states(
    backbone: Backbone,
    examples: LabelledExamples,
    *,
    side: Literal["prompt", "response"],
    texts: int,
    draws: int,
    cache_root: Path,
) -> Record:
    """Train the default probe on whole states, and on each compressed form of the same states.

    Texts are shown alone. Probes of text labels are measured out of fold; probes of spans on a
    quarter of the texts. The figure is AUROC: of two classes, or the mean over classes or labels.

    Args:
        backbone: The frozen LLM.
        examples: Labelled texts.
        side: What is read: ``prompt`` or ``response``.
        texts: Texts in each draw.
        draws: Draws of texts, each trained with another seed.
        cache_root: Folder of the whole states.

    Returns:
        ``token_bytes`` and ``auroc`` of whole states, and of each form its bytes and the difference
        of its AUROC from that of whole states: the mean over draws with a 95 % interval from a
        paired bootstrap of the texts of each draw.
    """
    reads = examples.reads(replace(READS, side=side))
    options = FitOptions(reads=reads, cache_root=cache_root, keep_cache=True)
    measured: list[dict[Form | None, Scores]] = []
    sizes: dict[Form, int] = {}
    wholes: list[float] = []
    uncompressed_bytes = 0
    for draw in range(draws):
        chosen = examples.select(examples.draw(min(texts, len(examples)), seed=draw))
        split = plan_split(backbone, chosen, options)
        extract(backbone, split.states, title=f"Draw {draw + 1} of {draws}")
        hidden = {row: split.states.text(row) for row in range(len(split))}
        uncompressed_bytes = split.states.token_bytes
        candidate = _candidate(chosen, draw)
        scores_by_form: dict[Form | None, Scores] = {}
        scores_by_form[None] = _scores(split, split.states, candidate)
        for share in SHARES:
            compression = _compression(split, hidden, candidate, share)
            for bits in (8, 16):
                form = Form(share, bits)
                kind = compression
                if bits == 16:
                    kind = _Unrounded(
                        compression.moments, compression.directions, compression.scales
                    )
                states = _stored_copy(split.states, hidden, kind)
                sizes[form] = kind.token_bytes
                scores_by_form[form] = _scores(split, states, candidate)
        measured.append(scores_by_form)
        wholes.append(_point(*scores_by_form[None]))
        say(f"Draw {draw + 1} of {draws}: AUROC {wholes[-1]:.3f} on whole states.")
    results = {
        "token_bytes": uncompressed_bytes,
        "auroc": float(np.mean(wholes)),
        "forms": {
            form.title: {"token_bytes": size, **_difference(measured, form)}
            for form, size in sizes.items()
        },
    }
    where = conditions(backbone, {"texts": texts, "draws": draws})
    return Record("states", where, results, [_table(results)])


def _table(record: Mapping[str, Any]) -> str:
    rows: list[Sequence[object]] = [
        ("whole, bfloat16", f"{record['token_bytes']:,}", f"{record['auroc']:.4f}")
    ]
    for title, form in record["forms"].items():
        low, high = form["ci"]
        difference = f"{form['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
        rows.append((title, f"{form['token_bytes']:,}", difference))
    headings = ("states kept as", "bytes per token", "AUROC, then the difference (95 % CI)")
    return table("Compressed hidden states", headings, rows)


def _candidate(examples: LabelledExamples, seed: int) -> Candidate:
    name = examples.default_mechanism
    return mechanism_spec(name), replace(suggested_settings(name), seed=seed)


def _compression(
    split: Split, hidden: Mapping[int, Tensor], candidate: Candidate, share: float
) -> Compression:
    order = [row for shard in split.states.shards for row in shard]
    tokens = np.cumsum([hidden[row].shape[1] for row in order])
    sample = order[: int(np.searchsorted(tokens, _SAMPLE_TOKENS)) + 1]
    settings = candidate[1].resolved_for(len(split), split.task)
    width = hidden[order[0]].shape[2]
    # As many as `directions_of_width` keeps of a half: the two bytes of a factor count, too.
    directions = width if share == 1 else int(width * share) - 2
    return Compression.measured(
        [hidden[row] for row in sample],
        is_normalised=bool(settings.normalise),
        directions=directions,
    )


def _stored_copy(
    uncompressed: ActivationCache, hidden: Mapping[int, Tensor], compression: Compression
) -> ActivationCache:
    """The compressed states of all texts, in memory."""
    states = uncompressed.compressed(compression)
    texts = {
        states.path(row): vars(compression.compress(states_of_text))
        for row, states_of_text in sorted(hidden.items())
    }
    return states.in_memory(Memory(0, texts))


def _scores(split: Split, states: ActivationCache, candidate: Candidate) -> Scores:
    """Scores of texts, or tokens, that did not train."""
    subset = replace(split, states=states)
    if not isinstance(split.examples, SpanExamples):
        (run,) = train_mechanisms(
            [candidate],
            split=subset,
            left_out=subset.folds(FOLDS),
            shares_matmuls=True,
        )
        if run is None:
            raise divergence(*candidate)
        labels = split.labels.reshape(len(split), -1)
        if split.task.kind == "multiclass":
            labels = np.eye(split.task.outputs, dtype=np.int64)[split.labels]
        return run.logits, labels, np.arange(len(split))
    fold = split.folds(_SPAN_FOLDS)[0]
    validation = subset.select(fold)
    (run,) = train_mechanisms([candidate], split=subset, left_out=(fold,))
    if run is None:
        raise divergence(*candidate)
    names = split.task.output_labels
    pairs = zip(validation.span_examples.text_spans, validation.places, strict=True)
    labels = [token_labels(text, subset, spans, names) for (text, spans), subset in pairs]
    texts = np.repeat(np.arange(len(fold)), [*map(len, labels)])
    return np.concatenate(run.token_logits), np.concatenate(labels).astype(np.int64), texts


def weighted_auroc(
    scores: Float[np.ndarray, "row output"],
    labels: Int[np.ndarray, "row output"],
    weights: Float[np.ndarray, "sample row"],
) -> Float[np.ndarray, " sample"]:
    """The mean over outputs of which some rows have the label, and some do not.

    Args:
        scores: Of each row.
        labels: Of each row.
        weights: How often each row is counted, in each sample.
    """
    areas: list[np.ndarray] = []
    for output in range(labels.shape[1]):
        order = np.argsort(scores[:, output])
        values, has_label = scores[order, output], labels[order, output]
        # Rows of equal scores are one step of the curve.
        starts = np.flatnonzero(np.diff(values, prepend=-np.inf))
        ordered = weights[:, order]
        positive = np.add.reduceat(ordered * has_label, starts, axis=1)
        negative = np.add.reduceat(ordered * (1 - has_label), starts, axis=1)
        below = negative.cumsum(1) - negative / 2
        with np.errstate(invalid="ignore"):
            areas.append((positive * below).sum(1) / (positive.sum(1) * negative.sum(1)))
    return np.nanmean(areas, axis=0)


def _point(scores: np.ndarray, labels: np.ndarray, _: np.ndarray) -> float:
    return float(weighted_auroc(scores, labels, np.ones((1, len(scores))))[0])


def _difference(measured: Sequence[Mapping[Form | None, Scores]], form: Form) -> dict[str, Any]:
    random = np.random.default_rng(0)
    samples = np.zeros((len(measured), _RESAMPLES + 1))
    for draw, scores_by_form in enumerate(measured):
        exact, labels, texts = scores_by_form[None]
        count = int(texts.max()) + 1
        # All texts once, then resamples of them.
        weights = np.ones((_RESAMPLES + 1, count))
        weights[1:] = random.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
        for first in range(0, len(weights), _CHUNK):
            resamples = weights[first : first + _CHUNK, texts]
            samples[draw, first : first + len(resamples)] = weighted_auroc(
                scores_by_form[form][0], labels, resamples
            ) - weighted_auroc(exact, labels, resamples)
    means = samples.mean(0)
    low, high = np.nanquantile(means[1:], (0.025, 0.975))
    return {"difference": float(means[0]), "ci": [float(low), float(high)]}
