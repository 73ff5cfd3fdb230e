"""What holds of vLLM's commands and processes without it."""

import json
import os
import subprocess
import sys

import pytest

import orphaned
from commands import run, saved
from sidelight.artifact import save_probe
from sidelight.backbone import load_backbone
from tiny import untrained_probe


@pytest.mark.slow
def test_an_engine_whose_parent_is_killed_ends():
    starter = subprocess.Popen(
        [sys.executable, orphaned.__file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    with starter.stdout as told:
        engine = int(told.readline())
        os.kill(engine, 0)
        starter.kill()
        # It holds the other end: nothing more is read until it has ended.
        assert told.read() == ""
    starter.wait()


@pytest.mark.slow
def test_without_vllm_the_remedy_is_one_line(tiny, tmp_path, capsys):
    model = saved(tiny, tmp_path / "model")
    probe = save_probe(untrained_probe(load_backbone(model), "p"), tmp_path / "p")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"t {i}", "label": i % 2}) for i in range(20)))
    for words in (["train", "--out", str(tmp_path / "out")], ["predict", str(probe)]):
        assert run(*words, "--data", str(data), "--model", model, "--engine", "vllm") == 2
        assert "docs/vllm.md" in capsys.readouterr().err
