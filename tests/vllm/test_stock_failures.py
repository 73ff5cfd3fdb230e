"""vLLM's own server with probes that give no verdict, and a policy that blocks."""

from dataclasses import replace

import pytest

from sidelight.artifact import save_probe
from stock_requests import parts_of, post, posts, requests_of, served, written_in


@pytest.fixture(scope="module")
def broken_server(subjects, tmp_path_factory):
    """Its probe of prompts knows chats alone, and that of responses gives no number."""
    home = tmp_path_factory.mktemp("broken")
    chats, damaged = subjects.probes
    for parameter in damaged.mechanism.parameters():
        parameter.fill_(float("nan"))
    probes = (replace(chats, prompt_format="chat"), damaged)
    folders = [str(save_probe(probe, home / probe.name)) for probe in probes]
    with served(subjects, home, "open", folders) as server:
        yield server


def test_a_verdict_that_failed_blocks(broken_server, subjects):
    for streamed in (False, True):
        for path, body in requests_of(subjects, subjects.benign, streamed=streamed):
            if path not in posts(broken_server.address):
                continue
            response = post(broken_server.address, path, body)
            if path == "/v1/completions":
                error = response.json()["error"]
                assert (response.status_code, error["code"]) == (400, "verdict_failed")
            elif not body.get("echo"):
                found = [each for part in parts_of(response) for each in written_in(part)]
                assert response.status_code >= 400 or not found, (path, body, response.text)
