"""Whether a probe still finds one positive text in a long input, by the length of the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.metrics import roc_auc_score
from torch import Tensor

from sidelight.backbone import TransformersBackbone
from sidelight.bank import Bank
from sidelight.data.examples import Examples
from sidelight.errors import SidelightError
from sidelight.probe import Probe
from sidelight.progress import progress
from sidelight.prompts import EncodedPrompt, Message
from sidelight.ragged import Ragged


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        lengths: Tokens of negative text around the hidden one; 0: it stands alone.
        count: Inputs with a positive text, and as many without, at each length.
        window: Tokens that get a logit of their own.
        seed: Decides the texts and the places.
    """

    lengths: tuple[int, ...]
    count: int
    window: int
    seed: int


def compare_lengths(
    backbone: TransformersBackbone,
    probes: Sequence[Probe],
    examples: Examples,
    comparison: Comparison,
) -> list[dict[str, Any]]:
    """Recall, false alarms and AUROC of each probe at each length, whole and by windows.

    By windows, a probe gives each run of ``window`` tokens a logit of its own, out of the same
    forward pass, and the highest one counts.

    Args:
        backbone: Of the probes.
        probes: Of one binary task.
        examples: Labelled texts that the probes were not trained on.
        comparison: Lengths and counts.

    Raises:
        SidelightError: A task that is not binary, or too few positive texts.
    """
    hidden, hides = _hidden(examples, count=comparison.count, seed=comparison.seed)
    pairs = zip(examples.items, _labels(examples), strict=True)
    negatives = [example.text for example, label in pairs if not label]
    rows: list[dict[str, Any]] = []
    tokens = sum(comparison.lengths) * len(hidden)
    with progress("Long inputs", tokens, unit="tokens around texts") as shown:
        for length in comparison.lengths:
            random = np.random.default_rng(comparison.seed)
            scores: list[Float[np.ndarray, "probe way"]] = []
            for text in hidden:
                prompt = _haystack(backbone, text, negatives, tokens=length, random=random)
                scores.append(_score(backbone, probes, prompt, window=comparison.window))
                shown.advance(length)
            rows += _figures(probes, np.stack(scores), hides, length=length)
    return rows


def _hidden(
    examples: Examples, *, count: int, seed: int
) -> tuple[list[str], Bool[np.ndarray, " text"]]:
    labels = _labels(examples)
    random = np.random.default_rng(seed)
    by_label = [np.flatnonzero(labels == label) for label in (1, 0)]
    if min(map(len, by_label)) < count:
        raise SidelightError(
            f"{count} texts of each label are wanted, but the data has {len(by_label[0])} positive "
            f"and {len(by_label[1])} negative ones. Choose a smaller --texts."
        )
    drawn = np.concatenate([random.permutation(rows)[:count] for rows in by_label])
    return [examples.items[row].text for row in drawn], labels[drawn].astype(bool)


def _labels(examples: Examples) -> np.ndarray:
    if examples.labels is None or examples.task is None or examples.task.kind != "binary":
        raise SidelightError("Long inputs are measured with the labels of a binary task.")
    return examples.labels


def _haystack(
    backbone: TransformersBackbone,
    text: str,
    negatives: Sequence[str],
    *,
    tokens: int,
    random: np.random.Generator,
) -> EncodedPrompt:
    """The text among negative ones, in the chat template."""
    pieces: list[str] = []
    found = 0
    while found < tokens:
        piece = negatives[int(random.integers(len(negatives)))]
        ids = backbone.tokenizer(piece, add_special_tokens=False)["input_ids"]
        pieces.append(backbone.tokenizer.decode(ids[: tokens - found]))
        found += len(ids)
    place = int(random.integers(len(pieces) + 1))
    whole = "\n\n".join([*pieces[:place], text, *pieces[place:]])
    return backbone.encoder.encode([Message("user", whole)])


def _score(
    backbone: TransformersBackbone,
    probes: Sequence[Probe],
    prompt: EncodedPrompt,
    *,
    window: int,
) -> Float[np.ndarray, "probe way"]:
    """The probability of each probe: of the whole, and of the highest window."""
    bank = Bank(probes, device=backbone.device)
    tap = bank.tap()
    with backbone.tapped(tap):
        backbone.run([prompt])
    projected = tap.projected()[0]
    found: list[list[float]] = []
    start = 0
    for probe in probes:
        width = probe.projection().weight.shape[2]
        own = projected[prompt.mask(probe.reads).to(projected.device), :, start : start + width]
        start += width
        parts = [_pieces(own, len(own)), _pieces(own, window)]
        found.append([_highest(probe, part) for part in parts])
    return np.array(found)


def _pieces(tokens: Float[Tensor, "token layer column"], size: int) -> Ragged:
    lengths = [len(piece) for piece in tokens.split(size)]
    return Ragged(tokens, torch.tensor(lengths, device=tokens.device))


@torch.inference_mode()
def _highest(probe: Probe, tokens: Ragged) -> float:
    logits = probe.mechanism.finish(probe.mechanism.summarise(tokens)).double().cpu().numpy()
    return float(probe.calibration.apply(logits).max())


def _figures(
    probes: Sequence[Probe],
    scores: Float[np.ndarray, "text probe way"],
    hides: Bool[np.ndarray, " text"],
    *,
    length: int,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for index, probe in enumerate(probes):
        for way, name in enumerate(("whole", "windows")):
            own = scores[:, index, way]
            flagged = own >= probe.thresholds[0]
            rows.append(
                {
                    "probe": probe.name,
                    "read": name,
                    "tokens around": length,
                    "recall": float(flagged[hides].mean()),
                    "false alarms": float(flagged[~hides].mean()),
                    "AUROC": float(roc_auc_score(hides, own)),
                }
            )
    return rows
