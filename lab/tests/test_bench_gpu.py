"""The check of a GPU, without one: what fails loses nothing, and what has a result stays."""

import json

import pytest

from commands import run
from sidelight.errors import SidelightError
from sidelight_lab.bench.gpu import PARITY_ERROR, run_check, sections


@pytest.mark.slow
def test_a_section_that_fails_loses_no_other_and_results_are_kept(tmp_path, capsys):
    only = ["--only", "tap", "--only", "graphs", "--only", "reference", "--model", "/nowhere"]
    assert run("bench", "gpu", "--out", str(tmp_path), *only) == 1
    said = capsys.readouterr().err
    assert "[1/3] tap: about" in said
    assert "[2/3] graphs: passed" in said
    made = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert "/nowhere" in made["reference"]["error"]
    assert "/nowhere" in (tmp_path / made["reference"]["log"]).read_text()
    rows = made["tap"]["result"]["rows"]
    assert all(row["error"] < 4e-6 for row in rows)
    assert all(row["us"] > 0 and row["layer_us"] > 0 for row in rows)
    assert made["graphs"]["result"]["difference"] == 0
    report = (tmp_path / "gpu.md").read_text()
    assert "This is not a GPU result" in report
    assert "called, not captured" in report
    # The second run does only what failed.
    assert run("bench", "gpu", "--out", str(tmp_path), *only) == 1
    said = capsys.readouterr().err
    assert said.count("has a result") == 2
    assert "[3/3] reference: failed" in said
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"]["tap"] == made["tap"]
    with pytest.raises(SidelightError, match=r"other conditions \(model\)"):
        run_check(tmp_path, only=["tap"])


def test_every_section_has_a_name_of_its_own_and_all_fit_in_25_minutes():
    names = [section.name for section in sections()]
    assert len(set(names)) == len(names)
    assert sum(section.estimate_s for section in sections()) < 25 * 60
    assert sections(serves_with_v2=True)[-1].environment["VLLM_USE_V2_MODEL_RUNNER"] == "1"


def test_an_unknown_section_or_shape_is_an_error_that_lists_them(tmp_path):
    with pytest.raises(SidelightError, match="reference"):
        run_check(tmp_path, only=["speed"])
    with pytest.raises(SidelightError, match="8b"):
        run_check(tmp_path, shape="8B")


def test_a_difference_to_transformers_does_not_pass(tmp_path):
    from sidelight_lab.bench.gpu import _passed

    result = {"first_pass": PARITY_ERROR / 2, "second_pass": 2 * PARITY_ERROR}
    assert not _passed("parity", {"result": result})
    assert not _passed("parity", {"error": "It crashed."})
    assert _passed("parity", {"result": {**result, "second_pass": 0.0}})
