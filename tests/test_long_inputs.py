"""Long inputs of short texts: what is in them, what they teach, and what they never judge."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from corpora import planted
from sidelight.classifier import Classifier
from sidelight.data import load_examples
from sidelight.errors import SidelightError
from sidelight.fitting import FitOptions, fit, prepare
from sidelight.fitting.long_inputs import long_inputs
from sidelight.mechanisms import mechanism_spec

MOST = 240


def examples(count, *, seed=0, kind="binary"):
    texts, labels = planted(kind, count, seed=seed)
    return load_examples(
        [
            {"text": f"{text} {number}", "label": int(label)}
            for number, (text, label) in enumerate(zip(texts, labels, strict=True))
        ]
    )


def options(tmp_path, **given):
    spec = mechanism_spec("readout")
    return FitOptions(mechanisms=(spec,), max_tokens=MOST, cache_root=tmp_path, **given)


def test_a_text_stands_whole_among_texts_without_a_label(tiny):
    texts = examples(40)
    made = long_inputs(texts, tiny, count=31, max_tokens=MOST, seed=1)
    assert made.labels.sum() == 15
    assert (len(made), made.task) == (31, texts.task)
    labels = dict(zip([item.text for item in texts.items], texts.labels.tolist(), strict=True))
    for item, label in zip(made.items, made.labels, strict=True):
        pieces = item.text.split("\n\n")
        whole = [labels[piece] for piece in pieces if piece in labels]
        # The last piece of those around is cut.
        assert len(whole) >= len(pieces) - 1
        assert sum(whole) == label
        assert len(tiny.encoder.encode(item.messages)) <= MOST


def test_lengths_differ_and_a_seed_repeats_them(tiny):
    first, again, other = (
        long_inputs(examples(40), tiny, count=20, max_tokens=MOST, seed=seed) for seed in (1, 1, 2)
    )
    assert first.content_hash == again.content_hash != other.content_hash
    lengths = [len(tiny.encoder.encode(item.messages)) for item in first.items]
    assert min(lengths) < MOST / 2 < max(lengths)


def test_every_text_with_a_label_is_used_before_one_is_used_again(tiny):
    texts = examples(40)
    made = long_inputs(texts, tiny, count=4 * int(texts.labels.sum()), max_tokens=MOST, seed=0)
    positive = [item.text for item, label in zip(texts.items, texts.labels, strict=True) if label]
    inputs = [item.text.split("\n\n") for item in made.items]
    assert [sum(text in pieces for pieces in inputs) for text in positive] == [2] * len(positive)


def test_a_probe_that_learned_from_long_inputs_finds_more_in_them(tiny, tmp_path):
    test = long_inputs(examples(100, seed=9), tiny, count=100, max_tokens=MOST, seed=3)
    found = []
    for count in (0, 100):
        given = options(tmp_path, long_inputs=count, seeds=(0, 1, 2))
        made = fit(tiny, examples(120, seed=1), examples(60, seed=2), name="p", options=given)
        logits = [Classifier(tiny, run.probe).logits(test.items)[:, 0] for run in made.runs]
        found.append(np.mean([roc_auc_score(test.labels, own) for own in logits]))
    assert found[1] > found[0] + 0.01


def test_long_inputs_teach_and_do_not_judge(tiny, tmp_path):
    given = options(tmp_path, long_inputs=30)
    made = fit(tiny, examples(60), examples(40, seed=2), name="p", options=given)
    record = made.best.probe.record
    assert (record["training"]["rows"], record["validation"]["rows"]) == (90, 40)
    assert record["long_inputs"] == 30


def test_long_inputs_belong_to_the_fold_of_their_texts(tiny, tmp_path):
    texts = examples(60)
    made = prepare(tiny, texts, None, options=options(tmp_path, long_inputs=12))
    assert (len(made.study.training), len(made.study.validation), made.texts) == (72, 60, 60)
    assert sorted(np.concatenate(made.folds).tolist()) == list(range(72))
    items = made.study.training.examples.items
    for fold in made.folds:
        own = {items[row].text for row in fold if row < 60}
        for row in fold[fold >= 60]:
            pieces = items[row].text.split("\n\n")
            assert sum(piece in own for piece in pieces) >= len(pieces) - 1


def test_cross_fitted_texts_are_judged_without_long_inputs(tiny, tmp_path):
    made = fit(tiny, examples(60), None, name="p", options=options(tmp_path, long_inputs=12))
    record = made.best.probe.record
    assert (record["training"]["rows"], record["validation"]["rows"]) == (72, 60)
    assert made.best.score > 0.9


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": t, "label": t} for t in "aabbcc"], "binary or a multi-label task"),
        ([{"text": [{"role": "user", "content": "a"}] * 2, "label": i} for i in (0, 1)], "single"),
        ([{"text": "a " * 400, "label": i} for i in (0, 1)], "short enough"),
    ],
)
def test_what_cannot_be_part_of_a_long_input_is_refused(tiny, rows, message):
    with pytest.raises(SidelightError, match=message):
        long_inputs(load_examples(rows), tiny, count=2, max_tokens=MOST, seed=0)


def test_responses_are_refused(tiny):
    rows = [{"text": "a", "answer": "b", "label": label} for label in (0, 1)]
    with pytest.raises(SidelightError, match="without a response"):
        long_inputs(load_examples(rows, response="answer"), tiny, count=2, max_tokens=MOST, seed=0)
