"""Lines of progress in a log."""

from sidelight import progress as module
from sidelight.progress import progress, quiet


def test_progress_logs_periodic_lines_and_a_final_one(monkeypatch, capsys):
    monkeypatch.setattr(module, "_EVERY_S", 0.0)
    with progress("Reading", 1000, unit="texts") as advance:
        advance(250)
        advance(750)
    first, middle, last, *rest = capsys.readouterr().err.split("\n")
    assert "Reading:   0%|0.00 of 1.00k" in first
    assert "Reading:  25%|250 of 1.00k" in middle
    assert "Reading: 100%|1.00k of 1.00k" in last
    assert "texts/s" in last
    # And each of them once.
    assert not "".join(rest).strip()


def test_progress_does_not_log_every_step(capsys):
    with progress("Reading", 1000, unit="texts") as advance:
        for _ in range(1000):
            advance(1)
    assert capsys.readouterr().err.count("Reading") == 2


def test_quiet_work_shows_nothing(capsys):
    with quiet(), progress("Reading", 1, unit="texts") as advance:
        advance(1)
    assert not capsys.readouterr().err
