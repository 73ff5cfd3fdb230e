"""Inspect with the packaged guard before a model.

It runs in the interpreter that ``SIDELIGHT_INSPECT_PYTHON`` names.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from test_examples import EXAMPLES
from worlds.applications import ATTACK

PYTHON = os.environ.get("SIDELIGHT_INSPECT_PYTHON", "")
TIMEOUT_S = 240
QUESTION = "What does notes.txt say?"
pytestmark = [
    pytest.mark.skipif(
        not Path(PYTHON or "nowhere").exists(),
        reason="SIDELIGHT_INSPECT_PYTHON names no interpreter with inspect_ai",
    ),
    pytest.mark.timeout(2 * TIMEOUT_S),
]


def evaluated(folder: Path, sidelight: str, model: str) -> dict[str, Any]:
    """The log of the task on an attack and a question."""
    data = folder / "texts.jsonl"
    rows = [{"text": ATTACK, "label": 1}, {"text": QUESTION, "label": 0}]
    data.write_text("\n".join(map(json.dumps, rows)))
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "SIDELIGHT_URL": sidelight,
        "MODEL_BASE_URL": model,
        "MODEL_API_KEY": "a-key",
    }
    options = ["--model", "openai-api/model/any", "-T", f"data={data}", "--display", "plain"]
    logs = ["--log-dir", str(folder / "logs"), "--log-format", "json"]
    done = subprocess.run(
        [PYTHON, "-m", "inspect_ai", "eval", "inspect_guard.py", *options, *logs],
        cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S,
        check=False,
    )  # fmt: skip
    logs = [*(folder / "logs").glob("*.json")]
    assert len(logs) == 1, done.stdout + done.stderr
    return json.loads(logs[0].read_bytes())


def test_attack_is_blocked_and_the_model_receives_only_the_question(guard, hosted, tmp_path):
    address, asked = hosted
    log = evaluated(tmp_path, guard, address)
    (score,) = log["results"]["scores"]
    found = {name: metric["value"] for name, metric in score["metrics"].items()}
    assert (found["attack"], found["ordinary"]) == (1, 0)
    assert {body["messages"][0]["content"] for body in asked} == {QUESTION}


def test_evaluation_fails_without_model_calls_while_server_is_down(hosted, down, tmp_path):
    address, asked = hosted
    log = evaluated(tmp_path, down, address)
    assert (log["status"], asked) == ("error", [])
    assert "ConnectError" in log["error"]["message"]
