"""``POST /beta/litellm_basic_guardrail_api``: LiteLLM's generic guardrail, answered by probes."""

from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from sidelight.prompts import Message
from sidelight.server.body import JsonRoute
from sidelight.server.checking import as_user, checked
from sidelight.server.context import InContext
from sidelight.server.errors import RequestError
from sidelight.server.report import Extension, Reporter, verdict_json
from sidelight.server.schemas import Listed, ProbeNames, StrictBody

router = APIRouter(route_class=JsonRoute)


class GuardrailParameters(StrictBody):
    """What a proxy's configuration hands on to this guardrail."""

    probes: ProbeNames = None


class CalledFunction(StrictBody):
    """What a tool is called with."""

    name: str | None = None
    arguments: str


class ToolCall(StrictBody):
    """A function that the model calls; calls of another kind cannot be judged."""

    function: CalledFunction

    def as_text(self) -> str:
        """Name and arguments, as lines."""
        return "\n".join(part for part in (self.function.name, self.function.arguments) if part)


class GuardrailRequest(StrictBody):
    """Texts and tool calls of a request or of its response.

    Images cannot be judged, so they are refused. The tools on offer are not read.
    """

    input_type: Literal["request", "response"]
    texts: Listed[str] | None = None
    tool_calls: Listed[ToolCall] | None = None
    images: list[Any] | None = Field(None, max_length=0, description="Not read.")
    additional_provider_specific_params: GuardrailParameters | None = None

    def said(self) -> list[str]:
        """What is judged: the texts, then the calls. In an empty one there is nothing to judge."""
        calls = [call.as_text() for call in self.tool_calls or ()]
        return [text for text in (*(self.texts or ()), *calls) if text]


class GuardrailResponse(BaseModel):
    """``BLOCKED`` where a probe flags a text, else ``NONE``."""

    action: Literal["BLOCKED", "NONE"]
    blocked_reason: str | None
    sidelight: Extension


@router.post("/beta/litellm_basic_guardrail_api")
async def create(body: GuardrailRequest, request: Request, context: InContext) -> GuardrailResponse:
    """Those of a request are judged as user's messages, of a response as answers to no question.

    The answer has no ``texts``: a proxy keeps its own.
    """
    parameters = body.additional_provider_specific_params or GuardrailParameters()
    reporter = context.reporter(parameters.probes)
    is_response = body.input_type == "response"
    if is_response:
        reporter = _on_responses(reporter)
    conversations = [_answer(text) if is_response else as_user(text) for text in body.said()]
    judged = await checked(
        request, context, reporter, conversations, is_prompt_known=not is_response
    )
    verdicts = [verdict for one in judged for verdict in one.verdicts]
    flagged = list(dict.fromkeys(v.probe for v in verdicts if v.flagged))
    return GuardrailResponse(
        action="BLOCKED" if flagged else "NONE",
        blocked_reason=f"Flagged by {', '.join(flagged)}." if flagged else None,
        sidelight=Extension(verdicts=[verdict_json(verdict) for verdict in verdicts]),
    )


def _answer(text: str) -> list[Message]:
    return [*as_user(""), Message("assistant", text)]


def _on_responses(reporter: Reporter) -> Reporter:
    """On those of its probes that read a response."""
    if not reporter.reads_response:
        raise RequestError(
            "No chosen probe reads a response, so it cannot be judged. Load such a probe, or use "
            "this guardrail in mode pre_call only.",
            code="no_response_probe",
        )
    late = [probe for probe in reporter.probes if probe.reads.side != "prompt"]
    return replace(reporter, probes=late)
