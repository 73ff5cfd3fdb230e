"""LangChain: guard what users write and what tools bring, before an agent's model reads it.

    sidelight serve --probe guard:injection
    pip install langchain langchain-openai
    export MODEL_URL=https://api.openai.com/v1 MODEL_API_KEY=... MODEL=...
    python examples/langchain_agent.py "What does notes.txt say?"

LangChain's middleware for OpenAI's moderations asks Sidelight here. If Sidelight is down, it
raises, and the model is not called.
"""

import os
import sys
from pathlib import Path

from langchain.agents import create_agent
from langchain.tools import tool
from langchain_openai import ChatOpenAI
from langchain_openai.middleware import OpenAIModerationMiddleware
from openai import AsyncOpenAI, OpenAI

sidelight = {
    "base_url": os.environ.get("SIDELIGHT_URL", "http://127.0.0.1:8000") + "/v1",
    "api_key": os.environ.get("SIDELIGHT_API_KEY", "unused"),
}
# Without both clients, the middleware would send the texts to OpenAI.
clients = {"client": OpenAI(**sidelight), "async_client": AsyncOpenAI(**sidelight)}


class ToolGuard(OpenAIModerationMiddleware):
    """A second one, which LangChain tells from the first by the name of its class."""


# A flagged message ends the run. With check_output=True answers are checked too, once whole.
messages = OpenAIModerationMiddleware(**clients, check_output=False, exit_behavior="end")
# A flagged tool result is replaced, in the agent's state too, and the run goes on. This one alone
# guards tool results alone.
tool_results = ToolGuard(
    **clients,
    check_input=False,
    check_output=False,
    check_tool_results=True,
    exit_behavior="replace",
    violation_message="[This tool result was withheld: {categories}.]",
)


@tool
def read_file(name: str) -> str:
    """Read a file of the working directory."""
    return Path(Path(name).name).read_text()


agent = create_agent(
    ChatOpenAI(
        model=os.environ["MODEL"],
        base_url=os.environ["MODEL_URL"],
        api_key=os.environ["MODEL_API_KEY"],
    ),
    tools=[read_file],
    middleware=[messages, tool_results],
)
answer = agent.invoke({"messages": [{"role": "user", "content": sys.argv[1]}]})
print(answer["messages"][-1].text)
