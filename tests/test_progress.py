"""Lines of progress in a log, and a bar on a terminal."""

import io
import re
import time

import pytest

from sidelight import progress as module
from sidelight.progress import progress


@pytest.fixture
def lines(monkeypatch, capsys):
    """A line for each advance; gives the lines so far."""
    monkeypatch.setattr(module, "_EVERY_S", 0.0)
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
    clock = iter((0.0, 40.0, 40.0, 40.0, 40.0))
    monkeypatch.setattr(module, "monotonic", lambda: next(clock))
    with progress("Fitting", 8, unit="fits") as shown:
        shown.advance(1)
        (line,) = lines()
    assert line == "Fitting: 1 of 8 fits, 0.025 fits/s, 40 s so far, 280 s left"


def test_a_log_has_no_bar(capsys):
    with progress("Reading", 4, unit="texts") as shown:
        shown.advance(4)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Reading: 4 of 4 texts, ")


def test_a_terminal_has_one_bar_with_rate_and_time_left(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    with progress("Reading", 1000, unit="texts") as shown:
        shown.advance(250)
        time.sleep(0.2)
        shown.advance(250)
    bars = terminal.getvalue().strip().split("\r")
    assert all(bar.startswith("Reading: ") for bar in bars)
    assert re.search(r"50%.* 500/1.00k \[\d\d:\d\d<\d\d:\d\d, .* texts/s\]", bars[-1])
