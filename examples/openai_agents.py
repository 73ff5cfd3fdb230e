"""OpenAI Agents SDK: guardrails on what users write and on what tools bring.

    sidelight serve --probe guard:injection
    pip install openai-agents
    export MODEL_URL=https://api.openai.com/v1 MODEL_API_KEY=... MODEL=...
    python examples/openai_agents.py "What does notes.txt say?"

If Sidelight is down, the guardrails raise: the model is not asked, and reads no tool result.
"""

import os
import sys
from pathlib import Path

from agents import (
    Agent,
    GuardrailFunctionOutput,
    InputGuardrailTripwireTriggered,
    OpenAIChatCompletionsModel,
    Runner,
    ToolGuardrailFunctionOutput,
    function_tool,
    input_guardrail,
    set_tracing_disabled,
    tool_output_guardrail,
)
from openai import AsyncOpenAI, BadRequestError

# Traces would go to OpenAI, with the texts.
set_tracing_disabled(True)
sidelight = AsyncOpenAI(
    base_url=os.environ.get("SIDELIGHT_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("SIDELIGHT_API_KEY", "unused"),
)
model = AsyncOpenAI(base_url=os.environ["MODEL_URL"], api_key=os.environ["MODEL_API_KEY"])


async def is_flagged(*texts: str) -> bool:
    try:
        checked = await sidelight.moderations.create(input=[text for text in texts if text])
    except BadRequestError:
        # The policy refuses the text, or it is too long to be checked.
        return True
    return any(result.flagged for result in checked.results)


def user_texts(items) -> list[str]:
    """The texts of the user in the input of a run, which may be a whole conversation."""
    if isinstance(items, str):
        return [items]
    texts = []
    for item in items:
        content = item.get("content") if item.get("role") == "user" else []
        blocks = [{"text": content}] if isinstance(content, str) else content
        texts += [block["text"] for block in blocks if "text" in block]
    return texts


# By default the model would run beside this check, and its tools too.
@input_guardrail(run_in_parallel=False)
async def check_message(_context, _agent, items) -> GuardrailFunctionOutput:
    flagged = await is_flagged(*user_texts(items))
    return GuardrailFunctionOutput(output_info=None, tripwire_triggered=flagged)


@tool_output_guardrail
async def check_tool_result(data) -> ToolGuardrailFunctionOutput:
    if await is_flagged(str(data.output)):
        return ToolGuardrailFunctionOutput.reject_content("[This tool result was withheld.]")
    return ToolGuardrailFunctionOutput.allow()


# Each tool names its guardrail: an agent has none for all of its tools.
@function_tool(tool_output_guardrails=[check_tool_result])
def read_file(name: str) -> str:
    """Read a file of the working directory."""
    return Path(Path(name).name).read_text()


agent = Agent(
    name="assistant",
    model=OpenAIChatCompletionsModel(os.environ["MODEL"], model),
    tools=[read_file],
    input_guardrails=[check_message],
)
try:
    print(Runner.run_sync(agent, sys.argv[1]).final_output)
except InputGuardrailTripwireTriggered:
    print("Your message was blocked.")
