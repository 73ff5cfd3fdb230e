"""Rules that defer to a judge on vLLM's own server, and that server as a judge."""

import asyncio

import pytest

import wordings
from defer_contract import DeferContract, deferring
from sidelight.judges.client import JudgeClient
from sidelight.judges.question import JudgeError, Question
from sidelight.judges.settings import JudgeSettings
from sidelight.models.conversation import Message

pytestmark = pytest.mark.xdist_group("stock")


@pytest.fixture(scope="module")
def server(stock, subjects, tmp_path_factory):
    home = tmp_path_factory.mktemp("deferring")
    with deferring(stock.address, "tiny", subjects, home) as live:
        yield live


class TestStockServer(DeferContract):
    pass


def test_vllm_chats_return_the_log_probabilities_a_judge_needs(server, stock, subjects):
    """A model with random weights answers with neither word, so there is no verdict."""
    # A server that defers is no judge.
    server.serve(server.home / "plain.toml")
    settings = JudgeSettings(
        url=f"{stock.address}/v1", model="tiny", profile="llama-guard", retries=0, timeout_s=100
    )

    async def asked():
        client = JudgeClient(settings)
        try:
            await client.ask(Question.about([Message("user", subjects.benign)]))
        finally:
            await client.close()

    with pytest.raises(JudgeError, match=wordings.NEITHER_WORD) as failure:
        asyncio.run(asked())
    assert failure.value.reason == "unreadable"
