"""What the real client packages leave of an answer, lane by lane.

Each client asks the same question plain and streamed, and hands over what a program that uses it
can still reach. Importing LiteLLM takes seconds, so the packages are imported where they are used.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import APIStatusError, BaseModel, OpenAI

MODEL = "tiny/llama"
MESSAGES = [{"role": "user", "content": "hello"}]
SETTINGS = {"temperature": 0, "max_tokens": 8}
HEADER = "x-sidelight-verdicts"


@dataclass(frozen=True)
class Seen:
    """What is left of one answer.

    Attributes:
        lanes: By lane; a lane that the client drops is absent.
        text: What the model wrote.
        ending: The reason for the end, as the client gives it.
    """

    lanes: Mapping[str, Any]
    text: str
    ending: str | None


@dataclass
class Lanes:
    """Collects what a client still has; absent things are not kept."""

    found: dict[str, Any] = field(default_factory=dict)

    def put(self, lane: str, value: Any) -> None:
        """Notes what was found; of several findings in one lane, the last."""
        if value is not None:
            self.found[lane] = value


@dataclass(frozen=True)
class Client:
    """One client package.

    Attributes:
        plain: Asks for a whole answer at this address.
        streamed: Asks for a stream.
        code: Asks what the server refuses, plain or as a stream, with more fields in the body, and
            gives the error's code.
    """

    plain: Callable[[str], Seen]
    streamed: Callable[[str], Seen]
    code: Callable[[str, bool, Mapping[str, Any]], str | None]


def server_itself(address: str) -> tuple[Seen, Seen]:
    """What the server says, plain and streamed, before any client has dropped something."""
    body = {"model": MODEL, "messages": MESSAGES, **SETTINGS}
    with httpx.Client(base_url=address, timeout=60) as http:
        plain = http.post("/v1/chat/completions", json=body).raise_for_status()
        stream = http.post("/v1/chat/completions", json={**body, "stream": True}).raise_for_status()
    lines = [line.removeprefix("data: ") for line in stream.text.splitlines() if line]
    whole = plain.json()
    lanes = Lanes({"`moderation`": whole["moderation"], "`sidelight`": whole["sidelight"]})
    lanes.put("header", json.loads(plain.headers[HEADER]))
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    choice = whole["choices"][0]
    seen = Seen(lanes.found, choice["message"]["content"], choice["finish_reason"])
    return seen, _streamed(chunks, stream.headers)


def _streamed(chunks: list[dict[str, Any]], headers: Mapping[str, str]) -> Seen:
    """What is left of a stream whose chunks are as the server wrote them, or less."""
    lanes = Lanes()
    lanes.put("header", json.loads(headers[HEADER]) if HEADER in headers else None)
    texts: list[str] = []
    ending = None
    for chunk in chunks:
        lanes.put("`moderation`", chunk.get("moderation"))
        lanes.put("`sidelight`", chunk.get("sidelight"))
        for choice in chunk["choices"]:
            own = choice["delta"].get("sidelight")
            lanes.put("first delta" if choice.get("finish_reason") is None else "last delta", own)
            texts.append(choice["delta"].get("content") or "")
            ending = choice.get("finish_reason") or ending
    return Seen(lanes.found, "".join(texts), ending)


def openai_python() -> Client:
    """The ``openai`` package."""

    def client(address: str) -> OpenAI:
        return OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)

    def plain(address: str) -> Seen:
        with client(address) as openai:
            raw = openai.chat.completions.with_raw_response.create(
                model=MODEL, messages=MESSAGES, **SETTINGS
            )
        answer = raw.parse()
        lanes = Lanes()
        lanes.put("`moderation`", answer.moderation)
        lanes.put("`sidelight`", (answer.model_extra or {}).get("sidelight"))
        lanes.put("header", json.loads(raw.headers[HEADER]))
        choice = answer.choices[0]
        return Seen(lanes.found, choice.message.content, choice.finish_reason)

    def streamed(address: str) -> Seen:
        with client(address) as openai:
            raw = openai.chat.completions.with_raw_response.create(
                model=MODEL, messages=MESSAGES, **SETTINGS, stream=True
            )
            chunks = list(raw.parse())
        seen = _streamed([chunk.to_dict() for chunk in chunks], raw.headers)
        typed = [chunk.moderation for chunk in chunks if chunk.moderation is not None]
        return Seen({**seen.lanes, "`moderation`": typed[-1]}, seen.text, seen.ending)

    def code(address: str, stream: bool, body: Mapping[str, Any]) -> str | None:
        with client(address) as openai:
            create = openai.chat.completions.create
            return _code(
                lambda: create(model=MODEL, messages=MESSAGES, extra_body=body, stream=stream)
            )

    return Client(plain, streamed, code)


def langchain() -> Client:
    """``ChatOpenAI`` of ``langchain-openai``."""
    from langchain_openai import ChatOpenAI

    def chat(address: str, **more: Any) -> ChatOpenAI:
        return ChatOpenAI(
            model=MODEL,
            base_url=f"{address}/v1",
            api_key="x",
            max_retries=0,
            include_response_headers=True,
            **SETTINGS,
            **more,
        )

    def seen(message: Any) -> Seen:
        lanes = Lanes()
        places = [message.response_metadata, message.additional_kwargs, message.model_extra or {}]
        for place in places:
            lanes.put("`moderation`", place.get("moderation"))
            lanes.put("`sidelight`", place.get("sidelight"))
        headers = message.response_metadata.get("headers", {})
        lanes.put("header", json.loads(headers[HEADER]) if HEADER in headers else None)
        return Seen(lanes.found, message.content, message.response_metadata.get("finish_reason"))

    def plain(address: str) -> Seen:
        return seen(chat(address).invoke(MESSAGES))

    def streamed(address: str) -> Seen:
        chunks = list(chat(address).stream(MESSAGES))
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole += chunk
        return seen(whole)

    def code(address: str, stream: bool, body: Mapping[str, Any]) -> str | None:
        asked = chat(address, extra_body=body)
        return _code(lambda: list(asked.stream(MESSAGES)) if stream else asked.invoke(MESSAGES))

    return Client(plain, streamed, code)


def litellm() -> Client:
    """The LiteLLM SDK."""
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

    def plain(address: str) -> Seen:
        answer = ask(address)
        lanes = Lanes()
        fields = answer.model_dump()
        lanes.put("`moderation`", fields.get("moderation"))
        lanes.put("`sidelight`", fields.get("sidelight"))
        lanes.put("header", json.loads(headers(answer)[HEADER]))
        choice = answer.choices[0]
        return Seen(lanes.found, choice.message.content, choice.finish_reason)

    def streamed(address: str) -> Seen:
        stream = ask(address, stream=True)
        chunks = [chunk.model_dump() for chunk in stream]
        return _streamed(chunks, headers(stream))

    def code(address: str, stream: bool, body: Mapping[str, Any]) -> str | None:
        return _code(lambda: ask(address, extra_body=body, stream=stream))

    return Client(plain, streamed, code)


def _code(call: Callable[[], object]) -> str | None:
    """The error's code, as the client gives it; all three raise a kind of ``APIStatusError``."""
    try:
        call()
    except APIStatusError as error:
        return error.code
    raise AssertionError("The server refuses this request.")


CLIENTS = {
    "openai-python": openai_python,
    "LangChain `ChatOpenAI`": langchain,
    "LiteLLM SDK": litellm,
}


def word(seen: Any, said: Any) -> str:
    """What became of a lane: ``typed`` is an object of the client's own, equal in content."""
    if seen is None:
        return "lost"
    if isinstance(seen, BaseModel):
        assert seen.to_dict() == said
        return "typed"
    assert seen == said
    return "kept"
