"""Texts judged by probes on their backbone: logits, and the spans of a probe that labels tokens."""

from collections.abc import Generator, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float

from sidelight.backbone import TransformersBackbone, UnloadedBackbone
from sidelight.bank import Bank
from sidelight.data.examples import Example, located
from sidelight.data.spans import span_text
from sidelight.errors import SidelightError
from sidelight.mechanisms.spans import Spans
from sidelight.probe import Probe
from sidelight.progress import Progress, progress
from sidelight.prompts import EncodedPrompt, Message
from sidelight.ragged import Ragged, by_length
from sidelight.spans import character_scores
from sidelight.states.extraction import score
from sidelight.training.dataset import span_places
from sidelight.types import Span


def encode(
    backbone: TransformersBackbone | UnloadedBackbone, examples: Sequence[Example]
) -> list[EncodedPrompt]:
    """The examples' token ids.

    Raises:
        ContextLengthError: One is longer than the backbone reads.
        SidelightError: One cannot be rendered.
    """
    prompts: list[EncodedPrompt] = []
    for index, example in enumerate(examples):
        with located(example, index):
            prompts.append(backbone.encoder.encode(example.conversation, example.response))
    return prompts


def judge(
    backbone: TransformersBackbone,
    probes: Sequence[Probe],
    examples: Sequence[Example],
    shown: Progress | None = None,
) -> list[np.ndarray]:
    """Each probe's logits of the texts, ``[text, output]``, from one forward pass.

    Args:
        backbone: Runs the texts.
        probes: Judge them.
        examples: The texts.
        shown: The progress bar of a larger work; None shows one for these texts.

    Raises:
        ContextLengthError: A text is longer than the backbone reads.
        VerdictError: A logit is not finite; the message names the first text with one.
    """
    # Runs of one training share a name, which a bank does not allow.
    renamed = [replace(probe, name=f"{probe.name}/{i}") for i, probe in enumerate(probes)]
    bank = Bank(renamed, device=backbone.device)
    logits = score(backbone, bank, encode(backbone, examples), shown)
    for probe, rows in zip(probes, logits, strict=True):
        for index in np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist():
            with located(examples[index], index):
                probe.require_finite(rows[index])
    return logits


def require_responses(probe: Probe, examples: Sequence[Example]) -> None:
    """Refuses to measure a probe that reads responses on prompts alone.

    Raises:
        SidelightError: A text has no response.
    """
    if not probe.reads.includes_response:
        return
    missing = sum(example.response is None for example in examples)
    if missing:
        raise SidelightError(
            f"Probe '{probe.name}' reads responses, but {missing} of {len(examples)} examples have "
            "none. Name the column of answers with --response (response= in Python)."
        )


def as_example(text: str | Example) -> Example:
    """A plain text as a conversation of one message."""
    return text if isinstance(text, Example) else Example((Message("user", text),))


def find_spans(
    backbone: TransformersBackbone, probe: Probe, examples: Sequence[Example]
) -> tuple[Float[np.ndarray, "text output"], list[list[Span]]]:
    """The logits of whole texts, and the spans in each, from one forward pass.

    Raises:
        ContextLengthError: A text is longer than the backbone reads.
        VerdictError: A logit is not finite.
        SidelightError: The probe reads responses and a text has none, or the reverse.
    """
    assert probe.spans is not None
    logits = np.full((len(examples), probe.task.outputs), np.nan)
    found: list[list[Span]] = [[] for _ in examples]
    for i, of_text, scores in judge_characters(backbone, probe, examples):
        logits[i] = of_text
        found[i] = probe.spans.read(scores, probe.span_labels)
    return logits, found


@torch.inference_mode()
def judge_characters(
    backbone: TransformersBackbone, probe: Probe, examples: Sequence[Example]
) -> Generator[tuple[int, Float[np.ndarray, " output"], Float[np.ndarray, "character label"]]]:
    """Of each text its place, its logits, and the probabilities of its characters."""
    assert probe.spans is not None
    require_responses(probe, examples)
    if not probe.reads.includes_response and any(item.response is not None for item in examples):
        raise SidelightError(
            f"Probe '{probe.name}' finds spans in prompts, and these texts have responses. Leave "
            "--response out (response= in Python)."
        )
    bank = Bank([probe], device=backbone.device)
    mechanism = bank.probes[0].mechanism
    assert isinstance(mechanism, Spans)
    prompts = encode(backbone, examples)
    masks = [prompt.mask(probe.reads) for prompt in prompts]
    places = span_places(backbone, examples, [int(mask.sum()) for mask in masks])
    with progress("Judging", sum(map(len, prompts)), unit="tokens") as shown:
        for batch in by_length([*map(len, prompts)]):
            tap = bank.tap()
            with backbone.tapped(tap):
                backbone.run([prompts[i] for i in batch])
            for i, columns in zip(batch, tap.projected(), strict=True):
                own = columns[: len(masks[i])][masks[i].to(columns.device)]
                state = mechanism.summarise(Ragged(own, torch.tensor([len(own)]).to(own.device)))
                logits = mechanism.finish(state)[0].double().cpu().numpy()
                with located(examples[i], i):
                    probe.require_finite(logits)
                tokens = mechanism.token_logits(state).values.double().cpu().numpy()
                probabilities = probe.spans.calibration.apply(tokens)
                text = span_text(examples[i])
                yield i, logits, character_scores(text, places[i], probabilities)
                shown.advance(len(prompts[i]))
