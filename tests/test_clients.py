"""The table of ``docs/routes.md`` that says what each client keeps is what the clients do."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import ContentFilterFinishReasonError

from client_lanes import CLIENTS, MESSAGES, SETTINGS, Client, server_itself, word
from live import MODEL, openai_client, served
from sidelight.engines.base import Engine
from sidelight.engines.transformers import TransformersEngine
from sidelight.policy.rules import Policy, Rule
from sidelight.prompts import Reads
from tiny import three_probes, tiny_backbone, untrained_probe

# LiteLLM leaves its event loop and connections to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
DOCS = Path(__file__).parent.parent / "docs" / "routes.md"
MODES = ("plain", "streamed")
# Some text is sent before the rule can hold.
CUT = {"mode": "block", "threshold": 0.0, "warm_up": 4, "hold_back": 1}
CUTTING = Rule(**CUT)
HEADING = "| lane | " + " | ".join(CLIENTS) + " |"


def documented() -> dict[str, dict[str, str]]:
    """The table's words, by client and lane."""
    rows = DOCS.read_text().split(HEADING)[1].split("\n\n")[0].strip().splitlines()[1:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {
        name: {row[0]: row[place] for row in cells} for place, name in enumerate(CLIENTS, start=1)
    }


@dataclass(frozen=True)
class Servers:
    """Live servers of one engine.

    Attributes:
        scoring: No policy.
        blocking: Every prompt is blocked.
        cutting: Every response is cut while it is written.
        has_deltas: Whether verdicts are also in the deltas of a stream.
    """

    scoring: str
    blocking: str
    cutting: str
    has_deltas: bool = True


def transformers_engine() -> Engine:
    """The transformers engine with probes of both sides."""
    backbone = tiny_backbone()
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    return TransformersEngine(backbone, [*three_probes(backbone), late])


# vLLM runs these tests in an environment of its own: tests/vllm/test_clients_over_vllm.py.
ENGINES = {"transformers": transformers_engine}


@pytest.fixture(scope="module", params=ENGINES)
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    """Three servers of each engine."""
    make = ENGINES[request.param]
    always = Rule("block", threshold=0.0)
    with (
        served(make()) as scoring,
        served(make(), policy=Policy(input={"toxicity": always})) as blocking,
        served(make(), policy=Policy(output={"late": CUTTING})) as cutting,
    ):
        yield Servers(scoring, blocking, cutting)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIENTS)
def test_each_client_keeps_what_the_documentation_says(servers: Servers, name: str):
    client = CLIENTS[name]()
    said = dict(zip(MODES, server_itself(servers.scoring), strict=True))
    seen = {"plain": client.plain(servers.scoring), "streamed": client.streamed(servers.scoring)}
    assert seen["plain"].text == seen["streamed"].text == said["plain"].text
    kept = {
        f"{lane}, {mode}": word(seen[mode].lanes.get(lane), value)
        for mode in MODES
        for lane, value in said[mode].lanes.items()
    }
    assert {
        **kept,
        **blocked(client, servers.blocking),
        **cut(client, servers.cutting),
    } == {
        lane: kept
        for lane, kept in documented()[name].items()
        if servers.has_deltas or "delta" not in lane
    }


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_probe_is_an_error_in_each_client(servers: Servers, name: str, mode: str):
    unknown = {"probes": ["no such probe"]}
    assert CLIENTS[name]().code(servers.scoring, mode == "streamed", unknown) == "probe_not_found"


def test_openais_stream_helper_merges_the_verdicts(servers: Servers):
    plain, _ = server_itself(servers.scoring)
    with (
        openai_client(servers.scoring) as client,
        client.chat.completions.stream(model=MODEL, messages=MESSAGES, **SETTINGS) as stream,
    ):
        list(stream)
        message = stream.current_completion_snapshot.choices[0].message
    assert message.content == plain.text
    found = [
        {k: v for k, v in one.items() if k != "index"} for one in message.sidelight["verdicts"]
    ]
    assert found == plain.lanes["`sidelight`"]["verdicts"]


def test_openais_stream_helper_raises_if_a_text_is_cut(servers: Servers):
    with (
        openai_client(servers.cutting) as client,
        pytest.raises(ContentFilterFinishReasonError),
        client.chat.completions.stream(model=MODEL, messages=MESSAGES, **SETTINGS) as stream,
    ):
        stream.get_final_completion()


def blocked(client: Client, address: str) -> dict[str, str]:
    """Whether the code of a blocked prompt reaches the caller."""
    codes = {mode: client.code(address, mode == "streamed", {}) for mode in MODES}
    return {
        f"`code` of a blocked prompt, {mode}": "kept" if code == "content_filter" else "lost"
        for mode, code in codes.items()
    }


def cut(client: Client, address: str) -> dict[str, str]:
    """Whether the reason why a text was cut reaches the caller, who gets as much of it."""
    said = dict(zip(MODES, server_itself(address), strict=True))
    seen = {"plain": client.plain(address), "streamed": client.streamed(address)}
    assert [said[mode].ending for mode in MODES] == ["content_filter"] * 2
    assert [seen[mode].text for mode in MODES] == [said[mode].text for mode in MODES]
    return {
        f"`finish_reason` of a cut text, {mode}": word(seen[mode].ending, said[mode].ending)
        for mode in MODES
    }
