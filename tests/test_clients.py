"""The table of ``docs/serving.md`` that says what each client keeps is what the clients do."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from client_lanes import CLIENTS, server_itself, word
from live import served
from sidelight.engines import TransformersEngine
from sidelight.prompts import Reads
from tiny import three_probes, tiny_backbone, untrained_probe

# LiteLLM leaves its event loop and connections to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
DOCS = Path(__file__).parent.parent / "docs" / "serving.md"
HEADING = "| lane | " + " | ".join(CLIENTS) + " |"


def documented() -> dict[str, dict[str, str]]:
    """The table's words, by client and lane."""
    rows = DOCS.read_text().split(HEADING)[1].split("\n\n")[0].strip().splitlines()[1:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {
        name: {row[0]: row[place] for row in cells} for place, name in enumerate(CLIENTS, start=1)
    }


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """A live server of each engine, with probes of both sides."""
    if request.param == "vllm" and find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    backbone = tiny_backbone()
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    with served(TransformersEngine(backbone, [*three_probes(backbone), late])) as address:
        yield address


@pytest.mark.parametrize("name", CLIENTS)
def test_each_client_keeps_what_the_documentation_says(address: str, name: str):
    client = CLIENTS[name]()
    said = dict(zip(("plain", "streamed"), server_itself(address), strict=True))
    seen = {"plain": client.plain(address), "streamed": client.streamed(address)}
    assert seen["plain"].text == seen["streamed"].text == said["plain"].text
    kept = {
        f"{lane}, {mode}": word(seen[mode].lanes.get(lane), value)
        for mode in said
        for lane, value in said[mode].lanes.items()
    }
    kept["`code` of an error"] = "kept" if client.refused(address) == "probe_not_found" else "lost"
    assert kept == documented()[name]
