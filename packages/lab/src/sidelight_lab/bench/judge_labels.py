"""Effect of a judge's wrong labels on a probe, simulated by flipping some of people's labels.

A judge's errors are mostly one-sided, so all flips have one direction: missed positives, or
negatives labelled as positive.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from sidelight.data.examples import Examples
from sidelight.data.loading import load_examples
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.errors import SidelightError
from sidelight.models.conversation import Reads
from sidelight.storage import write_json
from sidelight.training.settings import FitOptions
from sidelight.types import Task
from sidelight_lab.bench.measurement import Record, conditions, table
from sidelight_lab.tables.runs import digest
from sidelight_label.agreement import doubtful
from sidelight_label.pool import Pool, merged

DIRECTIONS = {"missed": True, "false alarms": False}


def measure_flips(
    backbone: TransformersBackbone,
    source: str,
    *,
    text: str,
    label: str,
    positive: str,
    test: str,
    texts: int,
    tested: int,
    flips: Sequence[int],
    draws: int,
    cache: Path,
    out: Path,
) -> Record:
    """Train the probe of ``sidelight label`` on flipped labels, and measure it on true ones.

    Args:
        backbone: The frozen LLM.
        source: Training texts to draw from.
        text: Column of the texts.
        label: Column of the labels.
        positive: The positive label; all others are negative.
        test: Texts to measure on.
        texts: Training texts per draw.
        tested: Maximum number of texts to measure on.
        flips: Shares of a label to flip, in percent.
        draws: Number of draws of flips.
        cache: Folder for the vectors of texts.
        out: File of the results of finished draws, which are not repeated.

    Raises:
        SidelightError: A file lacks the label.
    """
    training, held_out = (
        _drawn(load_examples(name, text=text, label=None), count)
        for name, count in ((source, texts), (test, tested))
    )
    both = Examples(training.items + held_out.items, training.rows + held_out.rows)
    examples, _ = merged(both, None)
    known = {item.messages for item in training.items}
    is_positive = np.array([str(row[label]) == positive for row in examples.rows])
    learnt = [n for n, item in enumerate(examples.items) if item.messages in known]
    measured = np.setdiff1d(np.arange(len(examples)), learnt)
    if not (is_positive[learnt].any() and is_positive[measured].any()):
        raise SidelightError(
            f"No text has the label '{positive}'. Name another label with --positive."
        )
    task = Task("binary", ("rest", positive if positive != "rest" else "positive"))
    options = FitOptions(reads=Reads(scope="conversation"), cache_root=cache)
    pool = Pool(backbone, examples, task, options)
    settings = {
        "data": Path(source).parent.name,
        "positive": positive,
        "training texts": len(learnt),
        "of them positive": int(is_positive[learnt].sum()),
        "test texts": len(measured),
        "draws": draws,
    }
    metrics: list[dict[str, Any]] = []
    runs = [(None, 0, 0)] + [
        (direction, share, draw)
        for direction in DIRECTIONS
        for share in flips
        if share
        for draw in range(draws)
    ]
    for direction, share, draw in runs:
        description = {name: value for name, value in settings.items() if name != "draws"}
        key = {**description, "model": backbone.fingerprint.digest, "run": [direction, share, draw]}
        path = out / "runs" / f"{digest(key)[:16]}.json"
        if not path.is_file():
            truth = {row: bool(is_positive[row]) for row in learnt}
            classified = _flipped(truth, direction, share, draw)
            write_json(path, _measure(pool, truth, classified, is_positive, measured))
        each = json.loads(path.read_text())
        metrics.append({"direction": direction, "share": share, "draw": draw, **each})
    return Record(
        Path(source).parent.name,
        conditions(backbone, settings),
        {"runs": metrics},
        (_table(metrics),),
    )


def _drawn(examples: Examples, count: int) -> Examples:
    return examples.select(examples.draw(min(count, len(examples)), seed=0))


def _flipped(
    truth: Mapping[int, bool], direction: str | None, share: int, draw: int
) -> dict[int, bool]:
    """The labels with a share of one label flipped."""
    if direction is None:
        return dict(truth)
    rows = [row for row, is_positive in truth.items() if is_positive == DIRECTIONS[direction]]
    random = np.random.default_rng([draw, share])
    wrong = {*random.choice(rows, round(len(rows) * share / 100), replace=False).tolist()}
    return {row: is_positive != (row in wrong) for row, is_positive in truth.items()}


def _measure(
    pool: Pool,
    truth: Mapping[int, bool],
    classified: Mapping[int, bool],
    is_positive: np.ndarray,
    measured: np.ndarray,
) -> dict[str, Any]:
    """Measure the probe on the judge's labels, and the one after a person has corrected doubtful
    labels.
    """

    def fitted(labels: Mapping[int, bool]) -> tuple[np.ndarray, float]:
        decided = {row: int(each) for row, each in labels.items()}
        scores = pool.fit(decided, name="flips", labelling="")[0].probabilities[:, 0]
        return scores, float(average_precision_score(is_positive[measured], scores[measured]))

    scores, auprc = fitted(classified)
    seen = doubtful(scores, classified)
    corrected = {**classified, **{row: truth[row] for row in seen}}
    again = auprc if corrected == classified else fitted(corrected)[1]
    wrong = [row for row in classified if classified[row] != truth[row]]
    return {
        "auprc": auprc,
        "corrected": again,
        "wrong": len(wrong),
        "doubtful": len(seen),
        "found": len({*wrong} & {*seen}),
    }


def _table(metrics: Sequence[Mapping[str, Any]]) -> str:
    clean = metrics[0]
    rows: list[list[str]] = []
    for direction, share in dict.fromkeys((each["direction"], each["share"]) for each in metrics):
        each = [one for one in metrics if (one["direction"], one["share"]) == (direction, share)]
        average = {name: mean(one[name] for one in each) for name in clean if name in _AVERAGED}
        rows.append(
            [
                f"{share} % {direction}" if direction else "none",
                f"{average['auprc']:.3f}",
                f"{average['auprc'] - clean['auprc']:+.3f}",
                f"{average['corrected']:.3f}",
                f"{average['corrected'] - clean['auprc']:+.3f}",
                f"{average['wrong']:.0f}",
                f"{average['doubtful']:.0f}",
                f"{average['found']:.0f}",
            ]
        )
    headings = [
        "flipped",
        "AUPRC",
        "change",
        "after a person saw the doubtful ones",
        "change",
        "wrong labels",
        "doubtful",
        "of them wrong",
    ]
    return table("AUPRC on true labels, mean over draws", headings, rows)


_AVERAGED = frozenset({"auprc", "corrected", "wrong", "doubtful", "found"})
