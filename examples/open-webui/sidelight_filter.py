"""
title: Sidelight
description: Blocks or annotates messages and answers that Sidelight's probes flag.
version: 0.1.0
required_open_webui_version: 0.5.0
"""

# Admin Panel > Functions > New Function: paste this file, enable it and make it global. httpx is a
# dependency of Open WebUI. There is no `self.toggle`, with which a user could switch it off.

from typing import Any, Literal

import httpx
from pydantic import BaseModel, Field

UNAVAILABLE = "The safety check is unavailable. Try again later."


class Filter:
    class Valves(BaseModel):
        priority: int = Field(0, description="Filters run in ascending order.")
        url: str = Field("http://localhost:8000", description="Address of Sidelight.")
        api_key: str = Field("", json_schema_extra={"input": {"type": "password"}})
        probes: str = Field("", description="Names of probes, separated by commas; empty: all.")
        mode: Literal["block", "annotate"] = "block"
        check_answers: bool = Field(False, description="Also check answers, once they are whole.")
        on_error: Literal["block", "pass"] = Field(
            "block", description="What happens to a text that could not be checked."
        )
        timeout_s: float = Field(30.0, gt=0)

    def __init__(self):
        self.valves = self.Valves()

    async def inlet(self, body: dict[str, Any], __event_emitter__=None) -> dict[str, Any]:
        """Check what the user has written since the last answer, before the model reads it."""
        texts = [_text(message) for message in _new_messages(body["messages"])]
        flagged = await self._flagged(texts)
        if flagged is None and self.valves.on_error == "block":
            # The chat shows the message of an exception that an inlet raises; no model is called.
            raise Exception(UNAVAILABLE)
        if flagged and self.valves.mode == "block":
            raise Exception(f"Your message was blocked: {', '.join(flagged)}.")
        await _annotate(__event_emitter__, "Your message", flagged)
        return body

    async def outlet(self, body: dict[str, Any], __event_emitter__=None) -> dict[str, Any]:
        """Check the whole answer. It has streamed already: a blocked one is replaced."""
        answer = body["messages"][-1]
        if not self.valves.check_answers or answer.get("role") != "assistant":
            return body
        flagged = await self._flagged([_text(answer)])
        # Open WebUI ignores an exception of an outlet, so nothing is raised here.
        if flagged is None and self.valves.on_error == "block":
            answer["content"] = UNAVAILABLE
        elif flagged and self.valves.mode == "block":
            answer["content"] = f"The answer was withheld: {', '.join(flagged)}."
        else:
            await _annotate(__event_emitter__, "The answer", flagged)
        return body

    async def _flagged(self, texts: list[str]) -> list[str] | None:
        """The categories that are flagged in any of the texts; None if they were not checked."""
        body: dict[str, Any] = {"input": [text for text in texts if text.strip()]}
        if not body["input"]:
            return []
        if self.valves.probes.strip():
            body["probes"] = [name.strip() for name in self.valves.probes.split(",")]
        key = self.valves.api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"{self.valves.url.rstrip('/')}/v1/moderations"
        try:
            async with httpx.AsyncClient(timeout=self.valves.timeout_s) as client:
                response = await client.post(url, json=body, headers=headers)
            response.raise_for_status()
            results = response.json()["results"]
            return sorted(
                {name for each in results for name, is_on in each["categories"].items() if is_on}
            )
        except (httpx.HTTPError, ValueError, LookupError):
            return None


def _new_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of the user that follow the last answer; earlier ones were checked before."""
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    start = answers[-1] + 1 if answers else 0
    return [message for message in messages[start:] if message.get("role") == "user"]


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(block.get("text", "") for block in content if block.get("type") == "text")


async def _annotate(emit: Any, subject: str, flagged: list[str] | None) -> None:
    """Show a line above the answer, which is saved with it; none if nothing was flagged."""
    if emit is None or flagged == []:
        return
    finding = "was not checked" if flagged is None else f"was flagged: {', '.join(flagged)}"
    data = {"description": f"{subject} {finding}.", "done": True, "hidden": False}
    await emit({"type": "status", "data": data})
