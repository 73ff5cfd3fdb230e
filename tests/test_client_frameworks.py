"""What frameworks over OpenAI's API make of refusals is what ``docs/routes.md`` says.

Those that are installed are asked, each in a process of its own: in this interpreter, and in those
that ``SIDELIGHT_CLIENT_PYTHON`` names (as in ``PATH``), such as one with an older ``openai``. The
AI SDK needs Node.js, and ``SIDELIGHT_NODE``: a folder with its ``node_modules``.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from client_frameworks import FRAMEWORKS, NOT_INSTALLED
from live import served
from sidelight.engines.transformers import TransformersEngine
from sidelight.policy.rules import Policy, Rule
from tiny import three_probes, tiny_backbone

HERE = Path(__file__).parent
NAMES = (*FRAMEWORKS, "AI SDK")
HEADING = "| client | chat | stream | usage of a stream | tools | typed output | blocked prompt |"
TIMEOUT_S = 120


def documented() -> dict[str, dict[str, str]]:
    """The table's words, by client and column."""
    page = (HERE.parent / "docs" / "routes.md").read_text()
    rows = page.split(HEADING)[1].split("\n\n")[0].strip().splitlines()[1:]
    columns = [column.strip() for column in HEADING.strip("|").split("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in cells}


@pytest.fixture(scope="module")
def addresses() -> Iterator[tuple[str, str]]:
    """A server that answers, and one that blocks every prompt."""

    def engine() -> TransformersEngine:
        backbone = tiny_backbone()
        return TransformersEngine(backbone, three_probes(backbone))

    always = Policy(input={"toxicity": Rule("block", threshold=0.0)})
    with served(engine()) as scoring, served(engine(), policy=always) as blocking:
        yield scoring, blocking


def commands(name: str) -> Iterator[Sequence[str]]:
    """How to ask a client, once for each place where it may be installed."""
    if name == "AI SDK":
        if shutil.which("node"):
            yield "node", str(HERE / "client_ai_sdk.mjs")
        return
    others = os.environ.get("SIDELIGHT_CLIENT_PYTHON", "").split(os.pathsep)
    for python in filter(None, (sys.executable, *others)):
        yield python, str(HERE / "client_frameworks.py"), name


def test_the_table_names_every_framework():
    assert sorted(documented()) == sorted(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_framework_does_what_the_documentation_says(addresses: tuple[str, str], name: str):
    asked = 0
    for command in commands(name):
        done = subprocess.run(
            [*command, *addresses], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        if done.returncode == NOT_INSTALLED:
            continue
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == documented()[name]
        asked += 1
    if not asked:
        pytest.skip(f"{name} is not installed")
