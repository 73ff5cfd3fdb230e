"""Lines of progress in a log."""

import pytest

from sidelight import progress as module
from sidelight.progress import progress


@pytest.mark.parametrize(
    ("done", "seconds", "lines"),
    [
        # Nothing is known of the time that is left before the first batch.
        (0, [20.0], ["Reading: 0 of 1,000 texts, 0 texts/s, 20 s so far"]),
        (250, [20.0], ["Reading: 250 of 1,000 texts, 12 texts/s, 20 s so far, 60 s left"]),
        # Slow work shows its rate.
        (1, [40.0], ["Reading: 1 of 1,000 texts, 0.025 texts/s, 40 s so far, 39960 s left"]),
        # A line every 15 seconds is enough.
        (10, [14.0, 16.0, 17.0, 31.0], ["Reading: 20 of", "Reading: 40 of"]),
        (1000, [20.0], []),
    ],
)
def test_a_log_gets_a_line_every_15_seconds_and_one_at_the_end(
    done, seconds, lines, monkeypatch, capsys
):
    now = [0.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    with progress("Reading", 1000, unit="texts") as shown:
        for now[0] in seconds:
            shown.advance(done)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(lines) + 1
    assert all(line.startswith(start) for line, start in zip(printed, lines, strict=False))
    assert printed[-1].startswith(f"Reading: {done * len(seconds):,} of 1,000 texts, ")
