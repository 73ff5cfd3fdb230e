"""Lines of progress, as a log has them."""

import pytest

from sidelight import progress as module
from sidelight.progress import progress


@pytest.fixture
def lines(monkeypatch, capsys):
    """Says each advance; gives the lines so far."""
    monkeypatch.setattr(module._Lines, "_EVERY_S", 0.0)
    return lambda: capsys.readouterr().err.splitlines()


def test_a_line_has_what_is_done_and_what_is_left(lines):
    with progress("Reading", 1000, unit="texts") as shown:
        shown.advance(250)
        (line,) = lines()
    assert line.startswith("Reading: 250 of 1,000 texts, ")
    assert line.endswith(" s left")
    assert lines()[0].startswith("Reading: 250 of 1,000")


def test_work_that_has_not_begun_has_no_time_left(lines):
    with progress("Reading", 1000, unit="texts") as shown:
        shown.advance(0)
        (line,) = lines()
    assert line.endswith(" s so far")


def test_slow_work_shows_its_rate(lines, monkeypatch):
    clock = iter((0.0, 0.0, 40.0, 40.0, 40.0, 40.0))
    monkeypatch.setattr(module, "monotonic", lambda: next(clock))
    with progress("Fitting", 8, unit="fits") as shown:
        shown.advance(1)
        (line,) = lines()
    assert line == "Fitting: 1 of 8 fits, 0.025 fits/s, 40 s so far, 280 s left"
