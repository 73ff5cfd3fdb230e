"""Recall of one positive text hidden in a long input, by the length of the input."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.metrics import roc_auc_score

from sidelight.backbone import TransformersBackbone
from sidelight.bank import Bank
from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError
from sidelight.probe import Probe
from sidelight.progress import progress
from sidelight.prompts import EncodedPrompt, Message
from sidelight.ragged import Ragged

WAYS = ("whole", "windows")


def compare_lengths(
    backbone: TransformersBackbone,
    probes: Sequence[Probe],
    examples: LabelledExamples,
    *,
    lengths: Sequence[int],
    count: int,
    window: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Recall, false alarms and AUROC of each probe at each length, whole and by windows.

    By windows, a probe gives each run of ``window`` tokens its own logit, from the same forward
    pass, and the highest one counts. All probes have one binary task.

    Args:
        lengths: Tokens of negative text around the hidden text; 0 leaves it alone.
        count: Number of inputs with a positive text, and of inputs without, at each length.
    """
    if examples.task.kind != "binary":
        raise SidelightError("Long inputs need labels of a binary task: check --label.")
    random = np.random.default_rng(seed)
    positive, negative = (np.flatnonzero(examples.labels == label) for label in (1, 0))
    if min(len(positive), len(negative)) < count:
        raise SidelightError(
            f"Got {len(positive)} positive and {len(negative)} negative texts, wanted {count} of "
            "each. Choose a smaller --texts, or give more data."
        )
    drawn = np.concatenate([random.permutation(rows)[:count] for rows in (positive, negative)])
    hides = np.repeat([True, False], count)
    filler = [examples.items[row].text for row in negative]
    rows: list[dict[str, Any]] = []
    with progress("Long inputs", sum(lengths) * len(drawn), unit="tokens around texts") as shown:
        for length in lengths:
            random = np.random.default_rng(seed)
            found: list[Float[np.ndarray, "probe way"]] = []
            for row in drawn:
                text = _hide(backbone, examples.items[row].text, filler, length, random)
                prompt = backbone.encoder.encode([Message("user", text)])
                found.append(_scores(backbone, probes, prompt, window=window))
                shown.advance(length)
            scores = np.stack(found, axis=-1)  # (probe, way, text)
            rows += [
                {
                    "probe": probe.name,
                    "read": way,
                    "tokens around": length,
                    "recall": float((own[hides] >= probe.thresholds[0]).mean()),
                    "false alarms": float((own[~hides] >= probe.thresholds[0]).mean()),
                    "AUROC": float(roc_auc_score(hides, own)),
                }
                for probe, by_way in zip(probes, scores, strict=True)
                for way, own in zip(WAYS, by_way, strict=True)
            ]
    return rows


def _hide(
    backbone: TransformersBackbone,
    text: str,
    filler: Sequence[str],
    tokens: int,
    random: np.random.Generator,
) -> str:
    """The text at a random place among ``tokens`` tokens of other texts."""
    pieces: list[str] = []
    found = 0
    while found < tokens:
        piece = filler[int(random.integers(len(filler)))]
        ids = backbone.tokenizer(piece, add_special_tokens=False)["input_ids"]
        pieces.append(backbone.tokenizer.decode(ids[: tokens - found]))
        found += len(ids)
    place = int(random.integers(len(pieces) + 1))
    return "\n\n".join([*pieces[:place], text, *pieces[place:]])


@torch.inference_mode()
def _scores(
    backbone: TransformersBackbone,
    probes: Sequence[Probe],
    prompt: EncodedPrompt,
    *,
    window: int,
) -> Float[np.ndarray, "probe way"]:
    """Each probe's probability for the whole input, and for its highest window."""
    tap = Bank(probes, device=backbone.device).tap()
    with backbone.tapped(tap):
        backbone.run([prompt])
    projected = tap.projected()[0]
    found: list[list[float]] = []
    start = 0
    for probe in probes:
        width = probe.projection().weight.shape[2]
        own = projected[prompt.mask(probe.reads).to(projected.device), :, start : start + width]
        start += width
        scores: list[float] = []
        for size in (len(own), window):
            lengths = torch.tensor([len(piece) for piece in own.split(size)], device=own.device)
            state = probe.mechanism.summarise(Ragged(own, lengths))
            logits = probe.mechanism.finish(state).double().cpu().numpy()
            scores.append(float(probe.calibration.apply(logits).max()))
        found.append(scores)
    return np.array(found)
