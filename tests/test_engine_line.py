"""Who goes next, and who is refused."""

import pytest

from sidelight.bank import Panel
from sidelight.engines.base import EngineBusyError, Sampling
from sidelight.engines.queue import Limits, Request, RequestQueue
from sidelight.prompts import EncodedPrompt, Part


def request(length=10, max_tokens=10):
    prompt = EncodedPrompt((1,) * length, (Part.PROMPT,) * length)
    panel = Panel([])
    return Request(prompt, Sampling(), max_tokens, panel)


def check(length=10):
    return request(length, max_tokens=0)


def admitted(line, running=()):
    return line.admit(list(running))


def test_first_come_first_served():
    line = RequestQueue(Limits(running=2))
    requests = [request() for _ in range(3)]
    line.join(requests)
    assert admitted(line) == requests[:2]
    assert admitted(line, [requests[0]]) == requests[2:]


def test_a_full_line_refuses():
    line = RequestQueue(Limits(waiting=2))
    line.join([request(), request()])
    with pytest.raises(EngineBusyError, match="2 waiting, the limit is 2") as busy:
        line.join([request()])
    assert busy.value.retry_after_s > 0
    assert len(line) == 2


def test_a_prefill_batch_counts_its_padding():
    line = RequestQueue(Limits(prefill_tokens=100))
    requests = [request(10), request(10), request(60)]
    line.join(requests)
    assert admitted(line) == requests[:2]


def test_a_prompt_beyond_the_budget_goes_alone():
    line = RequestQueue(Limits(prefill_tokens=50))
    requests = [request(80), request(10)]
    line.join(requests)
    assert admitted(line) == requests[:1]


def test_the_cache_has_room_for_what_is_still_to_be_written():
    line = RequestQueue(Limits(cache_tokens=100))
    requests = [request(10, 30), request(10, 30), request(10, 30)]
    line.join(requests)
    assert admitted(line) == requests[:2]


def test_checks_pass_while_every_place_is_taken():
    line = RequestQueue(Limits(running=1))
    running, waiting, small = request(), request(), check()
    line.join([waiting, small])
    assert admitted(line, [running]) == [small]
    assert admitted(line) == [waiting]


def test_nobody_overtakes_a_request_that_does_not_fit_yet():
    line = RequestQueue(Limits(cache_tokens=100))
    large, small = request(10, 80), request(1, 1)
    line.join([large, small])
    assert admitted(line, [request(10, 30)]) == []
    assert admitted(line) == [large]


def test_those_who_leave_are_not_admitted():
    line = RequestQueue(Limits())
    stays, leaves = request(), request()
    line.join([stays, leaves])
    line.leave([leaves])
    assert admitted(line) == [stays]
