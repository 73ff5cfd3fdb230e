"""What clients over OpenAI's API make of the server's answers, and what they leave of a verdict.

``python real_clients.py NAME SCORING BLOCKING CUTTING`` prints it as JSON, so that each client may
run in an interpreter of its own; exit code 3: it is not installed. ``BLOCKING`` blocks every
prompt, and ``CUTTING`` cuts every text while it is written.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

MODEL = "tiny/llama"
MESSAGES = [{"role": "user", "content": "hello"}]
SETTINGS = {"temperature": 0, "max_tokens": 8}
TOOL = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
HEADER = "x-sidelight-verdicts"
NOT_INSTALLED = 3
Body = Mapping[str, Any]


@dataclass(frozen=True)
class Seen:
    """What is left of one answer.

    Attributes:
        text: What the model wrote.
        tokens: Those of the prompt.
        ending: The reason for the end.
        lanes: Verdicts by lane; a lane that the client drops is absent.
    """

    text: str
    tokens: int | None = None
    ending: str | None = None
    lanes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """How one client package asks a server at an address.

    Attributes:
        complete: Asks for a whole answer, with more fields in the body.
        stream: The same as a stream.
        tools: Offers a tool.
        typed: Asks for an object of a type.
    """

    complete: Callable[[str, Body], Seen]
    stream: Callable[[str, Body], Seen]
    tools: Callable[[str], object]
    typed: Callable[[str], object]


class Answer(BaseModel):
    """An answer."""

    number: int


def lanes(headers: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an answer's header and fields."""
    found = {f"`{name}`": fields.get(name) for name in ("moderation", "sidelight")}
    found["header"] = json.loads(headers[HEADER]) if HEADER in headers else None
    return {lane: value for lane, value in found.items() if value is not None}


def answered(fields: Body, headers: Mapping[str, str]) -> Seen:
    """An answer, from its fields as the server wrote them, or less."""
    choice = fields["choices"][0]
    text, ending = choice["message"]["content"], choice["finish_reason"]
    return Seen(text, fields["usage"]["prompt_tokens"], ending, lanes(headers, fields))


def merged(chunks: Iterable[Body], headers: Mapping[str, str]) -> Seen:
    """A stream, likewise."""
    found = lanes(headers, {})
    texts: list[str] = []
    tokens = ending = None
    for chunk in chunks:
        found |= lanes({}, chunk)
        tokens = (chunk.get("usage") or {}).get("prompt_tokens", tokens)
        for choice in chunk["choices"]:
            if (extension := choice["delta"].get("sidelight")) is not None:
                found["last delta" if choice.get("finish_reason") else "first delta"] = extension
            texts.append(choice["delta"].get("content") or "")
            ending = choice.get("finish_reason") or ending
    return Seen("".join(texts), tokens, ending, found)


def server_itself(address: str) -> tuple[Seen, Seen]:
    """What the server says, whole and streamed, before any client has dropped something."""
    import httpx

    body = {"model": MODEL, "messages": MESSAGES, **SETTINGS}
    with httpx.Client(base_url=address, timeout=60) as http:
        plain = http.post("/v1/chat/completions", json=body).raise_for_status()
        stream = http.post("/v1/chat/completions", json={**body, "stream": True}).raise_for_status()
    lines = [line.removeprefix("data: ") for line in stream.text.splitlines() if line]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    return answered(plain.json(), plain.headers), merged(chunks, stream.headers)


def openai_python() -> Client:
    from openai import OpenAI

    def completions(address: str) -> Any:
        return OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0).chat.completions

    def ask(address: str, **body: Any) -> Any:
        create = completions(address).with_raw_response.create
        return create(model=MODEL, messages=MESSAGES, **SETTINGS, **body)

    def fields(answer: Any) -> Body:
        return {**answer.to_dict(), "moderation": getattr(answer, "moderation", None)}

    def complete(address: str, more: Body) -> Seen:
        raw = ask(address, extra_body=more)
        return answered(fields(raw.parse()), raw.headers)

    def stream(address: str, more: Body) -> Seen:
        raw = ask(address, extra_body=more, **USAGE)
        return merged(map(fields, raw.parse()), raw.headers)

    def typed(address: str) -> object:
        return completions(address).parse(model=MODEL, messages=MESSAGES, response_format=Answer)

    return Client(complete, stream, lambda address: ask(address, tools=[TOOL]), typed)


def langchain() -> Client:
    from langchain_openai import ChatOpenAI

    def chat(address: str, more: Body) -> Any:
        # Without stream_usage it asks servers other than OpenAI's for no usage.
        return ChatOpenAI(
            model=MODEL,
            base_url=f"{address}/v1",
            api_key="x",
            max_retries=0,
            stream_usage=True,
            include_response_headers=True,
            extra_body=more or None,
            **SETTINGS,
        )

    def seen(message: Any) -> Seen:
        told = message.response_metadata
        fields = {**told, **message.additional_kwargs, **(message.model_extra or {})}
        tokens = message.usage_metadata and message.usage_metadata["input_tokens"]
        left = lanes(told.get("headers", {}), fields)
        return Seen(message.content, tokens, told.get("finish_reason"), left)

    def stream(address: str, more: Body) -> Seen:
        message, *chunks = chat(address, more).stream(MESSAGES)
        for chunk in chunks:
            message += chunk
        return seen(message)

    return Client(
        lambda address, more: seen(chat(address, more).invoke(MESSAGES)),
        stream,
        lambda address: chat(address, {}).bind_tools([TOOL]).invoke(MESSAGES),
        lambda address: chat(address, {}).with_structured_output(Answer).invoke(MESSAGES),
    )


def litellm() -> Client:
    # Else the import asks the internet for prices.
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    litellm.suppress_debug_info = True

    def ask(address: str, **more: Any) -> Any:
        return litellm.completion(
            model=f"openai/{MODEL}",
            api_base=f"{address}/v1",
            api_key="x",
            max_retries=0,
            messages=MESSAGES,
            **SETTINGS,
            **more,
        )

    def headers(answer: Any) -> dict[str, str]:
        found = answer._hidden_params["additional_headers"]
        return {name.removeprefix("llm_provider-"): value for name, value in found.items()}

    def complete(address: str, more: Body) -> Seen:
        answer = ask(address, extra_body=more)
        return answered(answer.model_dump(), headers(answer))

    def stream(address: str, more: Body) -> Seen:
        answer = ask(address, extra_body=more, **USAGE)
        chunks = [chunk.model_dump() for chunk in answer]
        return merged(chunks, headers(answer))

    return Client(
        complete,
        stream,
        lambda address: ask(address, tools=[TOOL]),
        lambda address: ask(address, response_format={"type": "json_object"}),
    )


def pydantic_ai() -> Client:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    def agent(address: str, **more: Any) -> Any:
        provider = OpenAIProvider(base_url=f"{address}/v1", api_key="x")
        return Agent(OpenAIChatModel(MODEL, provider=provider), model_settings=SETTINGS, **more)

    def clock() -> str:
        return "noon"

    async def streamed(address: str) -> Seen:
        async with agent(address).run_stream("hello") as run:
            text = "".join([chunk async for chunk in run.stream_text(delta=True)])
            usage = run.usage() if callable(run.usage) else run.usage
            return Seen(text, usage.input_tokens)

    return Client(
        lambda address, _: Seen(agent(address).run_sync("hello").output),
        lambda address, _: asyncio.run(streamed(address)),
        lambda address: agent(address, tools=[clock]).run_sync("hello"),
        lambda address: agent(address, output_type=Answer).run_sync("hello"),
    )


CLIENTS: Mapping[str, Callable[[], Client]] = {
    "openai-python": openai_python,
    "LangChain `ChatOpenAI`": langchain,
    "LiteLLM SDK": litellm,
    "pydantic-ai": pydantic_ai,
}


# Those that are columns of the table of lanes.
WITH_LANES = list(CLIENTS)[:3]


def call_result(ask: Callable[[], object]) -> str:
    """What the client makes of a request that the server refuses."""
    try:
        ask()
    except Exception as error:  # noqa: BLE001
        message, cause = "", error
        while cause is not None:
            message += f"{cause} {getattr(cause, 'body', '')} "
            cause = cause.__cause__ or cause.__context__
        if "--engine vllm" in message:
            return "refused"
        return "raises" if "was blocked by" in message else f"fails: {message}"
    return "answered"


def code(ask: Callable[[], object]) -> str | None:
    """The error's code, as the client gives it; all clients with lanes raise OpenAI's errors."""
    from openai import APIStatusError

    try:
        ask()
    except APIStatusError as error:
        return error.code
    raise AssertionError("The server refuses this request.")


def word(seen: Any, expected: Any) -> str:
    """What became of a lane: ``typed`` is an object of the client's own, equal in content."""
    if seen is None:
        return "lost"
    if hasattr(seen, "to_dict"):
        assert seen.to_dict() == expected
        return "typed"
    assert seen == expected
    return "kept"


def words(client: Client, scoring: str, blocking: str) -> dict[str, str]:
    """By column of the table of clients in docs/routes.md."""
    complete, streamed = client.complete(scoring, {}), client.stream(scoring, {})
    return {
        "chat": "works" if complete.text else "empty",
        "stream": "works" if streamed.text == complete.text else "differs",
        "usage of a stream": "kept" if streamed.tokens else "lost",
        "tools": call_result(lambda: client.tools(scoring)),
        "typed output": call_result(lambda: client.typed(scoring)),
        "blocked prompt": call_result(lambda: client.complete(blocking, {})),
    }


def lane_words(client: Client, scoring: str, blocking: str, cutting: str) -> dict[str, str]:
    """By row of the table of lanes in docs/routes.md."""
    found: dict[str, str] = {}
    modes = {"plain": client.complete, "streamed": client.stream}
    for (mode, ask), expected, expected_cut in zip(
        modes.items(), server_itself(scoring), server_itself(cutting), strict=True
    ):
        seen, cut = ask(scoring, {}), ask(cutting, {})
        assert (seen.text, cut.text) == (expected.text, expected_cut.text)
        assert expected_cut.ending == "content_filter"
        assert code(lambda ask=ask: ask(scoring, {"probes": ["x"]})) == "probe_not_found"
        blocked = code(lambda ask=ask: ask(blocking, {}))
        found |= {
            f"{lane}, {mode}": word(seen.lanes.get(lane), value)
            for lane, value in expected.lanes.items()
        }
        found[f"`code` of a blocked prompt, {mode}"] = word(blocked, "content_filter")
        found[f"`finish_reason` of a cut text, {mode}"] = word(cut.ending, expected_cut.ending)
    return found


if __name__ == "__main__":
    _, name, *addresses = sys.argv
    try:
        client = CLIENTS[name]()
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    rows = lane_words(client, *addresses) if name in WITH_LANES else {}
    print(json.dumps({"client": words(client, *addresses[:2]), "lanes": rows}))
