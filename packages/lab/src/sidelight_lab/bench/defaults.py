"""Quality of the default probe of ``sidelight train`` and its rivals on held-out texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.metrics import average_precision_score

from sidelight.data.evaluation import Estimate, evaluate
from sidelight.data.examples import LabelledExamples
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.errors import SidelightError, did_you_mean
from sidelight.states.extraction import cached_logits, extract
from sidelight.statistics.calibration import Calibration, fit_calibration, suggested_calibration
from sidelight.statistics.metrics import decide, log_losses
from sidelight.training.background import Background
from sidelight.training.dataset import Split, plan_split
from sidelight.training.fit import fit
from sidelight.training.preparing import ProbeDataset, prepare
from sidelight.training.settings import FitOptions
from sidelight.training.tfidf import TfIdf, fit_tfidf
from sidelight.training.traffic import conversations_of
from sidelight.training.validation import FOLDS
from sidelight.types import Task
from sidelight_lab.baselines import BASELINES
from sidelight_lab.baselines.encoders import Encoder
from sidelight_lab.baselines.pooled import (
    PENALTIES,
    Linear,
    fit_logistic,
    out_of_fold,
    pooled_states,
)
from sidelight_lab.bench.measurement import table

DEFAULT, WITHOUT_CONTEXT = "default", "texts alone"
_IN_CONTEXTS = ("auprc in contexts", "accuracy in contexts")
# Accuracy at the probe's threshold, on held-out texts and as printed by training.
_ACCURACIES = ("accuracy at threshold", "printed")
# False-positive rate on background conversations, from held-out sources and as printed by training.
_TRAFFIC = ("traffic flagged", "printed traffic")
METRICS = ("accuracy", "log loss", "ece", "auprc", *_IN_CONTEXTS)
# Logistic regressions, which are also trained in the contexts of the default probe.
_REGRESSIONS = ("means_all_layers", "means_and_lasts", "last_layer", "mean_last_layer")
_EARLY_STOPPING = ("attention_probe", "encoder")
RIVALS = ("tfidf", "sentence_embeddings", *_EARLY_STOPPING, *_REGRESSIONS)
_RESAMPLES = 2000
# Share of the training texts on which a rival stops early and calibrates.
_HELD_OUT = 0.2

Logits = Float[np.ndarray, "text output"]
Rows = Int[np.ndarray, " row"]


@dataclass(frozen=True)
class Rival:
    """A trained rival.

    Attributes:
        logits: Logits of texts that it was not trained on.
        labels: Labels of the same texts.
        score: Function that returns the logits of other texts.
    """

    logits: Logits
    labels: Int[np.ndarray, " text"]
    score: Callable[[Split], Logits]

    def calibration(self, task: Task) -> Calibration:
        """As a probe's, on logits of texts that it did not learn from."""
        return fit_calibration(suggested_calibration(task), self.logits, self.labels, task)


@dataclass(frozen=True)
class Evaluated:
    """Results of a model trained on one draw, on the held-out texts.

    Attributes:
        size: Training texts per class, or in total.
        draw: Seed of the draw.
        metrics: Metrics by name; ``printed`` is the accuracy that training estimated.
        right: Whether the most probable class of each text is correct.
        losses: Log loss of each text.
    """

    size: str
    row: str
    draw: int
    metrics: dict[str, float]
    right: Bool[np.ndarray, " text"]
    losses: Float[np.ndarray, " text"]


def compare_defaults(
    backbone: TransformersBackbone,
    examples: LabelledExamples,
    *,
    sizes: Sequence[int] = (),
    texts: Sequence[int] = (),
    draws: int,
    held_out: int,
    rivals: Sequence[str],
    background: Background,
    cache_root: Path,
) -> list[Evaluated]:
    """Train the default probe, the same without contexts, and rivals, for each size and draw.

    Metrics in contexts are for held-out texts embedded in unseen background traffic; for
    multi-class tasks, as the last turn of a conversation.

    Args:
        backbone: The frozen LLM.
        examples: Labelled texts.
        background: Background traffic: one half for training, the other for measurement.
        sizes: Training texts per class.
        texts: Total training texts, in the file's class balance.
        draws: Number of draws of training texts; the held-out texts are the same for all.
        held_out: Number of texts to measure on, in the file's class balance.
        rivals: Some of ``RIVALS``, trained on the same texts.
        cache_root: Folder of the hidden states, which are kept.
    """
    for rival in rivals:
        if rival not in RIVALS:
            raise SidelightError(f"Unknown rival '{rival}'.{did_you_mean(rival, RIVALS)}")
    if examples.task.kind == "multilabel":
        raise SidelightError(
            "Texts are drawn class by class, so only one label column is allowed. Name a single "
            "column with --label."
        )
    held_out_rows = examples.draw(held_out, seed=0)
    rest = np.setdiff1d(np.arange(len(examples)), held_out_rows)
    draws_of = {
        **{
            (f"{size} a class", seed): _of_each_class(examples, rest, size, seed)
            for size, seed in product(sizes, range(draws))
        },
        **{
            (f"{count} texts", seed): rest[examples.select(rest).draw(count, seed=seed)]
            for count, seed in product(_enough(texts, len(rest)), range(draws))
        },
    }
    encoder = Encoder(None, max_tokens=512) if "sentence_embeddings" in rivals else None
    options = FitOptions(cache_root=cache_root, keep_cache=True)
    training_background, unseen = background.split_into(2)
    held_out_texts = examples.select(held_out_rows)
    everyone = [(np.arange(len(held_out_texts)), unseen)]
    test_split = plan_split(backbone, held_out_texts, options, parts=[everyone])
    extract(backbone, test_split.states)
    in_contexts = replace(options, background=training_background)
    ours = {
        DEFAULT: in_contexts,
        WITHOUT_CONTEXT: replace(options, background=Background()),
    }
    conversations = conversations_of(test_split.contexts)
    evaluated: list[Evaluated] = []
    for (size, seed), rows in draws_of.items():
        drawn = examples.select(rows)
        for row, row_options in ours.items():
            run = fit(backbone, drawn, None, name="default", options=row_options)
            logits = cached_logits(run.probe, test_split.states)
            chances = run.probe.calibration.apply(logits)
            decided = decide(
                run.probe.task,
                chances[test_split.without_context],
                test_split.labels[test_split.without_context],
                thresholds=run.probe.thresholds,
            )
            printed = {
                name: report.metrics["accuracy"].value or 0.0
                for name, report in zip(_ACCURACIES, (evaluate(decided), run.report), strict=True)
            }
            if run.traffic is not None and len(conversations):
                flags = run.probe.task.flagged(chances[conversations], run.probe.thresholds)
                share = run.traffic.flagged / max(1, len(run.traffic.background))
                printed |= zip(_TRAFFIC, (float(flags.mean()), share), strict=True)
            evaluated.append(
                Evaluated(size, row, seed, *_measured(run.probe.task, chances, test_split, printed))
            )
        dataset = prepare(backbone, drawn, None, options=in_contexts)
        for rival in rivals:
            splits = {rival: dataset.training.without_contexts()}
            if rival in _REGRESSIONS:
                splits[f"{rival} in contexts"] = dataset.training
            for row, split in splits.items():
                fitted = fit_rival(rival, split, backbone, encoder)
                chances = fitted.calibration(dataset.task).apply(fitted.score(test_split))
                evaluated.append(
                    Evaluated(size, row, seed, *_measured(dataset.task, chances, test_split, {}))
                )
    return evaluated


def _of_each_class(examples: LabelledExamples, rest: Rows, size: int, seed: int) -> Rows:
    labels, random = examples.labels[rest], np.random.default_rng(seed)
    counts = np.bincount(labels, minlength=len(examples.task.labels))
    if counts.min() < size:
        raise SidelightError(
            f"Cannot draw {size} texts of each class: after holding out texts, "
            f"'{examples.task.labels[int(counts.argmin())]}' has {counts.min()}. Choose a "
            "smaller --sizes or --held-out, or give more data."
        )
    classes = (rest[labels == number] for number in range(len(counts)))
    return np.sort(
        np.concatenate([random.choice(number, size, replace=False) for number in classes])
    )


def _enough(texts: Sequence[int], rest: int) -> Sequence[int]:
    if max(texts, default=0) > rest:
        raise SidelightError(
            f"Cannot draw {max(texts)} texts: {rest} are left after holding out texts. Choose a "
            "smaller --texts or --held-out, or give more data."
        )
    return texts


def _measured(
    task: Task, chances: Logits, test_split: Split, printed: dict[str, float]
) -> tuple[dict[str, float], Bool[np.ndarray, " text"], Float[np.ndarray, " text"]]:
    """Figures, and by text whether the most probable class is right, and the log loss."""
    is_binary, metrics = task.kind == "binary", dict[str, float]()
    in_contexts = np.setdiff1d(np.arange(len(test_split)), test_split.without_context)
    if len(in_contexts):
        labels, context_chances = test_split.labels[in_contexts], chances[in_contexts]
        ranked, decided = _IN_CONTEXTS
        if is_binary:
            metrics[ranked] = float(average_precision_score(labels, context_chances[:, 0]))
        else:
            metrics[decided] = float((context_chances.argmax(1) == labels).mean())
    labels, chances = (
        test_split.labels[test_split.without_context],
        chances[test_split.without_context],
    )
    report = evaluate(decide(task, chances, labels, thresholds=(0.5,) if is_binary else ()))
    right = (chances[:, 0] >= 0.5 if is_binary else chances.argmax(1)) == labels
    losses = log_losses(task, chances, labels)
    values = {name: report.metrics[name].value for name in ("ece", "auprc")[: 1 + is_binary]}
    metrics |= {
        "accuracy": float(right.mean()),
        "log loss": float(losses.mean()),
        **{name: value or 0.0 for name, value in values.items()},
        **printed,
    }
    return metrics, right, losses


def fit_rival(
    name: str, training: Split, backbone: TransformersBackbone, encoder: Encoder | None = None
) -> Rival:
    """A rival, trained on these texts; ``encoder`` gives ``sentence_embeddings``."""
    task, labels = training.task, training.labels
    if name in _EARLY_STOPPING:
        fold = training.examples.folds(round(1 / _HELD_OUT), seed=0)[0]
        left_out = training.select(fold)
        fitted = BASELINES[name]().fit(ProbeDataset(backbone, training, (fold,)), seed=0)
        return Rival(fitted.logits(left_out), left_out.labels, fitted.logits)
    if name == "tfidf":
        texts = np.array(training.texts, dtype=object)

        def words(rows: Rows) -> TfIdf:
            return fit_tfidf(texts[rows].tolist(), labels[rows], task)

        folds = training.folds(FOLDS)
        found = out_of_fold(lambda rest, fold: words(rest).logits([*texts[fold]]), folds, task)
        full_fit = words(np.arange(len(labels)))
        return Rival(found, labels, lambda split: full_fit.logits(split.texts))

    def features(split: Split) -> Float[np.ndarray, "text feature"]:
        if name != "sentence_embeddings":
            return _pooled(name, split)
        assert encoder is not None
        return encoder.embeddings(split)

    inputs = features(training)

    def regress(rows: Rows, penalty: float) -> Linear:
        return fit_logistic(
            inputs[rows], labels[rows], task, penalty=penalty, is_balanced=False, iterations=300
        )

    left_out = {
        penalty: out_of_fold(
            lambda rest, fold, penalty=penalty: regress(rest, penalty)(inputs[fold]),
            training.folds(FOLDS),
            task,
        )
        for penalty in PENALTIES
    }
    best = min(left_out, key=lambda penalty: _loss(task, left_out[penalty], labels))
    without_context, linear = training.without_context, regress(np.arange(len(labels)), best)
    return Rival(
        left_out[best][without_context],
        labels[without_context],
        lambda split: linear(features(split)),
    )


def _pooled(name: str, split: Split) -> Float[np.ndarray, "text feature"]:
    """Means, or means and last tokens, of all layers or of the last one."""
    poolings = [*pooled_states(split)]
    if name in ("means_all_layers", "mean_last_layer"):
        poolings = poolings[:1]
    if name in ("last_layer", "mean_last_layer"):
        poolings = [vectors[:, -1:] for vectors in poolings]
    return torch.cat(poolings, 1).flatten(1).numpy()


def _loss(task: Task, logits: Logits, labels: Int[np.ndarray, " text"]) -> float:
    calibration = fit_calibration("none", logits, labels, task)
    return float(log_losses(task, calibration.apply(logits), labels).mean())


def differences(evaluated: Sequence[Evaluated]) -> dict[tuple[str, str], dict[str, Estimate]]:
    """The gain of the default over each other row, by size and row, over draws and texts."""
    ours = {(one.size, one.draw): one for one in evaluated if one.row == DEFAULT}
    rows: dict[tuple[str, str], list[tuple[Evaluated, Evaluated]]] = {}
    for one in evaluated:
        if one.row != DEFAULT:
            rows.setdefault((one.size, one.row), []).append((ours[one.size, one.draw], one))
    return {
        key: {
            "accuracy gained": _gain([a.right.astype(float) - b.right for a, b in pairs]),
            "log loss saved": _gain([b.losses - a.losses for a, b in pairs]),
        }
        for key, pairs in rows.items()
    }


def _gain(by_draw: Sequence[Float[np.ndarray, " text"]]) -> Estimate:
    """The mean, with the interval of the mean over resampled draws and resampled texts."""
    random, gains = np.random.default_rng(0), np.stack(by_draw)
    draws, texts = gains.shape
    means = [
        gains[random.integers(draws, size=draws)][:, random.integers(texts, size=texts)].mean()
        for _ in range(_RESAMPLES)
    ]
    return Estimate.of(np.array([gains.mean(), *means]))


def summarise(evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    """Every model's figures, and the differences, as JSON-ready values."""
    rows = [
        {"size": one.size, "row": one.row, "draw": one.draw, **one.metrics} for one in evaluated
    ]
    gained = [
        {"size": size, "row": row, **{name: gain.to_dict() for name, gain in gains.items()}}
        for (size, row), gains in differences(evaluated).items()
    ]
    return {"rows": rows, "differences": gained}


def defaults_table(evaluated: Sequence[Evaluated]) -> str:
    """A table of the mean metrics over draws by size and row, and the gain of the default."""
    gained = differences(evaluated)
    columns, gains = (*METRICS, *_ACCURACIES, *_TRAFFIC), ("accuracy gained", "log loss saved")
    cells: list[list[str]] = []
    for size, row in dict.fromkeys((one.size, one.row) for one in evaluated):
        row_metrics = [one.metrics for one in evaluated if (one.size, one.row) == (size, row)]
        # All draws of a row have the same figures.
        means = [
            f"{np.mean([f[name] for f in row_metrics]):.3f}" if name in row_metrics[0] else ""
            for name in columns
        ]
        compared = gained.get((size, row), {})
        cells.append(
            [
                size,
                row,
                str(len(row_metrics)),
                *means,
                *(str(compared.get(name, "")) for name in gains),
            ]
        )
    headings = ["trained on", "row", "draws", *columns, *gains]
    return table("Texts that were held out", headings, cells)
