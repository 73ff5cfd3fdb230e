"""The tables of ``docs/routes.md`` that say what clients keep and refuse are what the clients do.

Each is asked in a process of its own: in this interpreter, and in those that
``SIDELIGHT_CLIENT_PYTHON`` names (as in ``PATH``), such as one with an older ``openai``. The AI SDK
needs Node.js, and ``SIDELIGHT_NODE``: a folder with its ``node_modules``. In a lane of vLLM
the servers are vLLM's.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, chdir, contextmanager
from pathlib import Path

import pytest
from real_clients import CLIENTS, NOT_INSTALLED, WITH_LANES

from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Reads
from sidelight.policy.rules import read_policy
from sidelight.probes.artifact import save_probe
from sidelight.probes.probe import Probe
from sidelight_lab.bench.server_process import ServerProcess
from worlds.data import documented_table
from worlds.models import saved, three_probes, tiny_backbone, untrained_probe
from worlds.servers import MODEL, served

HERE = Path(__file__).parent
NAMES = (*CLIENTS, "AI SDK")
HEADINGS = "chat | stream | usage of a stream | tools | typed output | blocked prompt"
TIMEOUT_S = 240
OVER_VLLM = "VLLM_USE_V2_MODEL_RUNNER" in os.environ
# One process starts vLLM's servers; our own are cheap.
pytestmark = [pytest.mark.xdist_group("clients")] if OVER_VLLM else []
# Some text is sent before the rule that cuts can hold.
POLICIES = {
    "scoring": "",
    "blocking": '[input.toxicity]\nmode = "block"\nthreshold = 0.0\n',
    "cutting": '[output.late]\nmode = "block"\nthreshold = 0.0\nwarm_up = 4\nhold_back = 1\n',
}
VLLM_SIZES = (
    "block_size=32", "max_model_len=1024", "max_num_batched_tokens=64", "max_num_seqs=8",
    "enforce_eager=true",
)  # fmt: skip


def table(corner: str, headings: str) -> dict[str, dict[str, str]]:
    """The words by row and column of the table with this head."""
    rows = documented_table("routes.md", corner, headings)
    return {row.pop(corner): row for row in rows}


CLIENT_WORDS = table("client", HEADINGS)
LANE_WORDS = table("where", " | ".join(WITH_LANES))


def probes_of(backbone: TransformersBackbone) -> list[Probe]:
    return [*three_probes(backbone), untrained_probe(backbone, "late", reads=Reads("response"))]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sequence[str]]:
    """A server that answers, one that blocks every prompt, and one that cuts every text."""
    folder = tmp_path_factory.mktemp("servers")
    files = [folder / f"{name}.toml" for name in POLICIES]
    for path in files:
        path.write_text(POLICIES[path.stem])
    with ExitStack() as running:
        start = vllm_server(folder) if OVER_VLLM else sidelight_server
        yield [running.enter_context(start(path)) for path in files]


@contextmanager
def sidelight_server(policy: Path) -> Iterator[str]:
    backbone = tiny_backbone()
    engine = TransformersEngine(backbone, probes_of(backbone))
    with served(engine, policy=read_policy(policy)) as address:
        yield address


def vllm_server(folder: Path) -> Callable[[Path], AbstractContextManager[str]]:
    """``sidelight serve --engine vllm``; the model is a folder with the name that clients use."""
    from worlds.vllm import tiny_llama

    # Three servers share the machine.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    backbone = tiny_llama()
    saved(backbone, folder / MODEL)
    probes = [save_probe(probe, folder / probe.name) for probe in probes_of(backbone)]
    options = ["--engine", "vllm", "--model", MODEL, "--dtype", "float32"]
    options += [word for size in VLLM_SIZES for word in ("--engine-option", size)]

    @contextmanager
    def start(policy: Path) -> Iterator[str]:
        with (
            chdir(folder),
            ServerProcess(probes, options=[*options, "--policy", str(policy)]) as server,
        ):
            server.wait_until_ready()
            yield server.url

    return start


def commands(name: str) -> Iterator[Sequence[str]]:
    """How to ask a client, once for each place where it may be installed."""
    if name == "AI SDK":
        if shutil.which("node"):
            yield "node", str(HERE / "ai_sdk.mjs")
        return
    interpreters = os.environ.get("SIDELIGHT_CLIENT_PYTHON", "").split(os.pathsep)
    for python in filter(None, (sys.executable, *interpreters)):
        yield python, str(HERE / "real_clients.py"), name


def test_documented_tables_list_every_client():
    assert sorted(CLIENT_WORDS) == sorted(NAMES)


@pytest.mark.parametrize("name", WITH_LANES if OVER_VLLM else NAMES)
def test_each_client_behaves_as_documented(addresses: Sequence[str], name: str):
    asked = 0
    for command in commands(name):
        done = subprocess.run(
            [*command, *addresses], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        if done.returncode == NOT_INSTALLED:
            continue
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        if not OVER_VLLM:
            # vLLM's server has tools and typed outputs.
            assert found["client"] == CLIENT_WORDS[name]
        if name in WITH_LANES and command[0] == sys.executable:
            wanted = {lane: row[name] for lane, row in LANE_WORDS.items()}
            if OVER_VLLM:
                # Its deltas carry no verdicts.
                wanted = {lane: word for lane, word in wanted.items() if "delta" not in lane}
            assert found["lanes"] == wanted
        asked += 1
    if not asked:
        pytest.skip(f"{name} is not installed")
