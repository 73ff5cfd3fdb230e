"""Agents of LangChain and of OpenAI's SDK whose texts the packaged guard checks.

They run in the interpreter that ``SIDELIGHT_AGENTS_PYTHON`` names.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from test_examples import EXAMPLES, ROOT
from worlds.applications import ATTACK, POISONED_RESULT, TOOL_RESULT

PYTHON = os.environ.get("SIDELIGHT_AGENTS_PYTHON", "")
TIMEOUT_S = 240
QUESTION = "What does notes.txt say?"
# By file: what is said of a flagged message, and to the model of a flagged tool result.
AGENTS = {
    "langchain_agent.py": (
        "I'm sorry, but I can't comply with that request. It was flagged for injection.",
        "[This tool result was withheld: injection.]",
    ),
    "openai_agents.py": ("Your message was blocked.", "[This tool result was withheld.]"),
}
pytestmark = [
    pytest.mark.skipif(
        not Path(PYTHON or "nowhere").exists(),
        reason="SIDELIGHT_AGENTS_PYTHON names no interpreter with langchain and openai-agents",
    ),
    pytest.mark.timeout(2 * TIMEOUT_S),
]


def run(
    program: str, words: str, folder: Path, sidelight: str, model: str = ""
) -> subprocess.CompletedProcess[str]:
    """The program in a folder of files; without proxies and the packages of these tests."""
    environment = {
        "PATH": os.environ["PATH"],
        "SIDELIGHT_URL": sidelight,
        "MODEL_URL": model,
        "MODEL_API_KEY": "a-key",
        "MODEL": "any",
        # A guard must not fall back on it.
        "OPENAI_API_KEY": "unused",
    }
    command = [PYTHON, str(EXAMPLES / program), words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S,
        check=False,
    )  # fmt: skip


def test_documented_program_prints_the_documented_output(guard, down, tmp_path):
    page = (ROOT / "docs/integrations.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert code.count("http://127.0.0.1:8000") == 1
    for address in (guard, down):
        program = tmp_path / "program.py"
        program.write_text(code.replace("http://127.0.0.1:8000", address))
        done = run(str(program), "", tmp_path, address)
        if address == down:
            assert (done.stdout, "openai.APIConnectionError" in done.stderr) == ("", True)
        else:
            first, second = done.stdout.splitlines()
            assert f"It prints `{first}` and `{second}`" in page, done.stderr


@pytest.mark.parametrize("program", AGENTS)
def test_agent_reads_a_harmless_tool_result(program, guard, hosted, tmp_path):
    address, asked = hosted
    (tmp_path / "notes.txt").write_text(TOOL_RESULT)
    done = run(program, QUESTION, tmp_path, guard, address)
    assert done.stdout == f"It says: {TOOL_RESULT}\n", done.stderr
    assert len(asked) == 2


@pytest.mark.parametrize("program", AGENTS)
def test_flagged_user_message_never_reaches_the_agents_model(program, guard, hosted, tmp_path):
    address, asked = hosted
    done = run(program, ATTACK, tmp_path, guard, address)
    assert done.stdout == f"{AGENTS[program][0]}\n", done.stderr
    assert not asked


@pytest.mark.parametrize("program", AGENTS)
def test_poisoned_tool_result_never_reaches_the_agents_model(program, guard, hosted, tmp_path):
    address, asked = hosted
    (tmp_path / "notes.txt").write_text(POISONED_RESULT)
    done = run(program, QUESTION, tmp_path, guard, address)
    replacement = AGENTS[program][1]
    assert done.stdout == f"It says: {replacement}\n", done.stderr
    assert [body["messages"][-1]["content"] for body in asked] == [QUESTION, replacement]


@pytest.mark.parametrize("program", AGENTS)
def test_agents_model_is_not_called_while_the_server_is_down(program, hosted, down, tmp_path):
    address, asked = hosted
    done = run(program, QUESTION, tmp_path, down, address)
    assert (done.stdout, asked) == ("", [])
    assert done.returncode == 1
    assert "Connection error" in done.stderr


def test_decision_contains_the_probability_of_the_named_probe(guard, down, tmp_path):
    shares = []
    for text in (QUESTION, ATTACK):
        done = run("langchain_decisions.py", text, tmp_path, guard)
        name, share = done.stdout.split(": ")
        assert name == "injection", done.stderr
        shares.append(float(share))
    assert shares[0] < 0.1 < 0.9 < shares[1]
    assert run("langchain_decisions.py", QUESTION, tmp_path, down).returncode == 1
