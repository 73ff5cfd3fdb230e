"""Where a rule fired on each response, and the figures that follow. Knows no scores.

The rule of a detector, chosen on validation responses. Never sees the test.

The figures with what they were measured on, as files.

Detectors trained, their rules chosen, and both measured, each on responses of its own.

How many responses each detector has caught after each token.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Shaped
from matplotlib.figure import Figure

from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import Examples
from sidelight.plots import save_figure
from sidelight.policy.hold_back import StreamingRule
from sidelight.probe import Probe
from sidelight.prompts import Reads
from sidelight.storage import write_text
from sidelight.training.fit import fit
from sidelight.training.settings import FitOptions
from sidelight_lab.bench.streaming_responses import (
    Parts,
    Responses,
    Scores,
    describe,
    part,
    phrase_scores,
    running_scores,
    word_scores,
)

_PER_TOKENS = 1000
_RESAMPLES = 1000
_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Where a rule fired.

    Attributes:
        is_positive: Whether each response was to be caught.
        tokens: Of each response.
        fired_at: Tokens read when the rule fired; 0: it did not.
    """

    is_positive: Bool[np.ndarray, " response"]
    tokens: Int[np.ndarray, " response"]
    fired_at: Int[np.ndarray, " response"]

    def select(self, rows: Shaped[np.ndarray, " row"]) -> "Outcomes":
        """Some of the responses."""
        return Outcomes(self.is_positive[rows], self.tokens[rows], self.fired_at[rows])

    @property
    def fired(self) -> Bool[np.ndarray, " response"]:
        """Whether the rule fired at all."""
        return self.fired_at > 0


def outcomes(rule: StreamingRule, scores: Scores, responses: Responses) -> Outcomes:
    """Where the rule fires on each response."""
    fired_at = [rule.first_firing(own) or 0 for own in scores]
    return Outcomes(responses.is_positive, responses.tokens, np.array(fired_at, dtype=np.int64))


def precision(these: Outcomes) -> float:
    """Share of firings that are right; NaN without any."""
    return _mean(these.is_positive[these.fired])


def recall(these: Outcomes) -> float:
    """Share of the positive responses that are caught before they end."""
    return _mean(these.fired[these.is_positive])


def f1(these: Outcomes) -> float:
    """Harmonic mean of precision and recall, response by response."""
    hits = int((these.fired & these.is_positive).sum())
    return 2 * hits / max(1, int(these.fired.sum()) + int(these.is_positive.sum()))


def median_delay(these: Outcomes) -> float:
    """Tokens read when a positive response is caught, half of the time or more."""
    return _percentile(these.fired_at[these.fired & these.is_positive], 50)


def late_delay(these: Outcomes) -> float:
    """Tokens read when nine of ten positive responses that are caught at all are caught."""
    return _percentile(these.fired_at[these.fired & these.is_positive], 90)


def false_alarms(these: Outcomes) -> float:
    """Firings per 1,000 tokens read of the other responses; each is read until it fires."""
    other = these.select(np.flatnonzero(~these.is_positive))
    read = np.where(other.fired, other.fired_at, other.tokens).sum()
    return _PER_TOKENS * int(other.fired.sum()) / max(1, int(read))


FIGURES: dict[str, Callable[[Outcomes], float]] = {
    "F1": f1,
    "precision": precision,
    "recall": recall,
    "delay, median": median_delay,
    "delay, 90 %": late_delay,
    "false alarms per 1,000 tokens": false_alarms,
}


@dataclass(frozen=True)
class Estimate:
    """A figure, mean over seeds, with its 95 % interval over prompts and seeds.

    None stands for what is undefined, such as a delay where nothing is caught.
    """

    value: float | None
    low: float | None
    high: float | None


def estimates(
    by_seed: Sequence[Outcomes], prompts: Int[np.ndarray, " response"], *, seed: int = 0
) -> dict[str, Estimate]:
    """Every figure, bootstrapped: prompts with all their responses, and seeds, drawn again.

    Args:
        by_seed: Of one detector, for each training seed.
        prompts: Number of each response's prompt.
        seed: Of the resamples.
    """
    generator = np.random.default_rng(seed)
    rows = [np.flatnonzero(prompts == prompt) for prompt in np.unique(prompts)]
    drawn: list[dict[str, float]] = []
    for _ in range(_RESAMPLES):
        chosen = np.concatenate([rows[i] for i in generator.integers(len(rows), size=len(rows))])
        seeds = generator.integers(len(by_seed), size=len(by_seed))
        drawn.append(_means([by_seed[i].select(chosen) for i in seeds]))
    whole = _means(by_seed)
    return {name: _estimate(whole[name], [one[name] for one in drawn]) for name in FIGURES}


def _means(by_seed: Sequence[Outcomes]) -> dict[str, float]:
    return {
        name: float(np.mean([figure(these) for these in by_seed]))
        for name, figure in FIGURES.items()
    }


def _estimate(value: float, drawn: Sequence[float]) -> Estimate:
    if np.isnan(value):
        return Estimate(None, None, None)
    defined = [one for one in drawn if not np.isnan(one)]
    low, high = np.percentile(defined, _INTERVAL)
    return Estimate(value, float(low), float(high))


def _mean(values: Bool[np.ndarray, " _"]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _percentile(values: Int[np.ndarray, " _"], percent: int) -> float:
    return float(np.percentile(values, percent)) if len(values) else float("nan")


_THRESHOLDS = (*(round(0.05 * step, 2) for step in range(1, 20)), 0.97, 0.99)
_CONSECUTIVE = (1, 2, 3, 5, 8)
_WARM_UPS = (0, 4, 8, 16)
# A rule this much worse in F1 is as good, if it fires sooner.
_NEAR_BEST = 0.01

# What a running score may be judged by, and what a single score is.
RUNNING = tuple(
    StreamingRule(threshold, consecutive, warm_up)
    for threshold, consecutive, warm_up in product(_THRESHOLDS, _CONSECUTIVE, _WARM_UPS)
)
SINGLE = tuple(StreamingRule(threshold, consecutive=1) for threshold in _THRESHOLDS)
HALF = (StreamingRule(0.5, consecutive=1),)


def choose_rule(
    candidates: Sequence[StreamingRule], scores: Scores, responses: Responses
) -> StreamingRule:
    """Of the rules with almost the best F1, the one that fires soonest.

    How soon is the mean number of tokens read of the positive responses, whole ones where the rule
    does not fire. Of rules that are equal in this too, the one with the fewest false alarms.

    Args:
        candidates: To choose from.
        scores: Running scores of validation responses.
        responses: The same responses.
    """
    found = [outcomes(rule, scores, responses) for rule in candidates]
    quality = [f1(these) for these in found]
    good = [i for i, value in enumerate(quality) if value >= max(quality) - _NEAR_BEST]

    def cost(i: int) -> tuple[float, float]:
        these = found[i].select(np.flatnonzero(responses.is_positive))
        read = np.where(these.fired, these.fired_at, these.tokens)
        return float(read.mean()), false_alarms(found[i])

    return candidates[min(good, key=cost)]


@dataclass(frozen=True)
class Row:
    """One detector on the test responses.

    Attributes:
        title: Its name.
        rules: The chosen rule of each training seed.
        figures: With intervals.
        recalls: Share that is caught of each positive label of the data.
        caught: Share of the positive responses that are caught after each token.
        alarmed: Share of the others on which it fired after each token.
    """

    title: str
    rules: tuple[StreamingRule, ...]
    figures: Mapping[str, Estimate]
    recalls: Mapping[str, float]
    caught: tuple[float, ...]
    alarmed: tuple[float, ...]


@dataclass(frozen=True)
class Record:
    """What was measured, and on what.

    Attributes:
        conditions: Of the run.
        rows: The detectors.
    """

    conditions: Mapping[str, str | int]
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """Everything, for programs."""
        rows = [asdict(row) for row in self.rows]
        content = {"conditions": dict(self.conditions), "rows": rows}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """The conditions in a line, the figures, and the rules."""
        line = ", ".join(f"{name} {value}" for name, value in self.conditions.items())
        figures = [["detector", *FIGURES]]
        figures += [
            [row.title, *(_cell(row.figures[name]) for name in FIGURES)] for row in self.rows
        ]
        labels = list(self.rows[0].recalls)
        details = [["detector", "rule of each seed", *(f"recall of {label}" for label in labels)]]
        details += [
            [row.title, _rules(row), *(f"{row.recalls[label]:.3f}" for label in labels)]
            for row in self.rows
        ]
        return "\n\n".join([line, _table(figures), _table(details)]) + "\n"

    def save(self, directory: Path) -> None:
        """Writes ``streaming.json`` and ``streaming.md``; the folder is made if absent."""
        write_text(directory / "streaming.json", self.to_json())
        write_text(directory / "streaming.md", self.to_markdown())


def _cell(estimate: Estimate) -> str:
    return " ".join(
        [_number(estimate.value), f"[{_number(estimate.low)}, {_number(estimate.high)}]"]
    )


def _number(value: float | None) -> str:
    """Shares with three digits, counts of tokens with one."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 2 else f"{value:.1f}"


def _rules(row: Row) -> str:
    said = [
        f"{rule.consecutive} at {rule.threshold:g}, warm-up {rule.warm_up}" for rule in row.rules
    ]
    return "; ".join(said)


def _table(lines: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in lines[0][1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))


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


# matplotlib leaves the types of **kwargs open.
# pyright: reportUnknownMemberType=false


# Okabe & Ito's palette, told apart with any colour vision.
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")


def plot_streaming(record: Record, directory: Path) -> Path:
    """Draws ``streaming.png``: solid lines for what is to be caught, dotted ones for the rest.

    Args:
        record: Of a comparison.
        directory: Where to write; made if absent.
    """
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for row, colour in zip(record.rows, _COLOURS, strict=True):
        tokens = range(1, len(row.caught) + 1)
        axes.step(tokens, row.caught, where="post", color=colour, linewidth=1.8, label=row.title)
        axes.step(tokens, row.alarmed, where="post", color=colour, linewidth=1.2, linestyle=":")
    axes.set_xscale("log")
    axes.set(xlabel="Tokens of the response", ylabel="Share of responses caught", ylim=(0, 1))
    axes.set_title("To be caught (solid), and the others: false alarms (dotted)", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    return save_figure(figure, directory / "streaming.png")
