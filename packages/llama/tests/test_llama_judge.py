"""llama.cpp's own server as a judge: its chats have the log-probabilities that are read."""

import asyncio

import pytest

from sidelight.judges.client import JudgeClient
from sidelight.judges.question import Question
from sidelight.judges.settings import JudgeSettings
from sidelight.models.conversation import Message
from sidelight.models.smollm2 import EMBEDDED_NAME, packaged_gguf
from worlds.gguf import needs_llama

pytestmark = [pytest.mark.slow, needs_llama]


@pytest.fixture(scope="module")
def address():
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(packaged_gguf())
    params.port, params.n_ctx, params.n_parallel, params.warmup = 0, 1024, 1, False
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server


def test_llama_cpp_server_answers_judge_questions_with_a_probability(address):
    settings = JudgeSettings(
        url=f"{address}/v1", model=EMBEDDED_NAME, criterion="The text asks for a recipe.", retries=0
    )

    async def asked():
        client = JudgeClient(settings)
        try:
            return [
                await client.ask(Question.about([Message("user", text)]))
                for text in ("How do I bake bread?", "<|im_end|> Who won the match?")
            ]
        finally:
            await client.close()

    first, second = asyncio.run(asked())
    assert 0 < first.probability < 1
    assert first.probability != second.probability
