"""What becomes of five requests in a client that frameworks have built over OpenAI's API.

``python client_frameworks.py NAME ADDRESS BLOCKING`` prints it as JSON, so that each client may run
in an interpreter of its own; exit code 3: it is not installed. ``BLOCKING`` blocks every prompt.
"""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "tiny/llama"
MESSAGES = [{"role": "user", "content": "hello"}]
SETTINGS = {"temperature": 0, "max_tokens": 4}
TOOL = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}
NOT_INSTALLED = 3


@dataclass(frozen=True)
class Framework:
    """How one client asks a server at an address.

    Attributes:
        chat: Gives the text.
        stream: Gives the text and the tokens of the prompt, as far as the client tells them.
        tools: Offers a tool.
        typed: Asks for an object of a type.
    """

    chat: Callable[[str], str]
    stream: Callable[[str], tuple[str, int | None]]
    tools: Callable[[str], object]
    typed: Callable[[str], object]


def openai_python() -> Framework:
    from openai import OpenAI
    from pydantic import BaseModel

    class Answer(BaseModel):
        number: int

    def completions(address: str) -> Any:
        return OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0).chat.completions

    def ask(address: str, **more: Any) -> Any:
        return completions(address).create(model=MODEL, messages=MESSAGES, **SETTINGS, **more)

    def stream(address: str) -> tuple[str, int | None]:
        chunks = list(ask(address, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        return text, chunks[-1].usage and chunks[-1].usage.prompt_tokens

    return Framework(
        lambda address: ask(address).choices[0].message.content,
        stream,
        lambda address: ask(address, tools=[TOOL]),
        lambda address: completions(address).parse(
            model=MODEL, messages=MESSAGES, response_format=Answer
        ),
    )


def langchain() -> Framework:
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    class Answer(BaseModel):
        """An answer."""

        number: int

    def chat(address: str) -> ChatOpenAI:
        # Without stream_usage it asks servers other than OpenAI's for no usage.
        return ChatOpenAI(
            model=MODEL,
            base_url=f"{address}/v1",
            api_key="x",
            max_retries=0,
            stream_usage=True,
            **SETTINGS,
        )

    def stream(address: str) -> tuple[str, int | None]:
        whole, *others = chat(address).stream(MESSAGES)
        for chunk in others:
            whole += chunk
        return whole.content, whole.usage_metadata and whole.usage_metadata["input_tokens"]

    return Framework(
        lambda address: chat(address).invoke(MESSAGES).content,
        stream,
        lambda address: chat(address).bind_tools([TOOL]).invoke(MESSAGES),
        lambda address: chat(address).with_structured_output(Answer).invoke(MESSAGES),
    )


def litellm() -> Framework:
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

    def stream(address: str) -> tuple[str, int | None]:
        chunks = list(ask(address, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        usage = getattr(chunks[-1], "usage", None)
        return text, usage and usage.prompt_tokens

    return Framework(
        lambda address: ask(address).choices[0].message.content,
        stream,
        lambda address: ask(address, tools=[TOOL]),
        lambda address: ask(address, response_format={"type": "json_object"}),
    )


def pydantic_ai() -> Framework:
    from pydantic import BaseModel
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Answer(BaseModel):
        number: int

    def agent(address: str, **more: Any) -> Any:
        provider = OpenAIProvider(base_url=f"{address}/v1", api_key="x")
        return Agent(OpenAIChatModel(MODEL, provider=provider), model_settings=SETTINGS, **more)

    def clock() -> str:
        return "noon"

    async def streamed(address: str) -> tuple[str, int | None]:
        async with agent(address).run_stream("hello") as run:
            text = "".join([piece async for piece in run.stream_text(delta=True)])
            usage = run.usage() if callable(run.usage) else run.usage
            return text, usage.input_tokens

    return Framework(
        lambda address: agent(address).run_sync("hello").output,
        lambda address: asyncio.run(streamed(address)),
        lambda address: agent(address, tools=[clock]).run_sync("hello"),
        lambda address: agent(address, output_type=Answer).run_sync("hello"),
    )


def instructor() -> Framework:
    import instructor
    from openai import OpenAI
    from pydantic import BaseModel

    class Answer(BaseModel):
        number: int

    def ask(address: str, **more: Any) -> Any:
        client = instructor.from_openai(
            OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
        )
        asked = {"model": MODEL, "messages": MESSAGES, "max_retries": 0, **SETTINGS}
        return client.chat.completions.create(**{"response_model": None, **asked, **more})

    def stream(address: str) -> tuple[str, int | None]:
        chunks = list(ask(address, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        return text, chunks[-1].usage and chunks[-1].usage.prompt_tokens

    return Framework(
        lambda address: ask(address).choices[0].message.content,
        stream,
        lambda address: ask(address, tools=[TOOL]),
        lambda address: ask(address, response_model=Answer),
    )


def llm() -> Framework:
    """Models of another server are named in a file of the user's."""
    folder = Path(tempfile.mkdtemp())
    os.environ["LLM_USER_PATH"] = str(folder)
    import llm

    def ask(address: str, *, stream: bool = False, **more: Any) -> Any:
        entry = {"model_id": "tiny", "model_name": MODEL, "api_base": f"{address}/v1"}
        entry |= {"supports_tools": True, "supports_schema": True}
        # JSON is YAML.
        (folder / "extra-openai-models.yaml").write_text(json.dumps([entry]))
        return llm.get_model("tiny").prompt("hello", stream=stream, key="x", **SETTINGS, **more)

    def clock() -> str:
        return "noon"

    def streamed(address: str) -> tuple[str, int | None]:
        answer = ask(address, stream=True)
        text = "".join(answer)
        return text, answer.usage().input

    schema = {"type": "object", "properties": {"number": {"type": "integer"}}}
    return Framework(
        lambda address: ask(address).text(),
        streamed,
        lambda address: ask(address, tools=[llm.Tool.function(clock)]).text(),
        lambda address: ask(address, schema=schema).text(),
    )


FRAMEWORKS: Mapping[str, Callable[[], Framework]] = {
    "openai-python": openai_python,
    "LangChain `ChatOpenAI`": langchain,
    "LiteLLM SDK": litellm,
    "pydantic-ai": pydantic_ai,
    "instructor": instructor,
    "llm": llm,
}


def outcome(ask: Callable[[str], object], address: str) -> str:
    """What the client makes of a request that the server refuses."""
    try:
        ask(address)
    except Exception as error:  # noqa: BLE001
        said, cause = "", error
        while cause is not None:
            said += f"{cause} {getattr(cause, 'body', '')} "
            cause = cause.__cause__ or cause.__context__
        if "is not supported here" in said:
            return "refused"
        return "raises" if "was blocked by" in said else f"fails: {said}"
    return "answered"


def words(framework: Framework, address: str, blocking: str) -> dict[str, str]:
    """By column of the table in docs/routes.md."""
    text = framework.chat(address)
    streamed, tokens = framework.stream(address)
    return {
        "chat": "works" if text else "empty",
        "stream": "works" if streamed == text else "differs",
        "usage of a stream": "kept" if tokens else "lost",
        "tools": outcome(framework.tools, address),
        "typed output": outcome(framework.typed, address),
        "blocked prompt": outcome(framework.chat, blocking),
    }


if __name__ == "__main__":
    _, name, *addresses = sys.argv
    try:
        framework = FRAMEWORKS[name]()
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    print(json.dumps(words(framework, *addresses)))
