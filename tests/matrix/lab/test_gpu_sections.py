"""The whole check of a GPU, tried out on the tiny model and a pretended device."""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import wordings
from sidelight.errors import SidelightError
from sidelight_lab.bench.gpu import CHECK, conditions_of, report, run_check, run_section
from sidelight_lab.bench.gpu_engine import Setting
from worlds.pretended_device import pretended
from worlds.servers import cli

NEEDS_VLLM = tuple(name for name in CHECK if name.startswith(("vllm parity", "vllm serving")))
PLANTED = "agreement: float32"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting("cpu", str(tmp_path_factory.mktemp("check")), None, "tiny")


@pytest.fixture(scope="module")
def results(setting):
    """Of all sections, in this process: a start of Python for each would take a minute.

    Sections of our own engine run on a pretended device that rejects mixing with the CPU.
    """
    results = {}
    for name in (name for name in CHECK if name not in NEEDS_VLLM[1:]):
        if name == PLANTED:
            np.save(setting.path / "float32.npy", np.zeros((7, 3)))
        is_elsewhere = name not in ("cpu", "serve") and not name.startswith("vllm")
        with pretended() if is_elsewhere else nullcontext():
            where = replace(setting, device="pretend" if is_elsewhere else "cpu")
            results[name] = {"seconds": 1.0, **asdict(run_section(name, where, Path("none")))}
    return results


# Every section trains, serves or reads, on the tiny model.
def test_every_section_runs_even_if_one_fails(results):
    failed = {name for name, result in results.items() if not result["passed"]}
    assert failed - {*NEEDS_VLLM} == {PLANTED}
    assert json.dumps(results)


def test_failures_are_reported_in_one_line_with_type_and_location(results, setting):
    page = report(conditions_of(setting), results)
    assert "**Tried out without a GPU.**" in page
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {PLANTED}")]
    assert "FAILED: ValueError: operands could not be broadcast" in line
    assert "(at sidelight_lab/bench/gpu_engine.py:" in line
    assert str(setting.path) not in page + json.dumps(results)


def test_sections_time_out_and_passed_sections_are_not_rerun(tmp_path, capsys):
    only = ["--only", "vllm graphs", "--only", "train", "--model", "/nowhere"]
    assert cli("bench", "gpu", "--out", str(tmp_path), *only) == 1
    assert "[2/2] vllm graphs: passed" in capsys.readouterr().err
    first = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert first["train"]["summary"].startswith("SidelightError: Cannot load '/nowhere'")
    assert "/nowhere" in (tmp_path / "logs" / "train.log").read_text()
    assert not run_check(tmp_path, model="/nowhere", only=["vllm graphs", "train"], limit_s=0.1)
    second = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert second["vllm graphs"] == first["vllm graphs"]
    assert second["train"]["summary"] == "It took over 0.1 s."
    with pytest.raises(SidelightError, match=wordings.CONDITIONS_DIFFER.format(names="model")):
        run_check(tmp_path, only=["vllm graphs"])
    with pytest.raises(SidelightError, match=wordings.REFERENCE_FIRST):
        run_check(tmp_path / "other", only=["pace"])
