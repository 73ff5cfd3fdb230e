"""How well probes find spans, beside rivals that learn from the same texts.

Validation texts choose, calibrate and set the thresholds of every row, by the product's own code;
test texts are read once all rows are fitted.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.data.evaluation import Estimate, measure_span_resamples
from sidelight.data.examples import SpanExamples
from sidelight.data.spans import Span, SpanRule, character_scores
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.errors import SidelightError, did_you_mean
from sidelight.models.conversation import Reads
from sidelight.probes.artifact import load_probe
from sidelight.probes.card import holds_probe
from sidelight.probes.probe import Probe
from sidelight.probes.ragged import Ragged
from sidelight.probes.standardisation import normalised
from sidelight.progress import Progress
from sidelight.states.cache import ActivationCache
from sidelight.states.extraction import extract
from sidelight.states.reader import Reader
from sidelight.statistics.thresholds import F1
from sidelight.training.dataset import TokenPlaces, make_split
from sidelight.training.fit import fit
from sidelight.training.preparing import ProbeDataset
from sidelight.training.settings import FitOptions, suggested_settings
from sidelight.training.spans import calibrate_spans
from sidelight.types import Values
from sidelight_lab.baselines import spans as baselines
from sidelight_lab.baselines.spans import Scorer
from sidelight_lab.bench.measurement import Record, conditions, table
from sidelight_lab.tables.metrics import difference
from sidelight_lab.tables.runs import digest

OURS = "all layers"
# Probes of one layer, and whether that is the mean over all.
_ONE_LAYER = {"last layer": False, "mean of layers": True}
_BASELINES: dict[str, Callable[[ProbeDataset], Iterable[Scorer]]] = {
    "lexicon": baselines.lexicon,
    "window": baselines.window,
    "encoder": baselines.encoder,
}
RIVALS = (*_ONE_LAYER, *_BASELINES)
_METRICS = ("character_f1", "precision", "recall", "f1")
_COMPARED = ("character_f1", "f1")
_RESAMPLES = 1000

# Metrics of some texts and of resamples of them, over all labels and of each.
Draws = Mapping[str, Float[Values, "draw group"]]


@dataclass(frozen=True)
class Row:
    """A fitted row.

    Attributes:
        rules: How logits become spans; one for each seed.
        scorers: Give the logits; likewise.
        validation: Character F1 of validation texts, fold by fold; likewise.
        lookaheads: How many tokens each probe looks ahead; none for a baseline.
    """

    rules: Sequence[SpanRule]
    scorers: Sequence[Scorer]
    validation: Sequence[float]
    lookaheads: Sequence[int] = ()

    def measure(self, test: SpanExamples) -> list[Draws]:
        """With each seed."""
        labels = test.task.output_labels
        draws: list[Draws] = []
        for rule, score in zip(self.rules, self.scorers, strict=True):
            spans: list[list[Span]] = []
            for (text, _), tokens, logits in zip(test.text_spans, *score(test), strict=True):
                scores = character_scores(text, tokens, rule.calibration.apply(logits))
                spans.append(rule.read(scores, labels))
            draws.append(measure_span_resamples(test, spans, resamples=_RESAMPLES))
        return draws


class _OneLayer:
    """Reads the last layer's states, or the mean over layers, from those of all layers on disk."""

    def __init__(self, backbone: TransformersBackbone, root: Path, *, is_mean: bool):
        self.name, self.encoder = backbone.name, backbone.encoder
        self.device, self.max_tokens = backbone.device, backbone.max_tokens
        self.fingerprint = replace(backbone.fingerprint, layers=1)
        self.engine = "mean of layers" if is_mean else "last layer"
        self._backbone = backbone
        self._root = root
        self._is_mean = is_mean

    def states(
        self, cache: ActivationCache, rows: Sequence[int], advance: Progress
    ) -> Generator[Mapping[int, Float[Tensor, "layer _ width"]]]:
        """From a cache of the same texts, which is filled if it is not there."""
        fingerprint = self._backbone.fingerprint
        all_layers = ActivationCache(
            self._root, cache.prompts, reads=cache.reads, fingerprint=fingerprint
        )
        extract(self._backbone, all_layers)
        for row in rows:
            hidden = all_layers.text(row)
            if self._is_mean:
                # Layers differ in size by a factor of hundreds.
                hidden = torch.stack([*map(normalised, hidden)]).mean(0, keepdim=True)
            yield {row: hidden[-1:].bfloat16()}
            advance(len(cache.prompts[row]))


def compare_spans(
    backbone: TransformersBackbone,
    training: SpanExamples,
    validation: SpanExamples,
    test: SpanExamples,
    *,
    options: FitOptions,
    seeds: int,
    root: Path,
    out: Path,
    rivals: Sequence[str],
) -> Record:
    """Fit all rows, then find the spans of the test texts.

    Args:
        backbone: The frozen LLM.
        training: Texts that all rows learn from.
        validation: Texts that choose, calibrate and set thresholds.
        test: Texts that are measured.
        options: Of the probes.
        seeds: Of the probe of all layers; rivals have one.
        root: Folder of the hidden states, which stay there.
        out: Folder of the trained probes, which another run with it does not train again.
        rivals: Some of ``RIVALS``.
    """
    for rival in rivals:
        if rival not in RIVALS:
            raise SidelightError(f"Unknown rival '{rival}'.{did_you_mean(rival, RIVALS)}")
    reads = Reads(options.reads.side, template=False)
    options = replace(options, reads=reads, cache_root=root, keep_cache=True)
    rows = {OURS: _probes(backbone, training, validation, options, seeds, out)}
    learned, measured = (
        make_split(backbone, texts, options, title="Texts") for texts in (training, validation)
    )
    dataset = ProbeDataset.held_out(backbone, learned, measured)
    for rival in rivals:
        if rival in _ONE_LAYER:
            reader = _OneLayer(backbone, root, is_mean=_ONE_LAYER[rival])
            rows[rival] = _probes(reader, training, validation, options, 1, out)
        else:
            rows[rival] = _best(_BASELINES[rival](dataset), validation)
    draws = {name: row.measure(test) for name, row in rows.items()}
    counts = Counter(span.label for _, spans in test.text_spans for span in spans)
    labels = sorted(test.task.output_labels, key=lambda label: -counts[label])
    results = {name: _summary(row, draws[name], draws[OURS], test) for name, row in rows.items()}
    sizes = {"training": len(training), "validation": len(validation), "test": len(test)}
    return Record(
        "spans",
        conditions(backbone, sizes),
        {"spans": {label: counts[label] for label in labels}, "rows": results},
        _tables(results, {label: counts[label] for label in labels}),
    )


def _probes(
    reader: Reader,
    training: SpanExamples,
    validation: SpanExamples,
    options: FitOptions,
    seeds: int,
    out: Path,
) -> Row:
    """What ``sidelight train --spans`` makes with each seed; what is there is not trained again."""
    probes: list[Probe] = []
    settings = options.settings or suggested_settings("spans")
    layers = reader.engine if isinstance(reader, _OneLayer) else "all layers"
    for seed in range(seeds):
        who = {
            "texts": [(texts.content_hash, texts.spans) for texts in (training, validation)],
            "backbone": reader.fingerprint.digest,
            "settings": repr((settings, options.max_tokens)),
        }
        name = f"{layers.replace(' ', '-')}-{seed}"
        folder = out / "probes" / f"{name}-{digest(who)[:12]}"
        if not holds_probe(folder):
            fit(
                reader,
                training,
                validation,
                name=name,
                options=replace(options, settings=replace(settings, seed=seed)),
                out=folder,
            )
        probes.append(load_probe(folder))
    return Row(
        [probe.spans for probe in probes if probe.spans is not None],
        [partial(_token_logits, reader, options, probe) for probe in probes],
        [_found(probe) for probe in probes],
        [probe.mechanism.lookahead for probe in probes],
    )


def _found(probe: Probe) -> float:
    """The character F1 of the spans of left-out texts; 0 where it is undefined."""
    spans = probe.card.training.spans
    return 0.0 if spans is None else spans.metrics["character_f1"].value or 0.0


@torch.inference_mode()
def _token_logits(
    reader: Reader,
    options: FitOptions,
    probe: Probe,
    examples: SpanExamples,
) -> tuple[TokenPlaces, list[Float[np.ndarray, "_ label"]]]:
    """Those that ``find_spans`` computes, from hidden states that all seeds share."""
    split = make_split(reader, examples, options, title="Test texts")
    mechanism, projection = probe.mechanism, probe.projection()
    logits: list[np.ndarray] = []
    for row in range(len(split)):
        projections = projection.layers(split.states.text(row).float()).transpose(0, 1)
        state = mechanism.summarise(Ragged(projections, torch.tensor([len(projections)])))
        tokens = mechanism.token_logits(state)
        assert tokens is not None
        logits.append(tokens.values.double().numpy())
    return split.places, logits


def _best(candidates: Iterable[Scorer], validation: SpanExamples) -> Row:
    """Calibrated as probes are, the best by what chooses their lookahead."""
    rows: list[tuple[float, Row]] = []
    for score in candidates:
        rule, report = calibrate_spans(validation, *score(validation), rule=F1, bootstrap=0)
        by_label = [metrics["character_f1"].value or 0.0 for metrics in report.per_label.values()]
        f1 = report.metrics["character_f1"].value or 0.0
        rows.append((float(np.mean(by_label)), Row([rule], [score], [f1])))
    return max(rows, key=lambda row: row[0])[1]


def _summary(
    row: Row, draws: Sequence[Draws], ours: Sequence[Draws], test: SpanExamples
) -> dict[str, Any]:
    """A row's figures as JSON-ready values: means over seeds, with intervals over texts."""
    means = {name: np.mean([metrics[name] for metrics in draws], 0) for name in _METRICS}
    gains = {
        name: difference(np.mean([metrics[name] for metrics in ours], 0)[:, 0], means[name][:, 0])
        for name in _COMPARED
    }

    def of_group(group: int) -> dict[str, Any]:
        return {name: Estimate.of(draws[:, group]).to_dict() for name, draws in means.items()}

    return {
        **of_group(0),
        "seeds": [float(metrics["character_f1"][0, 0]) for metrics in draws],
        "validation": [*row.validation],
        "lookaheads": [*row.lookaheads],
        "ours_minus_this": {
            name: {**gain.estimate.to_dict(), "p": gain.p_value} for name, gain in gains.items()
        },
        "per_label": {
            label: of_group(group) for group, label in enumerate(test.task.output_labels, start=1)
        },
    }


def _tables(results: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int]) -> Sequence[str]:
    """All rows over all labels; and if there are several, the F1 of each label's exact spans."""
    headings = ["row", *(name.replace("_", " ") for name in _METRICS)]
    headings += ["of each seed", "on validation texts", "lookahead"]
    headings += [f"{OURS} - row, {name.replace('_', ' ')}" for name in _COMPARED]
    lines = [
        [
            name,
            *(_estimate_cell(row[metric]) for metric in _METRICS),
            *(", ".join(f"{value:.3f}" for value in row[name]) for name in ("seeds", "validation")),
            ", ".join(map(str, row["lookaheads"])) or "-",
            *(
                "" if name == OURS else _estimate_cell(row["ours_minus_this"][one])
                for one in _COMPARED
            ),
        ]
        for name, row in results.items()
    ]
    tables = [table("Means over seeds [95 % interval over test texts]", headings, lines)]
    if len(counts) > 1:
        by_label = [
            [
                label,
                count,
                *(_estimate_cell(row["per_label"][label]["f1"]) for row in results.values()),
            ]
            for label, count in counts.items()
        ]
        tables.append(table("F1 of exact spans", ["label", "spans", *results], by_label))
    return tables


def _estimate_cell(estimate: Mapping[str, Any]) -> str:
    return str(Estimate(estimate["value"], *estimate["ci"]))
