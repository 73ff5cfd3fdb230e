"""Servers under load: each fault is found, a sound server has none, and costs are paired."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest

from sidelight_lab.bench.load import WORDS, Answer, Ticket, examples_of, faults, tickets
from sidelight_lab.bench.measurement import total
from sidelight_lab.bench.serving import MEASURES, NOTHING, costs_of

TICKET = Ticket(7, "amber", is_abuse=False)


def verdicts(word="amber"):
    return (
        {"probe": "word", "label": word},
        {"probe": "abuse", "label": "fine"},
        {"probe": "reply", "label": "fine"},
    )


FAILED = {"probe": "word", "error": "verdict_failed"}
SOUND = Answer(TICKET, "a", 0.1, verdicts(), verdicts(), "length")


def found(*answers):
    return {name: number for name, number in faults(answers).items() if number}


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ({"verdicts": verdicts()[1:], "in_header": ()}, "lost verdicts"),
        ({"verdicts": (*verdicts(), verdicts()[0])}, "duplicated verdicts"),
        ({"verdicts": verdicts("dune"), "in_header": ()}, "verdicts of another request"),
        ({"verdicts": (FAILED, *verdicts()[1:]), "in_header": (FAILED,)}, "lost verdicts"),
        ({"in_header": ({"probe": "abuse", "label": "abuse"},)}, "header unlike the answer"),
        ({"ticket": replace(TICKET, is_abuse=True)}, "abuse that was answered"),
        ({"id": "a"}, "answers that share an id"),
        ({"id": None, "ending": "content_filter"}, "others that were blocked"),
        ({"id": None, "ending": "APITimeoutError"}, "failed requests"),
    ],
)
def test_each_fault_of_an_answer_is_found(answer, fault):
    assert found(SOUND, replace(SOUND, **{"id": "b", **answer})) == {fault: 1}


def test_sound_answers_and_refusals_have_no_fault():
    blocked = Answer(Ticket(8, "basalt", is_abuse=True), None, 0.1, (), (), "content_filter")
    assert found(SOUND, replace(SOUND, id="b"), blocked) == {}


def test_tickets_have_numbers_and_words_of_their_own():
    some = list(islice(tickets(), 320))
    assert len({ticket.number for ticket in some}) == len({ticket.text for ticket in some}) == 320
    assert Counter(ticket.word for ticket in some) == dict.fromkeys(WORDS, 20)
    assert sum(ticket.is_abuse for ticket in some) == 40


@pytest.mark.parametrize("probe", ["abuse", "reply"])
def test_the_words_of_abuse_are_labelled_where_they_stand(probe):
    some = [*islice(tickets(), 32)]
    examples = examples_of(probe, some, spans=True)
    for ticket, item, spans in zip(some, examples.items, examples.spans, strict=True):
        marked = [(item.response or item.text)[span.start : span.end] for span in spans]
        assert marked == ([ticket.text.partition(": ")[2]] if ticket.is_abuse else [])
    assert sum(map(bool, examples.spans)) == 4


def test_series_are_added_over_their_labels():
    text = 'a_total{probe="x",outcome="passed"} 2.0\na_total{probe="y"} 3.0\nb 4.0\n# a_total 9\n'
    assert total(text, "a_total") == 5
    assert total(text, "a_total", probe="x") == 2
    assert total(text, "a_total", probe="x", outcome="refused") == 0


def test_what_probes_add_is_paired_with_the_same_round_without_them():
    # The machine gets three times slower, which no comparison within a round notices.
    without = [[10.0 * n, 1.0 * n, 5.0 * n, 8.0 / n, 4.0 * n, 2.0 * n] for n in (1, 2, 3)]
    shares = (1.2, 1.0, 1.1, 0.9, 1.3, 1.4)
    with_one = [[s * value for s, value in zip(shares, row, strict=True)] for row in without]
    costs = {one["measure"]: one for one in costs_of({NOTHING: without, "one": with_one})}
    assert list(costs) == list(MEASURES)
    assert [one["without"] for one in costs.values()] == [20, 2, 10, 4, 8, 4]
    for one, share in zip(costs.values(), shares, strict=True):
        assert one["probes"] == "one"
        found = (one["added"], one["low"], one["high"])
        assert found == pytest.approx((share - 1,) * 3)
