"""A queue on a tiny model, for the tests of the queue, of its server and of its page."""

import json
from itertools import takewhile

import numpy as np
from starlette.responses import JSONResponse

from sidelight.data.annotators import JudgeLabel
from sidelight.data.loading import load_examples
from sidelight.models.conversation import Reads
from sidelight.training.settings import FitOptions
from sidelight_label.file import Criterion, LabelFile, ReviewFile
from sidelight_label.pool import Pool, merged
from sidelight_label.queue import LabelQueue, shuffled
from sidelight_label.review import Review
from worlds.data import TASKS, planted
from worlds.judges import yes_no

READS = Reads(scope="conversation")
TOKEN = "a-token-of-this-test"


def texts_of(kind, count):
    """Texts as rows of a file, and the labels that their capitals stand for."""
    texts, numbers = planted(kind, count, seed=0)
    labels = np.array(TASKS[kind].labels)
    positions = [
        np.flatnonzero(row_labels) if kind == "multilabel" else [int(row_labels)]
        for row_labels in numbers
    ]
    rows = [{"text": f"{text} {number}", "id": number} for number, text in enumerate(texts)]
    return rows, [tuple(labels[row_labels].tolist()) for row_labels in positions]


class Sitting:
    """A queue on a tiny model, which can be left and begun again."""

    def __init__(self, tiny, folder, kind="binary", count=60, probes=()):
        self.tiny, self.folder, self.kind, self.probes = tiny, folder, kind, probes
        self.rows, self.truth = texts_of(kind, count)
        self.out = folder / "labels.jsonl"
        self.begin()

    def begin(self, **settings):
        task = TASKS[self.kind]
        self.file = LabelFile(self.out)
        labelled = load_examples(self.out, task=task) if self.out.stat().st_size else None
        examples, decided = merged(load_examples(self.rows, label=None), labelled)
        options = FitOptions(reads=READS, cache_root=self.folder / "cache", **settings)
        self.pool = Pool(self.tiny, examples, task, options, self.probes)
        self.queue = LabelQueue(
            self.pool, self.file, column="label", labelled=decided, folder=self.folder / "probe"
        )
        return self

    def label(self, count):
        """Labels the next texts truly, and says which they were."""
        rows = []
        for _ in range(count):
            row = self.queue.next()
            self.queue.label(row, self.truth[row])
            rows.append(row)
        return rows

    def probabilities(self, rows):
        """Probabilities of each text under the newest probe: `[text, output]`."""
        found = [[*[*self.queue.opinions(row).values()][-1].values()] for row in rows]
        return np.array(found)[:, -TASKS[self.kind].outputs :]

    def at_random(self):
        """The decided texts that stand before any other in the random order."""
        decided = self.queue.decided
        return [*takewhile(decided.__contains__, shuffled(self.pool.examples))]

    def read(self):
        return load_examples(self.out, task=TASKS[self.kind])


def saved_labels(sitting):
    return [json.loads(line)["label"] for line in sitting.out.read_text().splitlines()]


def displayed_text(body):
    """The text that a judge is asked about."""
    return json.loads(body["messages"][-1]["content"].split("\n")[0])["turns"][-1]["text"]


def truthful(body):
    return JSONResponse(yes_no(0.97 if "X" in displayed_text(body) else 0.02))


class ReviewSitting(Sitting):
    """A sitting with a judge, which labels texts by a criterion in a file."""

    def __init__(self, tiny, folder, judge, count):
        self.judge, self.limit = judge, None
        self.rule = folder / "rule.md"
        self.rule.write_text("The text has a capital X.\n")
        super().__init__(tiny, folder, count=count)

    def begin(self, **settings):
        task = TASKS["binary"]

        def is_classified(row):
            return JudgeLabel.of(row, is_positive=row.get("label") == "toxic") is not None

        super().begin(**settings)
        self.criterion = Criterion(self.rule)
        labelled = load_examples(self.out, task=task) if self.out.stat().st_size else None
        decided = {}
        if labelled is not None:
            each = {row["id"]: n for n, row in enumerate(self.pool.examples.rows)}
            decided = {
                each[row["id"]]: int(row["label"] == "toxic")
                for row in labelled.rows
                if not is_classified(row)
            }
        self.answers = ReviewFile(self.folder / "labels-judge.jsonl")
        self.file = LabelFile(self.out, is_classified)
        self.review = Review(
            self.pool,
            self.judge.settings(criterion=self.criterion.text),
            self.criterion,
            self.answers,
            shuffled=shuffled(self.pool.examples),
            limit=self.limit,
        )
        self.queue = LabelQueue(
            self.pool,
            self.file,
            column="label",
            labelled=decided,
            folder=self.folder / "probe",
            criterion=self.criterion,
            review=self.review,
        )
        return self

    @property
    def state(self):
        return self.review.summarise(self.queue.people)["state"]

    def check(self):
        """A person labels the blind sample truly."""
        output = []
        while (gate := self.review.gate(self.queue.people)) and gate.state == "open":
            output += self.label(len(gate.left))
        return output

    def rows_of_judge(self):
        lines = [json.loads(line) for line in self.out.read_text().splitlines()]
        return [line for line in lines if "labelled" in line]
