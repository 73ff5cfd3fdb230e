"""Benefit of a second-stage judge by the share of texts deferred to it.

Judges are a MiniLM fine-tuned on the probe's own training texts, and the recorded responses of
GPT-4 to XSTest, where a refusal means that the prompt is harmful.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from sidelight.data.examples import LabelledExamples
from sidelight.data.loading import load_examples
from sidelight.data.readers import read_file
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.judges.fitting import DeferralReport, combined_out_of_fold, fit_judge
from sidelight.judges.settings import JudgeSettings
from sidelight.probes.probe import Probe
from sidelight.states.extraction import cached_logits, extract
from sidelight.storage import write_json
from sidelight.training.background import Background
from sidelight.training.dataset import Split, plan_split
from sidelight.training.fit import fit
from sidelight.training.preparing import prepare
from sidelight.training.settings import FitOptions
from sidelight.training.validation import complete_folds
from sidelight.types import Flags, Values
from sidelight_lab.bench.defaults import fit_rival
from sidelight_lab.bench.measurement import Record, conditions, table
from sidelight_lab.datasets import default_root

Subject = Literal["toxicchat", "xstest"]
SUBJECTS: tuple[Subject, ...] = ("toxicchat", "xstest")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
# The recorded judge's probability for a prompt, by the human label of its response.
_REFUSALS = {"1_full_compliance": 0.01, "3_partial_refusal": 0.5, "2_full_refusal": 0.99}
_JUDGES = {"toxicchat": "MiniLM, fine-tuned", "xstest": "GPT-4, recorded"}
_METRICS = ("recall_at_1pct_fpr", "auprc")
# Length to which longer texts are truncated, for both probe and judge.
_MOST_TOKENS = 256


@dataclass(frozen=True)
class _Subject:
    """Training texts to draw from, test texts, and a judge's recorded answers."""

    training: LabelledExamples
    test: LabelledExamples
    answers: Float[Values, " row"] | None = None


def measure_second_stage(
    backbone: TransformersBackbone,
    subject: Subject,
    *,
    texts: int,
    negatives: int,
    draws: int,
    out: Path,
) -> Record:
    """Measure the curve of a probe and a judge, for several draws of training texts.

    Shares refer to the negative test texts. Finished draws are not repeated.

    Args:
        backbone: The frozen LLM.
        subject: Name of the texts and the judge.
        texts: Training texts per draw.
        negatives: Number of negative test texts, drawn once; all positive texts are used.
        draws: Number of draws of training texts.
        out: Folder for the draws and for hidden states.
    """
    values = _toxicchat(negatives) if subject == "toxicchat" else _xstest()
    options = FitOptions(
        cache_root=out / "states", keep_cache=True, max_tokens=_MOST_TOKENS, background=Background()
    )
    test = plan_split(backbone, values.test, options)
    extract(backbone, test.states, title="Reading test texts")
    found: list[dict[str, Any]] = []
    for seed in range(draws):
        file = out / f"{subject}-{texts}-{negatives}-{seed}.json"
        if not file.exists():
            drawn = values.training.select(values.training.draw(texts, seed=seed).tolist())
            write_json(file, _measured(backbone, drawn, test, values.answers, options, subject))
        found.append(json.loads(file.read_text("utf-8")))
    _draw(found, out / f"second-stage-{subject}.png", subject)
    return _record(backbone, subject, found, texts=texts, draws=draws)


def _toxicchat(negatives: int) -> _Subject:
    folder = default_root() / "toxicchat0124"
    training = load_examples(folder / "train.jsonl.gz", label="toxicity")
    test = load_examples(folder / "test.jsonl.gz", label="toxicity", task=training.task)
    # Some texts are in both of the published splits.
    known = {item.text for item in training.items}
    is_new = np.array([item.text not in known for item in test.items])
    positive = np.flatnonzero(is_new & (test.labels == 1))
    rest = np.flatnonzero(is_new & (test.labels == 0))
    rest = np.random.default_rng(0).choice(rest, min(negatives, len(rest)), replace=False)
    return _Subject(training, test.select(np.sort(np.append(positive, rest)).tolist()))


def _xstest() -> _Subject:
    training = load_examples("guard:harmful")
    test = load_examples("guard:harmful:xstest", task=training.task)
    file = default_root() / "xstest_completions" / "all.jsonl.gz"
    answers = {
        str(row.cells["prompt"]).strip(): _REFUSALS[str(row.cells["final_label"])]
        for row in read_file(file)
        if row.cells["model"] == "gpt4"
    }
    # One prompt was reworded after the answers were recorded.
    rows = [row for row, item in enumerate(test.items) if item.text.strip() in answers]
    known = test.select(rows)
    return _Subject(training, known, np.array([answers[item.text.strip()] for item in known.items]))


def _measured(
    backbone: TransformersBackbone,
    drawn: LabelledExamples,
    test: Split,
    recorded: Float[Values, " row"] | None,
    options: FitOptions,
    subject: Subject,
) -> dict[str, Any]:
    """The metrics of one draw."""
    probe = fit(backbone, drawn, None, name=subject, options=options).probe
    scores = probe.calibration.apply(cached_logits(probe, test.states))[:, 0]
    answers = recorded
    if answers is None:
        dataset = prepare(backbone, drawn, None, options=options)
        rival = fit_rival("encoder", dataset.training.without_contexts(), backbone)
        answers = rival.calibration(drawn.task).apply(rival.score(test))[:, 0]
    thresholds = _thresholds(probe, scores, test.labels == 1)
    judge = JudgeSettings(
        url="http://127.0.0.1/v1", model=_JUDGES[subject], criterion=f"The text is {subject}."
    )
    report = fit_judge(
        probe,
        test.examples,
        scores,
        answers,
        judge=judge,
        thresholds=thresholds,
        share=0.05,
    )
    return {**report.to_dict(), "equal_recall": _equal_recall(probe, test, scores, answers, report)}


def _thresholds(
    probe: Probe, scores: Float[Values, " row"], holds: Bool[Flags, " row"]
) -> dict[float, float]:
    """By share of negative texts, the score from which texts are deferred, as in a policy."""
    falling = -np.sort(-scores[~holds])
    each = probe.thresholds[0]
    found = {share: float(falling[int(share * len(falling))]) for share in SHARES}
    return {share: min(each, np.nextafter(score, 1.0)) for share, score in found.items()} | {
        1.0: 0.0
    }


def _equal_recall(
    probe: Probe,
    test: Split,
    scores: Float[Values, " row"],
    answers: Float[Values, " row"],
    report: DeferralReport,
) -> dict[str, float | None]:
    """Number of negative texts flagged at the recall of the probe's own threshold."""
    holds = test.labels == 1
    wanted = float((scores[holds] >= probe.thresholds[0]).mean())
    folds = complete_folds(test.examples)
    found: dict[str, float | None] = {
        "recall": wanted,
        "probe": float((scores[~holds] >= probe.thresholds[0]).mean()),
    }
    for point in report.points:
        combined = combined_out_of_fold(scores, answers, holds, scores >= point.threshold, folds)
        falling = -np.sort(-combined[holds])
        least = falling[max(int(np.ceil(wanted * len(falling))) - 1, 0)]
        found[str(point.share)] = float((combined[~holds] >= least).mean()) if least else None
    return found


def _draw(found: list[dict[str, Any]], path: Path, subject: Subject) -> None:
    """The mean over draws, with minimum and maximum."""
    from sidelight.data.plots import plot_deferral

    def recalls(points: list[Mapping[str, Any]]) -> list[float]:
        return [float(point[_METRICS[0]]["value"]) for point in points]

    points = [
        [one["probe"] for one in found],
        *([one["points"][number] for one in found] for number in range(len(found[0]["points"]))),
    ]
    plot_deferral(
        [
            mean(point["deferred"] / one["rows"] for point, one in zip(each, found, strict=True))
            for each in points
        ],
        [(mean(recalls(each)), min(recalls(each)), max(recalls(each))) for each in points],
        probe=mean(recalls(points[0])),
        judge=mean(recalls([one["judge"] for one in found])),
        path=path,
        title=f"{subject}, judge: {_JUDGES[subject]} (mean and range of {len(found)} draws)",
    )


def _record(
    backbone: TransformersBackbone,
    subject: Subject,
    found: list[dict[str, Any]],
    *,
    texts: int,
    draws: int,
) -> Record:
    rows: list[list[str]] = [_row("probe alone", [one["probe"] for one in found], found, "probe")]
    for number, point in enumerate(found[0]["points"]):
        share, points = point["share"], [one["points"][number] for one in found]
        name = "every text" if share == 1 else f"{100 * share:g} % of negatives"
        rows.append(_row(name, points, found, str(share)))
    rows.append(_row(f"{_JUDGES[subject]} alone", [one["judge"] for one in found], found, ""))
    headings = [
        "deferred",
        "texts deferred",
        "recall at 1 % false positives",
        "AUPRC",
        "false positives at the probe's recall",
    ]
    title = (
        f"{subject}, judge: {_JUDGES[subject]}. {found[0]['rows']:,} test texts, "
        f"{found[0]['positives']:,} positive; {texts} training texts, mean ± deviation of {draws} "
        "draws"
    )
    settings = {"subject": subject, "texts": texts, "draws": draws}
    lines = table(title, headings, rows)
    return Record(
        f"second-stage-{subject}", conditions(backbone, settings), {"draws": found}, (lines,)
    )


def _row(
    name: str, points: list[Mapping[str, Any]], found: list[dict[str, Any]], key: str
) -> list[str]:
    deferred = [point["deferred"] / one["rows"] for point, one in zip(points, found, strict=True)]
    equal = [one["equal_recall"].get(key) for one in found]
    return [
        name,
        _spread([100 * share for share in deferred], "{:.0f} %"),
        *(_spread([point[metric]["value"] for point in points], "{:.3f}") for metric in _METRICS),
        _spread(equal, "{:.3f}"),
    ]


def _spread(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    if len(known) == 1 or max(known) == min(known):
        return form.format(known[0])
    return f"{form.format(mean(known))} ± {form.format(stdev(known))}"
