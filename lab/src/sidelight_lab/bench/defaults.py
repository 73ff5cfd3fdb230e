"""How good what ``sidelight train`` makes of a file is, beside rivals, on texts it did not see."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler

from sidelight.backbone import TransformersBackbone
from sidelight.calibration import fit_calibration, suggested_calibration
from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError, did_you_mean
from sidelight.metrics import decide, log_losses, measure
from sidelight.states.extraction import SharedSource
from sidelight.training.background import Background
from sidelight.training.dataset import (
    FOLDS,
    ProbeDataset,
    Split,
    draw_contexts,
    make_split,
    prepare,
)
from sidelight.training.fit import FittedProbe, fit
from sidelight.training.settings import FitOptions
from sidelight.training.tfidf import fit_tfidf
from sidelight.types import MechanismSpec, Task
from sidelight_lab.baselines.encoders import Encoder
from sidelight_lab.baselines.pooled import PENALTIES
from sidelight_lab.baselines.token_heads import AttentionProbe
from sidelight_lab.bench.measurement import table

DEFAULT, ALONE, LINEAR = "default", "texts alone", "linear"
_IN_CONTEXTS = ("auprc in contexts", "accuracy in contexts")
FIGURES = ("accuracy", "log loss", "ece", "auprc", *_IN_CONTEXTS)
# Logistic regressions, which are also trained in the contexts that the default probe is shown.
_REGRESSIONS = ("means_all_layers", "means_and_lasts", "last_layer")
RIVALS = ("tfidf", "sentence_embeddings", "attention_probe", *_REGRESSIONS)
_RESAMPLES = 2000
# Of the training texts, for a rival that stops early and calibrates on them.
_HELD_OUT = 0.2
# The logit of a class that no training text has.
_ABSENT = -20.0

Logits = Float[np.ndarray, "text output"]


@dataclass(frozen=True)
class Draw:
    """Training texts of one size.

    Attributes:
        size: How many: of each class, or in all.
        seed: Decides which.
        rows: Their places in the file.
    """

    size: str
    seed: int
    rows: Int[np.ndarray, " row"]


@dataclass(frozen=True)
class Judged:
    """A model that was trained on a draw, on the texts that are held out.

    Attributes:
        figures: By name; ``printed`` is the accuracy at the threshold that training estimated.
        right: Whether the most probable class of each text is its own.
        losses: The log loss of each text.
    """

    size: str
    row: str
    draw: int
    figures: dict[str, float]
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
) -> list[Judged]:
    """The default probe, the same of texts alone, and each rival, for each size and draw.

    The figures in contexts are of the held-out texts in ordinary traffic that no row was trained
    in; of several classes, as the last turn of a conversation.

    Args:
        backbone: The frozen LLM.
        examples: Labelled texts.
        background: Ordinary traffic: one half to train in, the other to measure in.
        sizes: Training texts of each class.
        texts: Training texts in all, in the file's shares of the classes.
        draws: Draws of training texts; those that are held out are the same for all.
        held_out: Texts to measure on, in the file's shares of the classes.
        rivals: Some of ``RIVALS``, trained on the same texts.
        cache_root: Folder of the hidden states.
    """
    for rival in rivals:
        if rival not in RIVALS:
            raise SidelightError(f"Unknown rival '{rival}'.{did_you_mean(rival, RIVALS)}")
    if examples.task.kind == "multilabel":
        raise SidelightError("Texts are drawn class by class: choose one --label.")
    held_rows = examples.draw(held_out, seed=0)
    rest = np.setdiff1d(np.arange(len(examples)), held_rows)
    planned = [
        *(
            Draw(f"{size} a class", seed, _of_each_class(examples, rest, size, seed))
            for size, seed in product(sizes, range(draws))
        ),
        *(
            Draw(f"{count} texts", seed, rest[examples.select(rest).draw(count, seed=seed)])
            for count, seed in product(_enough(texts, len(rest)), range(draws))
        ),
    ]
    encoder = Encoder(None, max_tokens=512) if "sentence_embeddings" in rivals else None
    shared = SharedSource(backbone, cache_root)
    options = FitOptions(cache_root=cache_root)
    shown = replace(background, conversations=background.conversations[::2])
    held_texts = examples.select(held_rows)
    unseen = background.conversations[1::2]
    everyone = (np.arange(len(held_texts)),)
    contexts = draw_contexts(backbone, held_texts, everyone, unseen, options)
    held = make_split(backbone, held_texts, options, source=shared, contexts=contexts)
    in_contexts = replace(options, background=shown)
    ours = {
        DEFAULT: in_contexts,
        ALONE: replace(options, background=Background()),
        LINEAR: replace(in_contexts, mechanisms=(MechanismSpec("linear", {}),)),
    }
    found: list[Judged] = []
    for draw in planned:
        drawn = examples.select(draw.rows)
        for row, own in ours.items():
            made = fit(backbone, drawn, None, name="default", options=own, source=shared)
            found.append(_judged_fit(row, made.best, held, shared, draw))
        dataset = prepare(backbone, drawn, None, options=in_contexts, source=shared)
        training = dataset.originals
        for rival in rivals:
            rows = {rival: training}
            if rival in _REGRESSIONS:
                rows[f"{rival} in contexts"] = dataset.training
            for row, split in rows.items():
                fitted = _rival(rival, split, held, backbone, encoder)
                found.append(_judged_rival(row, *fitted, dataset.task, held, draw))
        dataset.training.states.remove()
        dataset.measured.states.remove()
    held.states.remove()
    return found


def _of_each_class(
    examples: LabelledExamples, rest: Int[np.ndarray, " row"], size: int, seed: int
) -> Int[np.ndarray, " drawn"]:
    labels, random = examples.labels[rest], np.random.default_rng(seed)
    counts = np.bincount(labels, minlength=len(examples.task.labels))
    if counts.min() < size:
        raise SidelightError(
            f"Drawing {size} texts of each class beside those that are held out: "
            f"'{examples.task.labels[int(counts.argmin())]}' has {counts.min()}. Choose a smaller "
            "--sizes or --held-out, or give more data."
        )
    classes = (rest[labels == own] for own in range(len(counts)))
    return np.sort(np.concatenate([random.choice(own, size, replace=False) for own in classes]))


def _enough(texts: Sequence[int], rest: int) -> Sequence[int]:
    if max(texts, default=0) > rest:
        raise SidelightError(
            f"Drawing {max(texts)} texts beside those that are held out: {rest} are left. Choose "
            "fewer --texts or a smaller --held-out, or give more data."
        )
    return texts


def _judged_fit(
    row: str, run: FittedProbe, held: Split, shared: SharedSource, draw: Draw
) -> Judged:
    logits = shared.logits(run.probe, held.prompts)
    chance = run.probe.calibration.apply(logits)
    alone, task = held.alone, run.probe.task
    decided = decide(task, chance[alone], held.labels[alone], thresholds=run.probe.thresholds)
    printed = {
        "accuracy at threshold": float(measure(decided, decided.once)["accuracy"][0]),
        "printed": run.report.metrics["accuracy"].value or 0.0,
    }
    return _judged(row, chance, task, held, draw, printed)


def _judged_rival(
    rival: str,
    calibrating: Float[np.ndarray, "calibrating output"],
    labels: Int[np.ndarray, " calibrating"],
    logits: Logits,
    task: Task,
    held: Split,
    draw: Draw,
) -> Judged:
    """Calibrated as a probe is, on logits of texts that it did not train on."""
    kind = suggested_calibration(task)
    calibration = fit_calibration(kind, calibrating, labels, task)
    return _judged(rival, calibration.apply(logits), task, held, draw, {})


def _judged(
    row: str,
    chance: Logits,
    task: Task,
    held: Split,
    draw: Draw,
    printed: dict[str, float],
) -> Judged:
    is_binary, figures = task.kind == "binary", {}
    if len(held.alone) < len(held):
        rest = np.setdiff1d(np.arange(len(held)), held.alone)
        shown, labels = chance[rest], held.labels[rest]
        ranked, decided = _IN_CONTEXTS
        if is_binary:
            figures[ranked] = float(average_precision_score(labels, shown[:, 0]))
        else:
            figures[decided] = float((shown.argmax(1) == labels).mean())
    labels, chance = held.labels[held.alone], chance[held.alone]
    metrics = measure(*_decided(task, chance, labels))
    chosen = (chance[:, 0] >= 0.5).astype(labels.dtype) if is_binary else chance.argmax(1)
    losses = log_losses(task, chance, labels)
    figures |= {
        "accuracy": float((chosen == labels).mean()),
        "log loss": float(losses.mean()),
        "ece": float(metrics["ece"][0]),
        **({"auprc": float(metrics["auprc"][0])} if is_binary else {}),
        **printed,
    }
    return Judged(draw.size, row, draw.seed, figures, chosen == labels, losses)


def _decided(task: Task, chance: Logits, labels: np.ndarray) -> Any:
    thresholds = (0.5,) if task.kind == "binary" else ()
    decided = decide(task, chance, labels, thresholds=thresholds)
    return decided, decided.once


def _rival(
    name: str,
    training: Split,
    held: Split,
    backbone: TransformersBackbone,
    encoder: Encoder | None,
) -> tuple[Logits, Int[np.ndarray, " _"], Float[np.ndarray, "other output"]]:
    """Logits and labels to calibrate on, and logits of the held-out texts."""
    task, labels = training.task, training.labels
    if name == "attention_probe":
        fold = training.examples.folds(round(1 / _HELD_OUT), seed=0)[0]
        left_out = training.select(fold)
        dataset = ProbeDataset(backbone, training.without(fold), left_out)
        fitted = AttentionProbe().fit(dataset, seed=0)
        return fitted.logits(left_out), left_out.labels, fitted.logits(held)
    folds = training.folds(FOLDS)
    if name == "tfidf":
        found = np.empty((len(labels), task.outputs))
        for fold in folds:
            rest = training.without(fold)
            words = fit_tfidf(rest.texts, rest.labels, task)
            found[fold] = words.logits(training.select(fold).texts)
        return found, labels, fit_tfidf(training.texts, labels, task).logits(held.texts)
    if name == "sentence_embeddings":
        assert encoder is not None
        inputs, unseen = encoder.embeddings(training), encoder.embeddings(held)
    else:
        inputs, unseen = (_pooled(name, split) for split in (training, held))
    found, judged = _regression(inputs, unseen, labels, task, folds)
    return found[training.alone], labels[training.alone], judged


def _pooled(name: str, split: Split) -> Float[np.ndarray, "text feature"]:
    """Means, or means and last tokens, of all layers or of the last one."""
    parts = [split.pooled.means, split.pooled.lasts]
    if name == "means_all_layers":
        parts = parts[:1]
    elif name == "last_layer":
        parts = [part[:, -1:] for part in parts]
    return torch.cat(parts, 1).flatten(1).numpy()


def _regression(
    inputs: Float[np.ndarray, "text feature"],
    unseen: Float[np.ndarray, "other feature"],
    labels: Int[np.ndarray, " text"],
    task: Task,
    folds: Sequence[Int[np.ndarray, " _"]],
) -> tuple[Logits, Float[np.ndarray, "other output"]]:
    """A logistic regression whose penalty the folds choose by log loss.

    Returns:
        The logits of each training text without it, and those of the other texts.
    """
    scaler: Any = StandardScaler().fit(inputs)
    scaled = scaler.transform(inputs)
    # In as many coordinates as there are texts, the penalised solution is the same.
    _, _, axes = np.linalg.svd(scaled, full_matrices=False)
    inputs, unseen = scaled @ axes.T, scaler.transform(unseen) @ axes.T

    def left_out(penalty: float) -> Logits:
        logits = np.empty((len(labels), task.outputs))
        for fold in folds:
            rest = np.setdiff1d(np.arange(len(labels)), fold)
            logits[fold] = _regress(inputs[rest], labels[rest], inputs[fold], task, penalty)
        return logits

    found = {penalty: left_out(penalty) for penalty in PENALTIES}
    best = min(found, key=lambda penalty: _loss(task, found[penalty], labels))
    return found[best], _regress(inputs, labels, unseen, task, best)


def _regress(
    inputs: Float[np.ndarray, "text feature"],
    labels: Int[np.ndarray, " text"],
    unseen: Float[np.ndarray, "other feature"],
    task: Task,
    penalty: float,
) -> Float[np.ndarray, "other output"]:
    model = LogisticRegression(C=1 / (penalty * len(inputs)), max_iter=300).fit(inputs, labels)
    logits = model.decision_function(unseen)
    if task.kind == "binary":
        return logits[:, None]
    found = np.full((len(unseen), task.outputs), _ABSENT)
    found[:, model.classes_] = logits
    return found


def _loss(task: Task, logits: Logits, labels: Int[np.ndarray, " text"]) -> float:
    calibration = fit_calibration("none", logits, labels, task)
    return float(log_losses(task, calibration.apply(logits), labels).mean())


def differences(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """What the default gains on each other row, by size; resampled over draws and texts, 95 %."""
    found: list[dict[str, Any]] = []
    for size in dict.fromkeys(one.size for one in judged):
        rows: dict[str, list[Judged]] = {}
        for one in judged:
            if one.size == size:
                rows.setdefault(one.row, []).append(one)
        ours = rows.pop(DEFAULT)
        for title, theirs in rows.items():
            pairs = [(a, b) for a in ours for b in theirs if a.draw == b.draw]
            right = np.array([a.right.astype(float) - b.right for a, b in pairs])
            losses = np.array([b.losses - a.losses for a, b in pairs])
            found.append(
                {
                    "size": size,
                    "row": title,
                    "draws": len(pairs),
                    "accuracy gained": _interval(right),
                    "log loss saved": _interval(losses),
                }
            )
    return found


def _interval(gains: Float[np.ndarray, "draw text"]) -> tuple[float, float, float]:
    """The mean, and the interval of the mean over resampled draws and resampled texts."""
    random = np.random.default_rng(0)
    draws, texts = gains.shape
    means = [
        gains[random.integers(draws, size=draws)][:, random.integers(texts, size=texts)].mean()
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(gains.mean()), float(low), float(high)


def described(judged: Sequence[Judged]) -> dict[str, Any]:
    """Every model's figures, and the differences, as JSON-ready values."""
    rows = [{"size": one.size, "row": one.row, "draw": one.draw, **one.figures} for one in judged]
    return {"rows": rows, "differences": differences(judged)}


def defaults_table(judged: Sequence[Judged]) -> str:
    """The mean over draws of each figure by size and row, and what the default gains on it."""
    gained = {(one["size"], one["row"]): one for one in differences(judged)}
    cells: list[list[str]] = []
    for size in dict.fromkeys(one.size for one in judged):
        for row in dict.fromkeys(one.row for one in judged if one.size == size):
            own = [one for one in judged if (one.size, one.row) == (size, row)]
            cells.append(
                [size, row, str(len(own)), *(_mean(own, key) for key in _COLUMNS)]
                + [_shown(gained.get((size, row)), key) for key in _GAINS]
            )
    headings = ["trained on", "row", "draws", *_COLUMNS, *_GAINS]
    return table("Texts that were held out", headings, cells)


def _mean(own: Sequence[Judged], key: str) -> str:
    values = [one.figures[key] for one in own if key in one.figures]
    return f"{np.mean(values):.3f}" if values else ""


def _shown(gain: dict[str, Any] | None, key: str) -> str:
    if gain is None:
        return ""
    mean, low, high = gain[key]
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


_COLUMNS = (*FIGURES, "accuracy at threshold", "printed")
_GAINS = ("accuracy gained", "log loss saved")
