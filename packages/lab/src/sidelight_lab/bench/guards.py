"""Quality of the ready guards on public tests, next to rivals and published figures."""

import json
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sidelight.data.evaluation import Estimate
from sidelight.data.examples import Example, LabelledExamples
from sidelight.data.guards import Guard, draw_texts, find_guard, guard_names
from sidelight.data.loading import load_examples
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.errors import SidelightError, did_you_mean
from sidelight.models.conversation import Reads
from sidelight.probes.mechanisms.base import mechanism_spec
from sidelight.probes.probe import Probe
from sidelight.progress import progress, quiet
from sidelight.states.cache import Shard
from sidelight.states.extraction import shard_logits
from sidelight.statistics.calibration import Calibration
from sidelight.statistics.metrics import decide, measure_resamples
from sidelight.statistics.thresholds import choose_thresholds
from sidelight.storage import write_json
from sidelight.training.background import Background, Messages, choose_conversations
from sidelight.training.dataset import Split, make_split
from sidelight.training.fit import fit
from sidelight.training.settings import (
    AUTO,
    READS,
    FitOptions,
    named_mechanism,
    suggested_settings,
)
from sidelight.types import Task
from sidelight_lab.baselines.encoders import packaged_encoder
from sidelight_lab.bench.defaults import fit_rival
from sidelight_lab.bench.measurement import Record, conditions, table
from sidelight_lab.tables.runs import digest

OURS = "ours"
# Trained by gradient descent, so each seed gives another; in the paper on texts alone.
_PAPER = ("pooling", "gate", "attention")
RIVALS = (*_PAPER, "mean_last_layer", "means_all_layers", "tfidf", "encoder")
# Parts of the background by source, one of which is held out, and its conversations to measure on.
_FOLDS, _CONVERSATIONS = 4, 400
# False-positive rates on background traffic.
_RATES = (0.01, 0.04)
_AT_RATES = tuple(f"recall at {rate:.0%} of traffic" for rate in _RATES)
_TRAFFIC = "traffic flagged"
METRICS = ("auroc", "recall", "false alarms", *_AT_RATES)
_RESAMPLES = 1000
# A figure on the texts and, if it has an interval, on resamples of them.
Draws = Mapping[str, Float[np.ndarray, " draw"]]
_UNDEFINED = np.array([np.nan])
_HOW = (
    "Recall and false alarms are shares of the positive and of the other texts that a row flags at "
    "the threshold that its training chose. Traffic is background conversations of sources that no "
    "row was trained on, or of a guard of answers, the answers in them: how many are flagged at "
    "that threshold, and the recall where at most 1 % or 4 % of them are flagged. `ours` is what "
    "`sidelight train --data guard:NAME` makes; other rows are trained on the same texts, alone. "
    "AUROC has its 95 % bootstrap interval over test texts; figures are means over draws and seeds."
)

_Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishedResult(_Strict):
    """A published result of another guard on a test.

    Attributes:
        guard: Name of the guard.
        source: Source of the figure.
        second_hand: Whether the source was only read as a quotation.
    """

    guard: str
    recall: _Share | None = None
    false_alarms: _Share | None = None
    accuracy: _Share | None = None
    source: str
    second_hand: bool = False


class Published(_Strict):
    """Published results of other guards on a test.

    Attributes:
        computed: How the figures were computed, in a sentence.
        cautions: Caveats for the comparison.
    """

    computed: str
    results: tuple[PublishedResult, ...]
    cautions: tuple[str, ...] = ()


def published_results() -> Mapping[str, Mapping[str, Published]]:
    """By guard and test."""
    text = (files("sidelight_lab.bench") / "guards.toml").read_text("utf-8")
    return TypeAdapter(dict[str, dict[str, Published]]).validate_python(tomllib.loads(text))


@dataclass(frozen=True)
class Row:
    """A trained row; for a probe, with one seed.

    Attributes:
        logits: Function that returns the logits of texts.
    """

    name: str
    calibration: Calibration
    thresholds: tuple[float, ...]
    logits: Callable[[Split], Float[np.ndarray, "text 1"]]

    @property
    def threshold(self) -> float:
        return self.thresholds[0]

    def score(self, split: Split) -> Float[np.ndarray, " text"]:
        """The probability that each text is positive."""
        return self.calibration.apply(self.logits(split))[:, 0]


@dataclass(frozen=True)
class Texts:
    """The texts for training and measuring a guard's rows.

    Attributes:
        training: Texts that all rows are trained on.
        background: Background that our rows are also trained in.
        traffic: Background conversations, or their responses, from sources not used in either.
    """

    training: LabelledExamples
    background: Background
    traffic: LabelledExamples

    @staticmethod
    def of(name: str, background: Background, rows: int | None, draw: int = 0) -> "Texts":
        """A draw of the training texts; the rest is the same for all draws."""
        examples = load_examples(f"guard:{name}")
        reads_answers = examples.items[0].response is not None
        sources = [str(cells.get("source")).removeprefix("background:") for cells in examples.rows]
        left_out = background.split_into(_FOLDS)[-1]
        if reads_answers:
            # No context of an answer is trained on: all but the sources of its texts are unseen.
            left_out = background.select(
                row
                for row, source in enumerate(background.sources or ("",) * len(background))
                if source not in sources
            )
        unseen = {*left_out.conversations}
        hidden = {*(left_out.sources or ())}
        texts = examples.select(row for row, source in enumerate(sources) if source not in hidden)
        drawn = draw_texts(texts, rows or len(texts), seed=draw)
        training_background = background.select(
            row for row, turns in enumerate(background.conversations) if turns not in unseen
        )
        conversations = choose_conversations(left_out, texts).conversations
        items = map(_answered if reads_answers else Example, conversations)
        chosen_items = tuple(item for item in items if item is not None)[:_CONVERSATIONS]
        negative = np.zeros(len(chosen_items), np.int64)
        traffic = LabelledExamples(
            chosen_items, ({},) * len(chosen_items), task=drawn.task, labels=negative
        )
        return Texts(drawn, training_background, traffic)


def _answered(turns: Messages) -> Example | None:
    """The last response of a conversation and its prompt; None if there is none."""
    answers = [i for i, turn in enumerate(turns) if i and turn.role == "assistant" and turn.content]
    return Example(turns[: answers[-1]], turns[answers[-1]].content) if answers else None


def measure_guards(
    backbone: TransformersBackbone,
    names: Sequence[str],
    *,
    background: Background,
    rivals: Sequence[str],
    seeds: int,
    out: Path,
    draws: int = 1,
    rows: int | None = None,
    options: FitOptions | None = None,
) -> Record:
    """Train all rows of each guard, then open its tests.

    Args:
        backbone: The frozen LLM.
        names: Names of guards; empty means all that classify whole texts.
        background: Background traffic, part of which is held out for measurement.
        rivals: Some of ``RIVALS``.
        seeds: Seeds of the probes; other rows have one.
        draws: Number of draws of ``rows`` texts, each with different texts.
        out: Folder of the results of finished guards, which are not repeated, and, until the end,
            of the hidden states.
        rows: Maximum training texts per guard.
        options: Training options of probes; None uses the defaults.
    """
    for rival in rivals:
        if rival not in RIVALS:
            raise SidelightError(f"Unknown rival '{rival}'.{did_you_mean(rival, RIVALS)}")
    if draws > 1 and rows is None:
        raise SidelightError(
            "Several draws of all texts would be identical. Draw fewer with --rows."
        )
    chosen_options = options or FitOptions()
    # If no guard is installed, the error says what to install.
    installed = guard_names() or ["injection"]
    guards = {name: find_guard(name) for name in names or installed}
    of_spans = [name for name, guard in guards.items() if guard.card.labels is None]
    for name in of_spans if names else ():
        raise SidelightError(
            f"The guard '{name}' labels spans. Measure it with `sidelight bench spans --data "
            f"guard:{name} --test guard:{name}:TEST --out {name}`."
        )
    guards = {name: guard for name, guard in guards.items() if name not in of_spans}
    notes = [f"{name} labels spans: `sidelight bench spans` measures it." for name in of_spans]
    if "encoder" in rivals:
        try:
            packaged_encoder()
        except SidelightError as error:
            notes.append(f"The row 'encoder' is left out: {error}")
            rivals = [rival for rival in rivals if rival != "encoder"]
    found: dict[str, Any] = {}
    fits = draws * (seeds * (1 + len({*rivals} & {*_PAPER})) + len({*rivals} - {*_PAPER}))
    steps = sum(fits + 1 + len(guard.card.tests) for guard in guards.values())
    with progress("Measuring guards", steps, unit="steps") as advance, quiet():
        for name, guard in guards.items():
            who = {
                "sidelight": version("sidelight"),
                "backbone": asdict(backbone.fingerprint),
                "files": {
                    path.name: sha256(path.read_bytes()).hexdigest()
                    for path in sorted(guard.folder.glob("*.gz"))
                },
                "background": [background.conversations, background.sources],
                "options": repr(chosen_options),
                "rows": (rows, draws, seeds, *rivals),
            }
            path = out / "guards" / f"{name}-{digest(who)[:12]}.json"
            if path.exists():
                advance(fits + 1 + len(guard.card.tests))
            else:
                texts = [Texts.of(name, background, rows, draw) for draw in range(draws)]
                options = replace(
                    chosen_options,
                    reads=replace(READS, side=guard.card.reads),
                    cache_root=out / "states" / name,
                    keep_cache=True,
                )
                done = partial(advance, 1)
                write_json(path, _measure(backbone, guard, texts, rivals, seeds, options, done))
            found[name] = json.loads(path.read_text("utf-8"))
    shutil.rmtree(out / "states", ignore_errors=True)
    settings = {"rows": rows or "all", "draws": draws, "seeds": seeds}
    sections = [_HOW, *notes]
    for name, results in found.items():
        sections += guard_sections(name, results)
    return Record("guards", conditions(backbone, settings), {"guards": found}, sections)


def _measure(
    backbone: TransformersBackbone,
    guard: Guard,
    draws: Sequence[Texts],
    rivals: Sequence[str],
    seeds: int,
    options: FitOptions,
    done: Callable[[], object],
) -> dict[str, Any]:
    """Metrics of all rows of a guard by test, as means over draws and seeds."""
    texts, states_root = draws[0], options.cache_root
    assert states_root is not None
    task, rows = texts.training.task, list[Row]()
    for drawn in draws:
        for row in (OURS, *(rival for rival in rivals if rival in _PAPER)):
            for seed in range(seeds):
                rows.append(_probe(backbone, row, drawn, options, seed))
                done()
        without_context = make_split(backbone, drawn.training, options)
        for rival in rivals:
            if rival not in _PAPER:
                rows.append(_rival(rival, without_context, backbone))
                done()
    # Prediction never truncates.
    options = replace(options, max_tokens=backbone.encoder.max_tokens)
    traffic = [np.empty(0) for _ in rows]
    if len(texts.traffic):
        # States of traffic serve all guards that read the same side.
        traffic_options = replace(options, cache_root=states_root.with_name("traffic"))
        split = make_split(backbone, texts.traffic, traffic_options)
        traffic = [row.score(split) for row in rows]
    done()
    tests: dict[str, Any] = {}
    metrics: list[dict[str, Draws]] = []
    # Every row reads a test before the next test, so only the states of one test take space.
    for_test = replace(options, cache_root=states_root / "test")
    for test, about in guard.card.tests.items():
        tested = load_examples(f"guard:{guard.name}:{test}", task=task)
        split = make_split(backbone, tested, for_test)
        scores = [row.score(split) for row in rows]
        shutil.rmtree(states_root / "test")
        metrics.append(measure_rows(rows, scores, tested.labels, traffic, task))
        tests[test] = {
            "title": about.title,
            "drawn": about.drawn,
            "texts": dict(zip(task.labels, tested.label_counts.tolist(), strict=True)),
            "rows": {row: _summary(values) for row, values in metrics[-1].items()},
        }
        done()
    shutil.rmtree(states_root, ignore_errors=True)
    flagged: dict[str, list[float]] = {}
    for row, values in zip(rows, traffic, strict=True):
        if len(values):
            flagged.setdefault(row.name, []).append(float((values >= row.threshold).mean()))
    names = dict.fromkeys(row.name for row in rows)
    return {
        "texts": dict(zip(task.labels, texts.training.label_counts.tolist(), strict=True)),
        "traffic": len(texts.traffic),
        "mean": {
            row: _summary(_mean_of_tests([values[row] for values in metrics])) for row in names
        },
        _TRAFFIC: {row: float(np.mean(shares)) for row, shares in flagged.items()},
        "tests": tests,
    }


def _probe(
    backbone: TransformersBackbone, name: str, texts: Texts, options: FitOptions, seed: int
) -> Row:
    """The default probe of ``sidelight train``, or a mechanism trained as in the paper."""
    spec = mechanism_spec(named_mechanism(AUTO) if name == OURS else name)
    settings = replace(options.settings or suggested_settings(spec.name), seed=seed)
    options = replace(options, mechanism=spec, settings=settings)
    if name == OURS:
        options = replace(options, background=texts.background)
    else:
        options = replace(
            options,
            settings=settings.changed(normalise=False),
            reads=Reads(options.reads.side),
        )
    probe = fit(backbone, texts.training, None, name="guard", options=options).probe
    return Row(name, probe.calibration, probe.thresholds, partial(_served_logits, probe))


def _served_logits(probe: Probe, split: Split) -> Float[np.ndarray, "text 1"]:
    """The highest logit of each text and its separately classified parts."""
    logits: list[np.ndarray] = []
    for row, segments in enumerate(split.segments):
        hidden = split.states.text(row)
        inputs = [hidden, *(hidden[:, segment] for segment in segments if probe.classifies_turns)]
        logits.append(shard_logits(probe, Shard.joined(dict(enumerate(inputs)))).max(0))
    return np.stack(logits)


def _rival(name: str, without_context: Split, backbone: TransformersBackbone) -> Row:
    task, fitted = without_context.task, fit_rival(name, without_context, backbone)
    calibration = fitted.calibration(task)
    thresholds = choose_thresholds(task, calibration.apply(fitted.logits), fitted.labels)
    return Row(name, calibration, thresholds, fitted.score)


def measure_rows(
    rows: Sequence[Row],
    scores: Sequence[Float[np.ndarray, " text"]],
    labels: np.ndarray,
    traffic: Sequence[Float[np.ndarray, " conversation"]],
    task: Task,
) -> dict[str, Draws]:
    """Metrics of each row on a test, as means over its draws and seeds.

    Args:
        rows: Rows, each with one seed.
        scores: Scores of the test's texts, by row.
        labels: Labels of these texts.
        traffic: Scores of background traffic, by row.
        task: The classes.
    """
    holds, by_row = labels == 1, dict[str, list[Draws]]()
    for row, values, background in zip(rows, scores, traffic, strict=True):
        flags = values >= row.threshold
        metrics = {"auroc": _UNDEFINED, "recall": _share(flags[holds])}
        metrics["false alarms"] = _share(flags[~holds])
        if 0 < holds.sum() < len(holds):
            decided = decide(task, values[:, None], labels, thresholds=row.thresholds)
            metrics["auroc"] = measure_resamples(decided, resamples=_RESAMPLES, seed=0)["auroc"]
        for name, rate in zip(_AT_RATES, _RATES, strict=True):
            metrics[name] = _UNDEFINED
            if len(background):
                # At most this share of them is higher.
                bound = np.sort(background)[::-1][int(rate * len(background))]
                metrics[name] = _share((values > bound)[holds])
        by_row.setdefault(row.name, []).append(metrics)
    return {
        name: {figure: np.mean([values[figure] for values in seeds], 0) for figure in METRICS}
        for name, seeds in by_row.items()
    }


def _share(flags: Bool[np.ndarray, " text"]) -> Float[np.ndarray, " draw"]:
    return np.array([flags.mean()]) if len(flags) else _UNDEFINED


def _mean_of_tests(tests: Sequence[Draws]) -> Draws:
    """Over the tests that have a figure."""
    means: dict[str, np.ndarray] = {}
    for figure in METRICS:
        defined = [metrics[figure] for metrics in tests if not np.isnan(metrics[figure][0])]
        means[figure] = np.mean(defined, 0) if defined else _UNDEFINED
    return means


def _summary(metrics: Draws) -> dict[str, Any]:
    return {name: Estimate.of(draws).to_dict() for name, draws in metrics.items()}


def guard_sections(name: str, measured: Mapping[str, Any]) -> list[str]:
    """A guard's tables: the means over tests, then each test with published results."""
    tests, published = measured["tests"], published_results().get(name, {})
    flagged = {row: _share_cell(share) for row, share in measured[_TRAFFIC].items()}
    size = f"{_counts(measured['texts'])} texts, {measured['traffic']} of background traffic"
    title = f"{name}: mean over {len(tests)} tests ({size})"
    sections = [_table(title, measured["mean"], {_TRAFFIC: flagged})]
    for test, results in tests.items():
        drawn = f"; {results['drawn']}" if results["drawn"] else ""
        title = f"{name}:{test}: {results['title']} ({_counts(results['texts'])}{drawn})"
        sections.append(_table(title, results["rows"]))
        if (guard_results := published.get(test)) is None:
            sections.append("No comparable figure of another guard was found for this test.")
            continue
        lines = [
            [
                one.guard,
                *(_share_cell(share) for share in (one.recall, one.false_alarms, one.accuracy)),
                f"{one.source}{', second hand' if one.second_hand else ''}",
            ]
            for one in guard_results.results
        ]
        headings = ["guard", "recall", "false alarms", "accuracy", "source"]
        sections.append(table(f"{name}:{test}: other guards, as published", headings, lines))
        sections.append(
            "\n".join(f"- {note}" for note in (guard_results.computed, *guard_results.cautions))
        )
    return sections


def _table(
    title: str, rows: Mapping[str, Any], more: Mapping[str, Mapping[str, str]] | None = None
) -> str:
    more = more or {}
    lines = [
        [
            row,
            *(str(Estimate(metrics[name]["value"], *metrics[name]["ci"])) for name in METRICS),
            *(column.get(row, "-") for column in more.values()),
        ]
        for row, metrics in rows.items()
    ]
    return table(title, ["row", *METRICS, *more], lines)


def _counts(texts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {label}" for label, count in texts.items())


def _share_cell(share: float | None) -> str:
    return str(Estimate(share, None, None))
