"""The check of a GPU, without one: what fails loses nothing, and what has a result stays."""

import json

import pytest

from commands import run
from sidelight.errors import SidelightError
from sidelight_lab.bench.gpu import PARITY_ERROR, passed, run_check


@pytest.mark.slow
def test_a_section_that_fails_loses_no_other_and_results_are_kept(tmp_path, capsys):
    only = ["--only", "graphs", "--only", "reference", "--model", "/nowhere"]
    assert run("bench", "gpu", "--out", str(tmp_path), *only) == 1
    assert "[1/2] graphs: passed" in capsys.readouterr().err
    made = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert "/nowhere" in made["reference"]["error"]
    assert "/nowhere" in (tmp_path / made["reference"]["log"]).read_text()
    assert made["graphs"]["result"]["difference"] == 0
    assert "This is not a GPU result" in (tmp_path / "gpu.md").read_text()
    # The second run does only what failed.
    assert run("bench", "gpu", "--out", str(tmp_path), *only) == 1
    said = capsys.readouterr().err
    assert said.count("has a result") == 1
    assert "[2/2] reference: failed" in said
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"]["graphs"] == made["graphs"]
    with pytest.raises(SidelightError, match=r"other conditions \(model\)"):
        run_check(tmp_path, only=["graphs"])
    with pytest.raises(SidelightError, match="reference"):
        run_check(tmp_path / "other", only=["speed"])


def test_a_difference_to_transformers_does_not_pass():
    result = {"first_pass": PARITY_ERROR / 2, "second_pass": 2 * PARITY_ERROR}
    assert not passed("parity", {"result": result})
    assert not passed("parity", {"error": "It crashed."})
    assert passed("parity", {"result": {**result, "second_pass": 0.0}})
