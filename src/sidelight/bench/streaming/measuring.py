"""Detectors trained, their rules chosen, and both measured, each on responses of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sidelight.backbones import TransformersBackbone
from sidelight.bench.streaming.choosing import HALF, RUNNING, SINGLE, choose_rule
from sidelight.bench.streaming.outcomes import Outcomes, estimates, outcomes
from sidelight.bench.streaming.record import Record, Row
from sidelight.bench.streaming.replay import Scores, running_scores
from sidelight.bench.streaming.responses import Parts, Responses, describe, part
from sidelight.bench.streaming.rivals import phrase_scores, word_scores
from sidelight.data import Examples
from sidelight.fitting import FitOptions, fit
from sidelight.probe import Probe
from sidelight.prompts import Reads
from sidelight.streaming_rule import StreamingRule


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
        name: Of what is caught, and of the probe.
        seeds: Trainings of the probe.
        max_tokens: Of a prompt with its response, in training; replayed responses are whole.
        split_seed: Decides which prompts are in which part.
        cache_root: Where hidden states are kept while training; None is the user's cache.
    """

    name: str = "refusal"
    seeds: int = 3
    max_tokens: int = 128
    split_seed: int = 0
    cache_root: Path | None = None


@dataclass(frozen=True, eq=False)
class Detector:
    """Something that scores responses while they are written.

    Attributes:
        title: For tables.
        validation: Running scores of the validation responses, for each training seed.
        test: Of the test responses.
        rules: What its rule is chosen from.
    """

    title: str
    validation: Sequence[Scores]
    test: Sequence[Scores]
    rules: Sequence[StreamingRule]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a run gives.

    Attributes:
        record: The figures.
        probe: Of the first seed, to be served.
    """

    record: Record
    probe: Probe


def compare_streaming(
    backbone: TransformersBackbone,
    examples: Examples,
    *,
    label: Callable[[Examples], Sequence[str]],
    settings: Settings,
) -> Comparison:
    """Trains on one part of the prompts, chooses rules on another, and measures on the third.

    Args:
        backbone: The LLM.
        examples: Responses of two classes.
        label: The labels in the data of some of the examples.
        settings: What is compared.
    """
    parts = part(examples, seed=settings.split_seed)
    probes = _train(backbone, parts, settings)
    validation = describe(backbone, parts.validation, label(parts.validation))
    test = describe(backbone, parts.test, label(parts.test))
    detectors = _detectors(backbone, probes, parts, validation, test)
    rows = tuple(_measure(detector, validation, test) for detector in detectors)
    return Comparison(Record(_conditions(backbone, parts, settings), rows), probes[0])


def _train(backbone: TransformersBackbone, parts: Parts, settings: Settings) -> list[Probe]:
    options = FitOptions(
        seeds=tuple(range(settings.seeds)),
        reads=Reads("response"),
        max_tokens=settings.max_tokens,
        cache_root=settings.cache_root,
    )
    made = fit(backbone, parts.training, parts.validation, name=settings.name, options=options)
    runs = [run for run in made.runs if run.probe.spec == made.best.probe.spec]
    # A bank wants distinct names.
    return [replace(run.probe, name=f"{settings.name}-seed{run.seed}") for run in runs]


def _detectors(
    backbone: TransformersBackbone,
    probes: Sequence[Probe],
    parts: Parts,
    validation: Responses,
    test: Responses,
) -> list[Detector]:
    seen, unseen = (
        running_scores(
            backbone,
            probes,
            [backbone.encoder.encode(item.messages, item.response) for item in own.items],
            device=backbone.device,
        )
        for own in (parts.validation, parts.test)
    )
    words = [word_scores(parts.training, own) for own in (validation, test)]
    phrases = [phrase_scores(own) for own in (validation, test)]
    return [
        Detector("probe, token by token", seen, unseen, RUNNING),
        Detector("probe, whole response", _at_end(seen), _at_end(unseen), SINGLE),
        Detector("TF-IDF, token by token", [words[0]], [words[1]], RUNNING),
        Detector("phrases at the start", [phrases[0]], [phrases[1]], HALF),
    ]


def _at_end(by_seed: Sequence[Scores]) -> list[Scores]:
    """The verdict on the whole response: no score but the last counts."""
    return [[np.append(np.zeros(len(own) - 1), own[-1]) for own in scores] for scores in by_seed]


def _measure(detector: Detector, validation: Responses, test: Responses) -> Row:
    rules = [choose_rule(detector.rules, own, validation) for own in detector.validation]
    fired = [outcomes(rule, own, test) for rule, own in zip(rules, detector.test, strict=True)]
    positive = sorted({n for n, p in zip(test.labels, test.is_positive, strict=True) if p})
    return Row(
        title=detector.title,
        rules=tuple(rules),
        figures=estimates(fired, test.prompts),
        recalls={label: _recall(fired, test, label) for label in positive},
        caught=_caught(fired, is_positive=True),
        alarmed=_caught(fired, is_positive=False),
    )


def _recall(fired: Sequence[Outcomes], test: Responses, label: str) -> float:
    rows = np.flatnonzero([own == label for own in test.labels])
    return float(np.mean([own.fired[rows].mean() for own in fired]))


def _caught(fired: Sequence[Outcomes], *, is_positive: bool) -> tuple[float, ...]:
    """Share of the responses of a class on which the rule had fired after each token."""
    longest = max(int(own.tokens.max()) for own in fired)
    shares: list[np.ndarray] = []
    for own in fired:
        chosen = own.select(np.flatnonzero(own.is_positive == is_positive))
        counts = np.bincount(chosen.fired_at, minlength=longest + 1)[1:]
        shares.append(counts.cumsum() / max(1, len(chosen.tokens)))
    return tuple(float(share) for share in np.mean(shares, axis=0))


def _conditions(
    backbone: TransformersBackbone, parts: Parts, settings: Settings
) -> dict[str, str | int]:
    named = {"training": parts.training, "validation": parts.validation, "test": parts.test}
    counts = {f"{name} responses": len(own) for name, own in named.items()}
    prompts = {
        f"{name} prompts": len({item.text for item in own.items}) for name, own in named.items()
    }
    return {
        "model": backbone.name,
        "fingerprint": backbone.fingerprint.digest,
        "seeds": settings.seeds,
        "training tokens": settings.max_tokens,
        **counts,
        **prompts,
    }
