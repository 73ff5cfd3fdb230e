"""The packaged guard of injections behind our own server, for clients that ask it."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request

from sidelight.engines.transformers.backbone import load_backbone
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.guards import probe_folder
from sidelight.models.smollm2 import EMBEDDED_NAME
from sidelight.probes.artifact import load_probe
from worlds.servers import free_port, listening, served


@pytest.fixture(scope="session")
def guard() -> Iterator[str]:
    """The address of a server of ``guard:injection`` without a policy."""
    try:
        probe = load_probe(probe_folder("guard:injection"))
        backbone = load_backbone(EMBEDDED_NAME)
    except SidelightError as error:
        pytest.skip(str(error))
    with served(TransformersEngine(backbone, [probe], model=EMBEDDED_NAME)) as address:
        yield address


@pytest.fixture
def down() -> str:
    """An address at which nothing listens."""
    return f"http://127.0.0.1:{free_port()}"


Hosted = tuple[str, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def hosted_model() -> Iterator[Hosted]:
    """The address of a stand-in for a hosted model, and the bodies that have reached it.

    It answers a message of the user with a call of ``read_file``, and a tool's result with that
    result.
    """
    asked: list[dict[str, Any]] = []
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def answer(request: Request) -> dict[str, Any]:
        asked.append(await request.json())
        last = asked[-1]["messages"][-1]
        function = {"name": "read_file", "arguments": '{"name": "notes.txt"}'}
        call = {"id": "call_1", "type": "function", "function": function}
        message: dict[str, Any] = {"role": "assistant", "content": f"It says: {last['content']}"}
        if last["role"] == "user":
            message |= {"content": None, "tool_calls": [call]}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        fixed = {"id": "1", "object": "chat.completion", "created": 1, "model": "any"}
        return {**fixed, "choices": [choice], "usage": usage}

    with listening(app) as address:
        yield f"{address}/v1", asked


@pytest.fixture
def hosted(hosted_model: Hosted) -> Hosted:
    """The same, with the bodies of one test."""
    hosted_model[1].clear()
    return hosted_model
