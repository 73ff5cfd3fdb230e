"""The check of a GPU, without one: what fails loses nothing, and what has passed stays."""

import json
import socket
import subprocess
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from sidelight.errors import SidelightError
from sidelight.storage import write_text
from sidelight_lab.bench.gpu import (
    CHECK,
    conditions_of,
    logged_error,
    public,
    report,
    run_check,
    run_section,
)
from sidelight_lab.bench.gpu_engine import Setting
from worlds.pretended_device import pretended
from worlds.servers import cli

NEEDS_VLLM = tuple(name for name in CHECK if name.startswith(("vllm parity", "vllm serving")))
PLANTED = "agreement: float32"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting("cpu", str(tmp_path_factory.mktemp("check")), None, "tiny")


@pytest.fixture(scope="module")
def outcomes(setting):
    """Of all sections, in this process: a start of Python for each would take a minute.

    Those of our own engine run on a device that refuses to mix with the CPU.
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
@pytest.mark.slow
def test_every_section_runs_and_one_that_fails_loses_no_other(outcomes):
    failed = {name for name, outcome in outcomes.items() if not outcome["passed"]}
    assert failed - {*NEEDS_VLLM} == {PLANTED}
    assert json.dumps(outcomes)


@pytest.mark.slow
def test_what_fails_is_one_line_with_its_type_and_our_innermost_line(outcomes, setting):
    page = report(conditions_of(setting), outcomes)
    assert "**Tried out without a GPU.**" in page
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {PLANTED}")]
    assert "FAILED: ValueError: operands could not be broadcast" in line
    assert "(at sidelight_lab/bench/gpu_engine.py:" in line
    assert str(setting.path) not in page + json.dumps(outcomes)


@pytest.mark.slow
def test_a_section_has_a_process_and_a_time_limit_and_what_passed_is_not_repeated(tmp_path, capsys):
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
    with pytest.raises(SidelightError, match=r"other conditions \(model\)"):
        run_check(tmp_path, only=["vllm graphs"])
    with pytest.raises(SidelightError, match="vllm reference"):
        run_check(tmp_path / "other", only=["pace"])


def test_a_report_names_no_folder_machine_or_key(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    said = f"Cannot read {tmp_path}/model\nwith hf_secret_value on {socket.gethostname()}:8000/v1/x"
    assert public(said) == "Cannot read model with *** on HOST:8000/v1/x"
    assert public("POST /v1/chat/completions answered 500") == (
        "POST /v1/chat/completions answered 500"
    )
    options = {"max_num_seqs": 8, "hf_token": "hf_other", "download_dir": "/home/me"}
    told = json.dumps(conditions_of(Setting("cpu", "files", "/home/me/llama", "tiny", options)))
    assert '"max_num_seqs": 8' in told
    assert not any(word in told for word in ("hf_other", "home/me", socket.gethostname()))


def test_vllm_that_cannot_be_installed_leaves_our_engine_and_a_reason(monkeypatch, tmp_path):
    root = Path(__file__).parents[2]
    order = ["make", "-n", "-B", ".venv-gpu/.ready"]
    said = subprocess.run(order, cwd=root, capture_output=True, text=True, check=True).stdout
    ours, theirs = (
        said.index("install --quiet --disable-pip-version-check -e"),
        said.index("vllm=="),
    )
    assert ours < theirs
    assert "> .venv-gpu/vllm.log 2>&1 ||" in said[theirs:]
    if find_spec("vllm") is None:
        write_text(
            tmp_path / "vllm.log", "Collecting vllm\nERROR: No matching distribution found\n"
        )
        monkeypatch.setattr("sys.prefix", str(tmp_path))
        told = conditions_of(Setting("cpu", "files", None, "tiny"))["vllm"]
        assert told == "not installed ERROR: No matching distribution found"


def test_the_error_of_another_process_is_read_from_the_log(tmp_path):
    log = tmp_path / "log"
    place = '  File "/home/me/src/sidelight/bank.py", line 155, in __init__\n'
    write_text(
        log, f"INFO No Error here\n(EngineCore pid=7)   RuntimeError: Two devices.\n{place}ok\n"
    )
    assert logged_error(log) == "RuntimeError: Two devices. (at sidelight/bank.py:155)"
    assert logged_error(tmp_path / "none") == ""
