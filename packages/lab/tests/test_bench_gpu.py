"""The check of a GPU, without one: what fails loses nothing, and what has passed stays."""

import json
import socket
import subprocess
from importlib.util import find_spec
from pathlib import Path

from sidelight.storage import write_text
from sidelight_lab.bench.gpu import (
    conditions_of,
    logged_error,
    public,
)
from sidelight_lab.bench.gpu_engine import Setting


def test_reports_contain_no_paths_host_names_or_keys(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    output = (
        f"Cannot read {tmp_path}/model\nwith hf_secret_value on {socket.gethostname()}:8000/v1/x"
    )
    assert public(output) == "Cannot read model with *** on HOST:8000/v1/x"
    assert public("POST /v1/chat/completions answered 500") == (
        "POST /v1/chat/completions answered 500"
    )
    options = {"max_num_seqs": 8, "hf_token": "hf_other", "download_dir": "/home/me"}
    told = json.dumps(conditions_of(Setting("cpu", "files", "/home/me/llama", "tiny", options)))
    assert '"max_num_seqs": 8' in told
    assert not any(word in told for word in ("hf_other", "home/me", socket.gethostname()))


def test_failed_vllm_install_is_reported_and_keeps_our_engine(monkeypatch, tmp_path):
    root = Path(__file__).parents[3]
    order = ["make", "-n", "-B", ".venv-gpu/.ready"]
    output = subprocess.run(order, cwd=root, capture_output=True, text=True, check=True).stdout
    ours, theirs = (
        output.index("install --quiet --disable-pip-version-check -e"),
        output.index("vllm=="),
    )
    assert ours < theirs
    assert "> .venv-gpu/vllm.log 2>&1 ||" in output[theirs:]
    if find_spec("vllm") is None:
        write_text(
            tmp_path / "vllm.log", "Collecting vllm\nERROR: No matching distribution found\n"
        )
        monkeypatch.setattr("sys.prefix", str(tmp_path))
        told = conditions_of(Setting("cpu", "files", None, "tiny"))["vllm"]
        assert told == "not installed ERROR: No matching distribution found"


def test_subprocess_error_is_read_from_the_log(tmp_path):
    log = tmp_path / "log"
    place = '  File "/home/me/src/sidelight/probes/bank.py", line 155, in __init__\n'
    write_text(
        log, f"INFO No Error here\n(EngineCore pid=7)   RuntimeError: Two devices.\n{place}ok\n"
    )
    assert logged_error(log) == "RuntimeError: Two devices. (at sidelight/probes/bank.py:155)"
    assert logged_error(tmp_path / "none") == ""
