"""Whether labels in the order of ``sidelight label`` make a better probe than random ones."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from sidelight.artifact import load_probe
from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError
from sidelight.evaluation import evaluate
from sidelight.labelling.file import LabelFile
from sidelight.labelling.pool import Pool, folds_of
from sidelight.labelling.queue import LabelQueue, shuffled
from sidelight.probe import Probe
from sidelight.prompts import Reads

FIGURES = ("auprc", "f1", "accuracy", "ece")
# Labels between two trainings.
_BATCH = 20


def compare_orders(
    backbone: TransformersBackbone,
    training: LabelledExamples,
    test: LabelledExamples,
    *,
    counts: Sequence[int],
    seeds: int,
    max_tokens: int,
    root: Path,
) -> list[dict[str, Any]]:
    """Figures on the test texts of a probe of so many labels, in each order and with each seed.

    Labels are those of the file. In the order of the queue, a probe is trained every 20 labels.

    Args:
        backbone: The frozen LLM.
        training: The texts to label.
        test: The texts to measure on.
        counts: Numbers of labels, rising.
        seeds: Different first orders.
        max_tokens: Longer texts are cut.
        root: The folder of what the model read.
    """
    training = _distinct(training)
    if len(training) < max(counts):
        raise SidelightError(
            f"Got {len(training)} texts, wanted {max(counts)} to label. Give more data, or fewer "
            "--counts."
        )
    task, reads = training.task, Reads(scope="conversation")
    pool, judged = (
        Pool(backbone, own, task, reads=reads, root=root, max_tokens=max_tokens)
        for own in (training, test)
    )
    found: list[dict[str, Any]] = []
    for seed, (order, label) in product(range(seeds), _ORDERS.items()):
        for rows, probe in label(pool, training, sorted(counts), seed):
            report = evaluate(
                task,
                judged.probabilities(probe),
                test.labels,
                thresholds=probe.thresholds,
                bootstrap=0,
            )
            found.append(
                {
                    "labels": len(rows),
                    "order": order,
                    "seed": seed,
                    "of the rarest": int(training.select(rows).label_counts.min()),
                    **{name: report.metrics[name].value for name in FIGURES},
                }
            )
    return found


def _distinct(examples: LabelledExamples) -> LabelledExamples:
    """Each text once, as a queue shows it."""
    first: dict[object, int] = {}
    for row, item in enumerate(examples.items):
        first.setdefault((item.messages, item.response), row)
    return examples.select(first.values())


def _at_random(
    pool: Pool, training: LabelledExamples, counts: Sequence[int], seed: int
) -> Iterator[tuple[list[int], Probe]]:
    order = shuffled(training, seed)
    for count in counts:
        rows = order[:count]
        labelled = training.select(rows)
        if folds_of(labelled):
            fitted, _ = pool.fit(rows, labelled, name="random")
            yield rows, fitted.probe


def _by_queue(
    pool: Pool, training: LabelledExamples, counts: Sequence[int], seed: int
) -> Iterator[tuple[list[int], Probe]]:
    names = training.label_names()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "probe"
        with closing(LabelFile(Path(scratch) / "labels.jsonl")) as file:
            queue = LabelQueue(pool, file, column="label", labelled={}, folder=folder, seed=seed)
            for done in range(1, counts[-1] + 1):
                row = queue.next()
                assert row is not None
                queue.label(row, names[row])
                if (done % _BATCH == 0 or done in counts) and not queue.obstacle:
                    queue.train()
                    if done in counts:
                        yield [*queue.decided], load_probe(folder)


_ORDERS = {"random": _at_random, "queue": _by_queue}


def orders_table(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Mean and standard deviation over seeds, by number of labels and order."""
    rows: list[list[str]] = []
    for labels in sorted({one["labels"] for one in found}):
        for order in _ORDERS:
            own = [one for one in found if (one["labels"], one["order"]) == (labels, order)]
            if own:
                cells = [_spread([one[name] for one in own]) for name in FIGURES]
                rarest = f"{np.mean([one['of the rarest'] for one in own]):.0f}"
                rows.append([str(labels), order, str(len(own)), rarest, *cells])
    return rows


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"
