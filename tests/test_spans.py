"""Spans: read from files, learned from tokens, found in texts, and measured by characters."""

import json
import os
import re
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import wordings
from sidelight.classifier import Classifier, train
from sidelight.cli.show import print_report
from sidelight.data.evaluation import evaluate_spans
from sidelight.data.examples import Example
from sidelight.data.loading import load_examples
from sidelight.data.spans import (
    SpanRule,
    character_f1,
    character_scores,
    final_characters,
    labelled_characters,
    threshold_f1,
    token_labels,
    within_margin,
    words,
)
from sidelight.engines.annotation import AnswerSpans, annotate_spans
from sidelight.engines.queue import Limits
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt, Message, Place, Reads, TokenRole
from sidelight.policy.rules import BoundRule, Rule
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.bank import ProbeBanks
from sidelight.probes.mechanisms.base import mechanism_spec
from sidelight.probes.probe import ProbeOutput
from sidelight.scoring import find_spans
from sidelight.statistics.calibration import Calibration
from sidelight.statistics.thresholds import ThresholdRule
from sidelight.training.fit import fit
from sidelight.training.settings import FitOptions, TrainingSettings
from sidelight.training.spans import calibrate_spans
from sidelight.types import Span, Task, Verdicts
from worlds.data import planted_rows, span_rows
from worlds.models import NAMES_AND_PLACES, saved, spans_probe, untrained_probe
from worlds.servers import cli, in_process

load_spans = partial(load_examples, spans="spans")
TEXT = "Call Ann Lee, now"
NAME = {"start": 5, "end": 12, "label": "NAME"}
USER = [Message("user", "Is it Cy?")]
# Prompts in other batches and parts: sums in another order, in float32.
SERVED = 1e-4


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ([{**NAME, "end": 18}], "5 to 18 is not within the 17 characters"),
        ([{**NAME, "start": -1}], "-1 to 12 is not within"),
        ([{**NAME, "start": 12}], "12 to 12 is not within"),
        ([{**NAME, "end": 8.0}], "5 to 8.0 is not within"),
        ([{**NAME, "start": 4, "end": 5}], "from 4 to 5 contains only whitespace"),
        ([{**NAME, "text": "Ann"}], r"keys start, end, label, got .*\(unknown: text\)"),
        ([{"start": 5, "end": 12}], "expected a span with the keys"),
        ([[5, 12, "NAME"]], "expected a span with the keys"),
        ("NAME", "'NAME'. Write a list of spans"),
        ([{**NAME, "label": "none"}], "'none' is not a valid label"),
        ([{**NAME, "label": ["a"]}], "expected one label"),
    ],
)
def test_malformed_spans_raise_specific_errors(cell, says):
    with pytest.raises(SidelightError, match=says):
        load_spans([{"text": TEXT, "spans": cell}])


def test_missing_column_error_names_file_and_option(tmp_path):
    path = tmp_path / "letters.jsonl"
    path.write_text(json.dumps({"text": TEXT, "spans": []}) + "\n")
    with pytest.raises(
        SidelightError,
        match=wordings.FILE_LINE.format(file="letters.jsonl", line=1)
        + ": "
        + wordings.NO_COLUMN.format(name="span")
        + ".*--spans",
    ):
        load_examples(path, spans="span")
    with pytest.raises(
        SidelightError,
        match=wordings.NO_COLUMN.format(name="label") + r".*--label \(label= in Python\)\.$",
    ):
        load_examples(path)
    path.write_text(json.dumps({"text": TEXT, "pii": [NAME]}) + "\n")
    hint = r"no column 'label'.*Column 'pii' has spans.*`sidelight train --spans pii`"
    with pytest.raises(SidelightError, match=hint):
        load_examples(path)


def test_spans_may_overlap_and_rows_without_spans_are_negatives(warned):
    place = {"start": 9, "end": 17, "label": "PLACE", "probability": 0.5}
    cells = [[NAME, place], [], None, json.dumps([NAME])]
    examples = load_spans([{"text": TEXT, "spans": cell} for cell in cells])
    assert examples.spans[0] == (Span(5, 12, "NAME"), Span(9, 17, "PLACE"))
    assert examples.labels.tolist() == [[1, 1], [0, 0], [0, 0], [1, 0]]
    assert examples.select([3, 1]).spans == ((Span(5, 12, "NAME"),), ())
    single_label = load_spans([{"text": TEXT, "spans": [NAME]}, {"text": TEXT, "spans": []}])
    assert (single_label.task.labels, single_label.labels.tolist()) == (("none", "NAME"), [1, 0])
    cell = [NAME, place]
    known = load_spans([{"text": TEXT, "spans": cell}], task=single_label.task)
    assert (known.spans, known.labels.tolist()) == (((Span(5, 12, "NAME"),),), [1])
    assert "labels that the probe was not trained on (PLACE; 1 in all)" in warned()[0]
    with pytest.raises(SidelightError, match=wordings.NO_SPANS_AT_ALL):
        load_spans([{"text": TEXT, "spans": []}])


def test_chat_spans_require_response_column():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    row = {"text": chat, "answer": TEXT, "spans": [NAME]}
    assert load_spans([row], response="answer").spans == ((Span(5, 12, "NAME"),),)
    with pytest.raises(
        SidelightError, match=wordings.HAS_MESSAGES.format(messages=2) + ".*--response"
    ):
        load_spans([row])


def test_token_labels_ignore_surrounding_whitespace():
    tokens = [(0, 4), (4, 8), (8, 12), (12, 13), (13, 17), (8, 9)]
    flags = token_labels(
        TEXT, tokens, [Span(5, 8, "NAME"), Span(9, 17, "PLACE")], ["NAME", "PLACE"]
    )
    assert flags.T.tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]]


def test_scripts_without_spaces_use_one_word_per_character():
    text = "我叫李安, Bob's"
    assert [text[start:end] for start, end in words(text)] == [*"我叫李安,", "Bob's"]
    assert [final_characters(text, n) for n in (3, 5, 6, 8, 11)] == [3, 5, 5, 5, 5]
    assert [final_characters("Ann Lee", n) for n in (2, 3, 4, 7)] == [0, 3, 3, 3]


@pytest.mark.parametrize(
    "word",
    [
        "नरेन्द्र",  # Vowel signs, and a virama.
        "\u0645\u064f\u062d\u064e\u0645\u064e\u0651\u062f",
        "Nguye\u0302\u0303n",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "Jo\u00adhn\u2019s",
    ],
)
def test_word_includes_its_combining_characters(word):
    assert words(word) == [(0, len(word))]
    assert words(f"{word}\u200b. {word}")[0] == (0, len(word))
    # Any character of it may be the last so far.
    assert all(final_characters(word[:end], end) == 0 for end in range(len(word) + 1))


def test_word_takes_highest_token_score_and_neighbours_merge():
    # "Call", " A", "nn", " Lee", ",", " now"; "now" has not been read.
    tokens = [(0, 4), (4, 6), (6, 8), (8, 12), (12, 13)]
    scores = np.array([[0.1], [0.2], [0.9], [0.6], [0.3]])
    found = character_scores(TEXT, tokens, scores)
    assert found[:, 0].tolist() == [0.1] * 5 + [0.9] * 3 + [0.6] * 4 + [0.3, 0, 0, 0, 0]
    calibration = Calibration("none", "binary", (1.0,), (0.0,))

    def read(threshold):
        return SpanRule(calibration, (threshold,), (None,)).read(found, ["NAME"])

    assert read(0.5) == [Span(5, 12, "NAME")]
    assert read(0.5)[0].probability == 0.9
    assert read(0.7) == [Span(5, 8, "NAME")]
    assert read(0.0) == [Span(0, 13, "NAME")]
    assert read(1.0) == []


def test_words_far_below_the_highest_score_are_dropped():
    scores = np.array([0.1, 0.5, 0.8, 0.0])
    odds = np.log(np.array([1 / 9, 1, 4]))
    for margin in (0.5, 1.5, 4.0):
        expected = [*(odds >= odds.max() - margin) * scores[:3], 0.0]
        assert within_margin(scores, margin).tolist() == expected
    assert within_margin(scores, None).tolist() == scores.tolist()
    assert within_margin(np.array([1.0, 0.9]), 1.0).tolist() == [1.0, 0.0]
    assert within_margin(np.zeros(2), 1.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("side", ["prompt", "response"])
@pytest.mark.parametrize(
    "task", [NAMES_AND_PLACES, Task("binary", ("none", "NAME"))], ids=["many", "one"]
)
def test_label_holds_by_text_threshold_or_by_span(tiny, side, task):
    """Tokens and texts are calibrated apart, and judged in other pieces."""
    draw, labels = np.random.default_rng(0), task.output_labels
    reads, count = Reads(side, template=False), len(labels)
    untrained = untrained_probe(tiny, "pii", task=task, reads=reads, mechanism="spans")
    chat = [Message("user", "Ann \u200b\n\n (and Bo)"), Message("assistant", "  "), *USER]
    prompt = tiny.encoder.encode(chat, with_places=True)
    chunks = ["An", "n", " ", "\n\n", " (", "and", " Bo", ")"]
    tokens = len(chunks) if side == "response" else int(prompt.mask(reads).sum())
    seen = set()
    for _ in range(200):
        calibration = replace(untrained.calibration, kind="platt", shift=(draw.normal(),) * count)
        margins = tuple(draw.choice([None, 0.1, 1.0]) for _ in labels)
        rule = SpanRule(calibration, tuple(draw.random(count).tolist()), margins)
        probe = untrained.changed(spans=rule, thresholds=tuple(draw.random(count).tolist()))
        logits = ProbeOutput(draw.normal(size=count), tokens=draw.normal(size=(tokens, count)))
        verdicts = Verdicts(
            (probe.verdict(logits.logits),), token_labels={"pii": probe.token_labels(logits)}
        )
        if side == "response":
            answer_spans = AnswerSpans([probe])
            for chunk in chunks:
                answer_spans.push(chunk)
            verdicts = answer_spans.annotate(verdicts)
        else:
            verdicts = annotate_spans(verdicts, [probe], prompt)
        (verdict,) = verdicts.verdicts
        limits = {"threshold": draw.choice([None, 0.5]), "labels": (*labels[: draw.integers(3)],)}
        bound = BoundRule(probe, Rule("flag", **limits))
        for decided_verdict, thresholds in (
            (verdict, probe.card.label_thresholds),
            (bound.decide(verdict), bound.thresholds),
        ):
            span_labels = {span.label for span in decided_verdict.spans}
            reached = {
                x for x, least in thresholds.items() if decided_verdict.probabilities[x] >= least
            }
            assert span_labels <= {*thresholds}
            assert decided_verdict.flagged is bool(span_labels | reached)
            assert {*decided_verdict.labels} == ((span_labels | reached) or {*task.labels[:-count]})
            seen.add((len(span_labels), bool(reached - span_labels), bool(span_labels - reached)))
    # Some hold by a span alone and some by the text alone.
    assert {number for number, _, _ in seen} == {*range(count + 1)}
    assert (
        {ignored_labels for _, ignored_labels, _ in seen}
        == {located for _, _, located in seen}
        == {True, False}
    )


class CountedPlace(Place):
    """A place that counts how often its message is asked for."""

    __slots__ = ("asked",)

    def __getattribute__(self, name):
        if name == "message":
            object.__setattr__(self, "asked", getattr(self, "asked", 0) + 1)
        return super().__getattribute__(name)


def test_spans_of_many_messages_are_found_in_one_pass(tiny):
    probe, messages = spans_probe(tiny, "pii"), 50
    places = [CountedPlace(message, 0, 2) for message in range(messages)]
    prompt = EncodedPrompt(
        (1,) * messages,
        (TokenRole.PROMPT,) * messages,
        texts=("ab",) * messages + ("",),
        places=tuple(places),
    )
    labels = [(token, "NAME", 0.95) for token in range(messages)]
    task = probe.task.output_labels
    verdicts = Verdicts((probe.verdict(np.zeros(len(task))),), token_labels={"pii": labels})
    (verdict,) = annotate_spans(verdicts, [probe], prompt).verdicts
    found = [(span.message, span.start, span.end) for span in verdict.spans]
    assert found == [(message, 0, 2) for message in range(messages)]
    assert max(place.asked for place in places) <= 2


def test_label_of_any_token_holds_without_token_positions(tiny):
    """As of ids that vLLM is sent: any of them may be a word."""
    probe = spans_probe(tiny, "pii", threshold=0.6).changed(thresholds=(0.8, 0.8))
    banks, prompt = ProbeBanks([probe]), tiny.encoder.encode(USER)
    layers, _, width = banks.prompt_probes.projection.weight.shape
    generator, seen = torch.Generator().manual_seed(0), set()
    for scale in np.linspace(0, 1, 50):
        projections = scale * torch.randn(len(prompt), layers, width, generator=generator)
        (verdicts,) = banks.classify_prompts(projections, [prompt])
        (verdict,) = annotate_spans(verdicts, [probe], prompt).verdicts
        token_label_names = {label for _, label, _ in verdicts.token_labels["pii"]}
        for rule, least in ((Rule("block"), 0.8), (Rule("block", threshold=0.7), 0.7)):
            reached = {x for x, score in verdict.probabilities.items() if score >= least}
            decided = BoundRule(probe, rule).decide(verdict)
            assert {*decided.labels} == (reached if rule.threshold else reached | token_label_names)
            assert decided.flagged is bool(decided.labels)
        assert {*verdict.labels} >= token_label_names
        seen.add((bool(token_label_names), bool(token_label_names - reached)))
    assert seen == {(False, False), (True, False), (True, True)}


def test_character_f1_matches_shared_task_definition():
    def f1(actual, predicted):
        spans = [[Span(*place, "toxic")] if place else [] for place in (actual, predicted)]
        return character_f1(
            *(labelled_characters(TEXT, spans_of_text, ["toxic"]) for spans_of_text in spans)
        )

    assert f1((5, 12), (5, 12)) == f1(None, None) == 1
    assert f1((5, 12), None) == f1(None, (5, 12)) == f1((0, 4), (5, 12)) == 0
    assert f1((5, 12), (9, 13)) == pytest.approx(2 * (3 / 4) * (3 / 7) / (3 / 4 + 3 / 7))


def test_threshold_f1_matches_f1_at_each_threshold():
    draw = np.random.default_rng(0)
    scores = [draw.integers(1, 9, 20) / 10 for _ in range(6)]
    actual = [draw.random(20) < 0.2 for _ in range(4)] + [np.zeros(20, dtype=bool)] * 2
    points = np.array([0.25, 0.4, 0.85, 0.95])
    pairs = [*zip(actual, scores, strict=True)]
    expected = [np.mean([character_f1(a, s >= point) for a, s in pairs]) for point in points]
    np.testing.assert_allclose(threshold_f1(actual, scores, points), expected)


def test_span_report_counts_characters_and_exact_spans(capsys):
    texts = [{"text": TEXT, "spans": [NAME]}, {"text": TEXT, "spans": []}]
    texts += [{"text": TEXT, "spans": [{"start": 14, "end": 17, "label": "TIME"}]}]
    examples = load_spans(texts)
    found = [[Span(5, 12, "NAME"), Span(14, 17, "TIME")], [], [Span(0, 17, "TIME")]]
    report = evaluate_spans(examples, found, bootstrap=50)
    values = {name: estimate.value for name, estimate in report.metrics.items()}
    f1 = np.mean([2 * 7 / (7 + 10), 1, 2 * 3 / (3 + 17)])
    assert values == pytest.approx(
        {"character_f1": f1, "precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5}
    )
    assert (
        report.per_label["NAME"]["f1"].value == report.per_label["NAME"]["character_f1"].value == 1
    )
    assert report.per_label["TIME"]["character_f1"].value == pytest.approx((0 + 1 + 0.3) / 3)
    assert report.spans == {"NAME": 1, "TIME": 1}
    assert (report.complete, report.partial) == ({"NAME": 1, "TIME": 1}, {"NAME": 0, "TIME": 0})
    assert report.metrics["f1"].low < 0.4 < report.metrics["f1"].high
    # Of another label is not at all.
    found = [[Span(7, 12, "NAME")], [], [Span(14, 17, "NAME")]]
    report = evaluate_spans(examples, found, bootstrap=50)
    assert (report.complete, report.partial) == ({"NAME": 0, "TIME": 0}, {"NAME": 1, "TIME": 0})
    print_report(report)
    output = capsys.readouterr().out
    assert all(row in output for row in ("all", "NAME", "TIME"))


@pytest.fixture(scope="module")
def fitted(tiny, tmp_path_factory):
    settings = TrainingSettings(learning_rate=2e-2, epochs=6, batch_size=16)
    options = FitOptions(settings=settings, cache_root=tmp_path_factory.mktemp("cache"))
    return fit(tiny, load_spans(span_rows(160)), None, name="pii", options=options)


def test_trained_probe_finds_spans_in_new_texts_after_reload(tiny, fitted, tmp_path):
    examples = load_spans(span_rows(30, seed=1))
    probe = load_probe(save_probe(fitted.probe, tmp_path))
    assert probe.spans == fitted.probe.spans
    logits, found = find_spans(tiny, probe, examples.items)
    report = evaluate_spans(examples, found, bootstrap=10)
    assert report.metrics["f1"].value > 0.9
    assert report.metrics["character_f1"].value > 0.9
    assert fitted.spans.metrics["character_f1"].value > 0.9
    verdicts = [probe.verdict(text_logits).labels for text_logits in logits]
    names = [tuple(sorted({span.label for span in spans})) for spans in examples.spans]
    assert np.mean([a == b for a, b in zip(verdicts, names, strict=True)]) > 0.9
    assert {*probe.card.training.lookaheads} == {"0", "1", "2", "4"}
    verdicts = Classifier(tiny, probe).predict(examples.items)
    assert [verdict.spans for verdict in verdicts] == [*map(tuple, found)]
    chat = tuple(Message("user", text) for text in ("a word", "WWXX"))
    (_, (single,)) = find_spans(tiny, probe, [Example(chat[1:])])
    assert [(span.start, span.end, span.label) for span in single] == [(0, 4, "SHOUT")]
    with pytest.raises(SidelightError, match=wordings.HAS_MESSAGES.format(messages=2)):
        find_spans(tiny, probe, [Example(chat)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Of the rarest class")
def test_python_api_trains_and_evaluates_spans(tiny, fitted, temporary_cache):
    texts = [{"letter": row["text"], "pii": row["spans"]} for row in span_rows(45, seed=1)]
    columns = {"text": "letter", "spans": "pii"}
    trained = train(tiny, texts[:30], validation=texts[30:], mechanism="spans", **columns)
    assert trained.probe.spans is not None
    assert trained.probe.task == fitted.probe.task
    classifier = Classifier(tiny, fitted.probe)
    report = classifier.evaluate(texts, **columns)
    examples = load_examples(texts, **columns)
    assert report.to_dict() == classifier.evaluate(examples, spans="pii").to_dict()
    found = [verdict.spans for verdict in classifier.predict(examples.items)]
    assert report.to_dict() == evaluate_spans(examples, found).to_dict()
    assert classifier.evaluate(examples).rows == 45


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mechanism": "readout"}, r"labels tokens, such as 'spans' \(got: 'readout'\)"),
        ({"background": "traffic.jsonl"}, r"Leave them out, or spans="),
        ({"positive": "SHOUT"}, r"Leave them out, or spans="),
    ],
)
def test_python_api_rejects_text_label_options_for_spans(tiny, options, says):
    texts = span_rows(20)
    for arguments in ({"data": texts, "spans": "spans"}, {"data": load_spans(texts)}):
        with pytest.raises(SidelightError, match=says):
            train(tiny, **arguments, **options)
    labelled = load_examples(planted_rows("binary", 20))
    with pytest.raises(SidelightError, match=wordings.LOAD_SPANS):
        train(tiny, labelled, spans="spans")
    probe = untrained_probe(tiny, "whole", task=labelled.task)
    with pytest.raises(
        SidelightError, match=wordings.LABELS_TEXTS.format(probe="whole") + ".*label="
    ):
        Classifier(tiny, probe).evaluate(texts, spans="spans")


def test_server_matches_predict_however_prompt_is_chunked(tiny, fitted):
    texts = [row["text"] for row in span_rows(12, seed=4)]
    examples = [Example((Message("user", text),)) for text in texts]
    logits, found = find_spans(tiny, fitted.probe, examples)
    expected = [fitted.probe.verdict(text_logits).probabilities for text_logits in logits]
    for limits in (Limits(), Limits(prefill_tokens=3)):
        with in_process(TransformersEngine(tiny, [fitted.probe], limits=limits)) as http:
            results = http.post("/v1/moderations", json={"input": texts}).json()["results"]
            body = {"model": tiny.name, "max_tokens": 1}
            body["messages"] = [{"role": "user", "content": texts[0]}]
            chat = http.post("/v1/chat/completions", json=body).json()
        served = [result["sidelight"]["verdicts"][0] for result in results]
        (verdict,) = chat["sidelight"]["verdicts"]
        pairs = zip([verdict, *served], [expected[0], *expected], [found[0], *found], strict=True)
        for entry, wanted, spans in pairs:
            assert entry["probabilities"] == pytest.approx(wanted, abs=SERVED)
            assert [Span(**each) for each in entry["spans"]] == spans
            scores = [span["probability"] for span in entry["spans"]]
            assert scores == pytest.approx([span.probability for span in spans], abs=SERVED)


def test_find_spans_rejects_texts_that_probe_does_not_read(tiny, fitted):
    answered = Example((Message("user", "12"),), response="XX")
    with pytest.raises(SidelightError, match=wordings.FINDS_IN_PROMPTS):
        find_spans(tiny, fitted.probe, [answered])
    response_probe = fitted.probe.changed(reads=replace(fitted.probe.reads, side="response"))
    with pytest.raises(SidelightError, match=wordings.NO_RESPONSES.format(missing=1, texts=1)):
        find_spans(tiny, response_probe, [Example((Message("user", "12"),))])
    options = FitOptions(reads=Reads("response"))
    with pytest.raises(SidelightError, match=wordings.SPANS_OF_PROMPTS):
        fit(tiny, load_spans(span_rows(40)), None, name="pii", options=options)


def test_span_threshold_rules_apply_to_words():
    texts = load_spans(span_rows(200, seed=2))
    draw = np.random.default_rng(0)
    places = [[(i, i + 1) for i in range(len(item.text))] for item in texts.items]
    pairs = zip(texts.items, places, texts.spans, strict=True)
    holds = [
        token_labels(item.text, ranges, spans, texts.task.output_labels)
        for item, ranges, spans in pairs
    ]
    logits = [3.0 * labels + draw.normal(size=labels.shape) for labels in holds]
    texts_of_words = [words(item.text) for item in texts.items]
    rates = {}
    for text in ("f1", "fpr=0.01", "recall=0.99"):
        rule, _ = calibrate_spans(
            texts, places, logits, rule=ThresholdRule.parse(text), bootstrap=0
        )
        counts = np.zeros((2, 2))
        for item, ranges, z, spans, of_words in zip(
            texts.items, places, logits, texts.spans, texts_of_words, strict=True
        ):
            scores = character_scores(item.text, ranges, rule.calibration.apply(z))
            found = rule.read(scores, texts.task.output_labels)
            actual, claimed = (
                labelled_characters(item.text, each, texts.task.output_labels)[:, 0]
                for each in (spans, found)
            )
            for start, _ in of_words:
                counts[int(actual[start]), int(claimed[start])] += 1
        rates[text] = counts[:, 1] / counts.sum(1)
    assert 0.004 < rates["fpr=0.01"][0] < 0.02
    assert 0.98 < rates["recall=0.99"][1] < 1
    assert rates["fpr=0.01"][1] < rates["recall=0.99"][1]


def test_response_probe_finds_spans_in_responses(tiny, tmp_path):
    """Here with a single label."""
    answers = [
        {
            "text": "12 and XX",
            "answer": row["text"],
            "spans": [span for span in row["spans"] if span["label"] == "SHOUT"],
        }
        for row in span_rows(120)
    ]
    options = FitOptions(
        settings=TrainingSettings(learning_rate=2e-2, epochs=6, batch_size=16),
        cache_root=tmp_path,
    )
    options = replace(
        options,
        reads=replace(options.reads, side="response"),
        mechanism=mechanism_spec("spans", {"lookahead": 1}),
    )
    examples = load_spans(answers, response="answer")
    fitted_spans = fit(tiny, examples, None, name="pii", options=options)
    assert fitted_spans.probe.card.mechanism.options["lookahead"] == 1
    assert {*fitted_spans.probe.spans.margins} == {None}
    _, found = find_spans(tiny, fitted_spans.probe, examples.items[:40])
    report = evaluate_spans(examples.select(range(40)), found, bootstrap=0)
    assert report.metrics["character_f1"].value > 0.9


@pytest.mark.slow
def test_commands_train_evaluate_and_predict_spans(tiny, temporary_cache, tmp_path, capsys):
    def write(name, count, seed):
        lines = [{"letter": row["text"], "pii": row["spans"]} for row in span_rows(count, seed)]
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
        return ["--data", str(tmp_path / name), "--text", "letter"]

    probe = str(tmp_path / "probe")
    command = ["train", *write("train.jsonl", 160, 0), "--spans", "pii", "--out", probe]
    command += ["--model", saved(tiny, tmp_path / "model"), "--set", "epochs=6"]
    command += ["--set", "learning_rate=0.02", "--set", "batch_size=16"]
    assert cli(*command, "--mechanism", "readout") == 2
    assert "a mechanism that labels tokens" in capsys.readouterr().err
    command += ["--mechanism", "spans", "--set", "spans.lookahead=2"]
    assert cli(*command) == 0
    told = capsys.readouterr().out
    assert "Lookahead: 2 tokens" in told
    assert f"eval {probe} --data TEST_FILE --text letter --spans pii" in " ".join(told.split())
    texts = write("test.jsonl", 30, 1)
    unknown = {"letter": "Is it ABC?", "pii": [{"start": 6, "end": 9, "label": "OTHER"}]}
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write("\n" + json.dumps(unknown))
    assert cli("eval", probe, *texts, "--spans", "pii") == 0
    assert "Left out spans with labels" in capsys.readouterr().err
    texts = write("test.jsonl", 30, 1)
    measure = ["eval", probe, *texts, "--spans", "pii", "--json"]
    assert cli(*measure, "--plots", str(tmp_path)) == 2
    assert "run `sidelight anatomy" in capsys.readouterr().err
    assert cli(*measure) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["character_f1"]["value"] > 0.9
    assert report["character_f1"]["ci"][0] <= report["character_f1"]["value"]
    assert report["full_texts"]["f1"]["value"] > 0.9
    assert {*report["per_label"]} == {"NUMBER", "SHOUT"}
    assert cli("recalibrate", probe, "--threshold", "fpr=0.01") == 2
    assert "Retrain the probe" in capsys.readouterr().err
    assert cli("predict", probe, *texts) == 0
    verdicts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found_rows = [
        {"text": row["text"], "spans": verdict["spans"]}
        for row, verdict in zip(span_rows(30, 1), verdicts, strict=True)
    ]
    found = load_spans(found_rows)
    assert (
        evaluate_spans(load_spans(span_rows(30, 1)), found.spans).metrics["character_f1"].value
        > 0.9
    )


@pytest.mark.slow
def test_terminal_highlights_spans_and_escapes_control_characters(
    tiny, fitted, tmp_path, monkeypatch, capsys
):
    probe, model = str(tmp_path / "probe"), saved(tiny, tmp_path / "model")
    save_probe(fitted.probe, tmp_path / "probe")
    texts = "ab and 123, or VWX", "\x1b[31mab\x07 and [b]123[/b], or :smile:\x9b2J\tab"
    command = ("predict", probe, "--model", model, *texts)
    assert cli(*command) == 0
    (first, _) = map(json.loads, capsys.readouterr().out.splitlines())
    assert [span["label"] for span in first["spans"]] == ["NUMBER", "SHOUT"]
    assert cli(*command, "--spans") == 0
    plain = capsys.readouterr().out
    known, strange = plain.splitlines()
    assert known == "ab and 123[NUMBER], or VWX[SHOUT]"
    assert re.sub(r"\[(NUMBER|SHOUT)\]", "", strange) == (
        r"\x1b[31mab\x07 and [b]123[/b], or :smile:\x9b2J\tab"
    )
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    reader, writer = os.openpty()
    with open(writer, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert cli(*command) == 0
    chunks = []
    # A terminal without a writer ends with an error.
    with suppress(OSError):
        while chunk := os.read(reader, 10_000):
            chunks.append(chunk)
    os.close(reader)
    screen = b"".join(chunks).decode().replace("\r\n", "\n")
    assert "\x1b[30;43m123\x1b[0m\x1b[1;33m[NUMBER]\x1b[0m" in screen
    assert re.sub(r"\x1b\[[\d;]*m", "", screen) == plain
    for wrong in (("--explain",), ("--out", str(tmp_path / "out"))):
        assert cli(*command, "--spans", *wrong) == 2
