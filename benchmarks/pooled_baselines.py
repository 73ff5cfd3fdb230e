"""Logistic regression on mean-pooled hidden states, and TF-IDF: the baselines of docs/results.md.

    python benchmarks/pooled_baselines.py --train TRAIN --test TEST --label toxicity

For every layer the mean over the tokens that a probe reads; then a logistic regression on the best
single layer, and one on all layers' means side by side. Layer and regularisation are chosen on
the same validation rows as the probes' settings; test rows are scored once.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sidelight.backbones import TransformersBackbone, load_backbone
from sidelight.baselines import tfidf_logits
from sidelight.batching import by_length
from sidelight.calibration import choose_thresholds, fit_calibration
from sidelight.data import Examples, load_examples
from sidelight.evaluation import evaluate
from sidelight.progress import progress
from sidelight.prompts import Reads
from sidelight.scoring import read_masks
from sidelight.training import validation_score

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
_METRICS = ("auprc", "f1", "accuracy", "macro_f1")


@dataclass(frozen=True)
class Rival:
    """Validation and test logits of one baseline."""

    name: str
    validation: np.ndarray
    test: np.ndarray


def pooled(backbone: TransformersBackbone, examples: Examples) -> np.ndarray:
    """Mean hidden state of each layer: [text, layer, width]."""
    reads = Reads()
    prompts = [backbone.encoder.encode(item.messages) for item in examples.items]
    sizes = backbone.fingerprint
    means = np.empty((len(prompts), sizes.layers, sizes.width), dtype=np.float32)
    with progress("Pooling", len(prompts), unit="texts") as shown:
        for batch in by_length([len(prompt) for prompt in prompts]):
            chosen = [prompts[i] for i in batch]
            mask = read_masks(chosen, frozenset([reads]), device=backbone.device)[reads]
            weight = (mask / mask.sum(1, keepdim=True)).float()

            def tap(layer: int, hidden: torch.Tensor, rows=batch, weight=weight) -> None:
                mean = torch.einsum("bt,btd->bd", weight, hidden.float())
                means[rows, layer] = mean.cpu().numpy()

            with backbone.tapped(tap):
                backbone.run(chosen)
            shown.advance(len(batch))
    return means


def regress(
    name: str, parts: Sequence[np.ndarray], labels: Sequence[np.ndarray], examples: Examples
) -> Rival:
    """The logistic regression whose strength does best on validation rows."""
    training, validation, test = parts
    rivals = []
    for strength in _STRENGTHS:
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=strength, max_iter=300, class_weight="balanced")
        )
        model.fit(training, labels[0])
        outputs = [model.decision_function(x).reshape(len(x), -1) for x in (validation, test)]
        rivals.append(Rival(name, *outputs))
    return max(rivals, key=lambda r: validation_score(examples.task, r.validation, labels[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--validation")
    parser.add_argument("--label", default="label")
    parser.add_argument("--subset")
    parser.add_argument("--model", default="smollm2")
    given = parser.parse_args()

    training = load_examples(given.train, label=given.label)
    task = training.task
    if given.validation:
        validation = load_examples(given.validation, label=given.label, task=task)
    else:
        training, validation = training.split(0.15, seed=0)
    test = load_examples(given.test, label=given.label, task=task)
    sets = (training, validation, test)
    labels = [one.labels for one in sets]
    backbone = load_backbone(given.model)
    means = [pooled(backbone, one) for one in sets]

    texts = [[item.text for item in one.items] for one in sets]
    words = [tfidf_logits(task, texts[0], labels[0], texts[i]) for i in (1, 2)]
    layers = [
        regress(f"mean of layer {layer}", [m[:, layer] for m in means], labels, validation)
        for layer in range(backbone.fingerprint.layers)
    ]
    best = max(layers, key=lambda rival: validation_score(task, rival.validation, labels[1]))
    every = regress(
        "means of all layers", [m.reshape(len(m), -1) for m in means], labels, validation
    )
    rows = {"all rows": np.arange(len(test))}
    if given.subset:
        rows[given.subset] = np.flatnonzero([bool(v) for v in test.column(given.subset)])
    for rival in (Rival("TF-IDF", *words), best, every):
        calibration = fit_calibration("platt", rival.validation, labels[1], task)
        thresholds = choose_thresholds(task, calibration.apply(rival.validation), labels[1])
        for title, at in rows.items():
            report = evaluate(
                task, calibration.apply(rival.test[at]), labels[2][at], thresholds=thresholds
            )
            figures = {metric: str(report.metrics[metric]) for metric in _METRICS}
            print(json.dumps({"baseline": rival.name, "rows": title, **figures}))


if __name__ == "__main__":
    main()
