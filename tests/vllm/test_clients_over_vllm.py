"""The tests of ``test_clients.py``, with ``sidelight serve --engine vllm`` as the server."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from commands import saved
from live import MODEL
from sidelight.artifact import save_probe
from sidelight.prompts import Reads
from stock_server import thin_start
from test_clients import (
    CUT,
    Servers,
    test_an_unknown_probe_is_an_error_in_each_client,
    test_each_client_keeps_what_the_documentation_says,
    test_openais_stream_helper_raises_if_a_text_is_cut,
)
from tiny import three_probes, untrained_probe
from vllm_served import tiny_llama

__all__ = [
    "test_an_unknown_probe_is_an_error_in_each_client",
    "test_each_client_keeps_what_the_documentation_says",
    "test_openais_stream_helper_raises_if_a_text_is_cut",
]

POLICIES = {
    "scoring": "",
    "blocking": '[input.toxicity]\nmode = "block"\nthreshold = 0.0\n',
    "cutting": "[output.late]\n" + "".join(f"{k} = {v!r}\n" for k, v in CUT.items()),
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """A server of each policy, whose model is a folder with the name that the clients use."""
    folder = tmp_path_factory.mktemp("clients")
    backbone = tiny_llama()
    saved(backbone, folder / MODEL)
    probes = [*three_probes(backbone), untrained_probe(backbone, "late", reads=Reads("response"))]
    folders = [str(save_probe(probe, folder / probe.name)) for probe in probes]
    addresses: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch, ExitStack() as running:
        patch.chdir(folder)
        for name, policy in POLICIES.items():
            home = tmp_path_factory.mktemp(name)
            (home / "policy.toml").write_text(policy)
            words = ("--policy", str(home / "policy.toml"))
            server = running.enter_context(thin_start(MODEL, folders, home, *words))
            addresses[name] = server.address
        yield Servers(**addresses, has_deltas=False)
