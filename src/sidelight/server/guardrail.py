"""LiteLLM's generic guardrail API, which decides how its proxy forwards texts."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sidelight.errors import DisguisedTextError, SidelightError
from sidelight.models.conversation import Message
from sidelight.models.invisible import Invisible, reject_disguises, visible
from sidelight.policy.decisions import Decision, PolicyError
from sidelight.policy.enforcement import require_trusted_turns
from sidelight.policy.redaction import redacted
from sidelight.policy.request import RequestContext
from sidelight.policy.rules import Side
from sidelight.server.checks import as_answer, as_user, check, require_prompt_probe, spans_of
from sidelight.server.errors import RequestError
from sidelight.server.requests import Route, ServerRequest
from sidelight.server.schemas import (
    Extension,
    IfAny,
    Many,
    MessageList,
    ProbeNames,
    StrictBody,
    ToolCall,
)

Role = Literal["system", "user", "assistant", "tool"]
_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
# The possible roles of a text, most trusted first.
_TRUST: Sequence[Role] = ("system", "assistant", "user", "tool")

router = APIRouter(route_class=Route)


class GuardrailParameters(StrictBody):
    """The parameters that a proxy's configuration passes to this guardrail."""

    probes: ProbeNames = None


class GuardrailRequest(StrictBody):
    """Texts and tool calls of a request or of its response.

    Images cannot be classified, so they are refused. Other fields are ignored. LiteLLM sends the
    messages of a request, but never those before a response.
    """

    model_config = ConfigDict(extra="ignore")

    input_type: Literal["request", "response"]
    texts: Many[str] = None
    tool_calls: Many[ToolCall] = None
    images: list[Any] | None = Field(
        None, max_length=0, description="Must be empty: probes read text only."
    )
    structured_messages: MessageList[dict[str, Any]] | None = Field(
        None, description="Messages that contain the `texts`, with their roles."
    )
    additional_provider_specific_params: GuardrailParameters | None = None

    @model_validator(mode="after")
    def _require_content(self) -> "GuardrailRequest":
        # If a proxy sent texts in another field, all of them would pass.
        if self.texts is None and self.tool_calls is None:
            raise RequestError(
                "Got neither 'texts' nor 'tool_calls', so there is nothing to classify. Send "
                "'texts'.",
                code="missing_parameter",
                param="texts",
            )
        return self

    def roles(self) -> dict[str, Role]:
        """The role of each text in the messages, or the least trusted of several.

        Only leading system turns are ``system``. As in a chat, a later one counts as the user's.
        """
        roles: dict[str, Role] = {}
        is_leading = True
        for message in self.structured_messages or ():
            role: Role = _ROLES.get(str(message.get("role")), "user")
            is_leading = is_leading and role == "system"
            if role == "system" and not is_leading:
                role = "user"
            for text in _texts_of(message):
                known = roles.get(text, role)
                roles[text] = role if _TRUST.index(role) > _TRUST.index(known) else known
        return roles


def _texts_of(message: Mapping[str, Any]) -> list[str]:
    """The texts of a message's content, part by part."""
    content = message.get("content")
    blocks = content if isinstance(content, list) else [{"text": content}]
    texts = [block.get("text") for block in blocks if isinstance(block, dict)]
    return [text for text in texts if isinstance(text, str)]


class GuardrailResponse(BaseModel):
    """``BLOCKED`` if a probe flags a text, else ``NONE``.

    ``GUARDRAIL_INTERVENED`` means that a rule redacts, and ``texts`` must be forwarded instead. For
    a text that is still being generated, the proxy must hold back ``stream_holdback_chars``.
    """

    action: Literal["BLOCKED", "GUARDRAIL_INTERVENED", "NONE"]
    blocked_reason: str | None
    texts: IfAny[list[str]] = None
    stream_holdback_chars: IfAny[list[int]] = None
    sidelight: Extension


@router.post("/beta/litellm_basic_guardrail_api", name="create")
async def guard(body: GuardrailRequest, request: ServerRequest) -> GuardrailResponse:
    """Classify each text of a request separately, by its role, and each text of a response.

    The result has ``texts`` only if a rule redacts or invisible characters were stripped; otherwise
    a proxy keeps its own.
    """
    parameters = body.additional_provider_specific_params or GuardrailParameters()
    is_response = body.input_type == "response"
    texts = _texts(body)
    system = [text for text in texts if text.role == "system"]
    checked_texts = [text for text in texts if text.role != "system"]
    context = await request.begin([text.conversation for text in checked_texts], parameters.probes)
    try:
        require_trusted_turns(context.policy, [[Message("system", text.words)] for text in system])
    except PolicyError as refusal:
        return _blocked(refusal)
    # A proxy may pass on parameters from its own client.
    context = context.with_enforced()
    side: Side = "output" if is_response else "input"
    context = replace(context, chosen=tuple(b for b in context.chosen if b.side == side))
    has_shadow = any(bound.is_shadow for bound in context.on(side))
    is_observed = parameters.probes is None and has_shadow
    if not context.chosen and not is_observed:
        _refuse(context, side)
    redacts = any(bound.mode == "redact" for bound in context.chosen)
    if redacts:
        # Trusted texts pass, but the words that rules redact are still replaced.
        checked_texts += system
    invisible = context.policy.invisible_characters
    try:
        checked = await check(
            request,
            context,
            [text.conversation for text in checked_texts],
            decides_prompt=not is_response,
            counts_shadows=is_observed,
            tools={i for i, text in enumerate(checked_texts) if text.role in (None, "tool")},
            trusted={i for i, text in enumerate(checked_texts) if text.role == "system"},
        )
        await asyncio.to_thread(_reject_disguises, body, texts, invisible)
    except DisguisedTextError as refusal:
        return _blocked(refusal)
    decisions = [decisions for _, decisions in checked]
    flagged, masked = _flagged(decisions), body.texts or []
    if redacts:
        masked, in_calls = _mask(body, checked_texts, decisions)
        flagged = [*dict.fromkeys((*in_calls, *flagged))]
    if invisible == "strip":
        # The model behind the proxy must get the text that was classified.
        masked = await asyncio.to_thread(lambda: [*map(visible, masked)])
    is_masked = not flagged and masked != (body.texts or [])
    return GuardrailResponse(
        action="BLOCKED" if flagged else "GUARDRAIL_INTERVENED" if is_masked else "NONE",
        blocked_reason=f"Flagged by {', '.join(flagged)}." if flagged else None,
        texts=masked if is_masked else None,
        # The next words may change the labels of the last ones, so a proxy sends a text once it is
        # complete.
        stream_holdback_chars=[*map(len, masked)] if is_response and redacts else None,
        sidelight=Extension(
            verdicts=[entry for _, decisions in checked for entry in context.entries(decisions)]
        ),
    )


def _blocked(refusal: SidelightError) -> GuardrailResponse:
    """A blocked response with the reason, which LiteLLM would drop from an error."""
    return GuardrailResponse(
        action="BLOCKED", blocked_reason=str(refusal), sidelight=Extension(verdicts=[])
    )


def _reject_disguises(
    body: GuardrailRequest, texts: Sequence["_Text"], invisible: Invisible
) -> None:
    """Check all texts, including system turns that no probe reads, and tool calls.

    Raises:
        DisguisedTextError: The policy refuses a text, or strips characters that a tool call
            contains, which LiteLLM's protocol cannot return.
    """
    for text in texts:
        reject_disguises(text.words, invisible, can_strip=text.index < len(body.texts or ()))


def _refuse(context: RequestContext, side: Side) -> None:
    """Refuse texts that no chosen probe can classify."""
    if side == "input":
        require_prompt_probe(context)
    raise RequestError(
        "No chosen probe reads responses, so this response cannot be classified. Load a probe "
        "that reads responses, or use this guardrail only in pre_call mode.",
        code="no_response_probe",
    )


@dataclass(frozen=True)
class _Text:
    """A text of a request or response, or a tool call.

    Attributes:
        index: Index among the texts, followed by the calls.
        words: The text; never empty.
        role: Role; None if unknown. ``system`` is a leading turn of the conversation.
        is_response: Whether it is part of the response.
    """

    index: int
    words: str
    role: Role | None
    is_response: bool

    @property
    def conversation(self) -> list[Message]:
        """The text as a single message, because many templates support neither tools nor arbitrary
        turn orders.
        """
        if self.is_response:
            return as_answer(self.words)
        return as_user(self.words)


def _texts(body: GuardrailRequest) -> list[_Text]:
    """The non-empty texts, then the non-empty calls."""
    is_response = body.input_type == "response"
    roles = {} if is_response else body.roles()
    words_and_roles: list[tuple[str, Role | None]] = [
        (words, roles.get(words)) for words in body.texts or ()
    ]
    for call in body.tool_calls or ():
        words = "\n".join(filter(None, (call.function.name, call.function.arguments)))
        words_and_roles.append((words, "assistant"))
    return [
        _Text(index, words, role, is_response)
        for index, (words, role) in enumerate(words_and_roles)
        if words
    ]


def _flagged(decisions: Iterable[Sequence[Decision]]) -> list[str]:
    """The probes that flag a text and whose rule does not redact."""
    flagged = (
        d.rule.name
        for text_decisions in decisions
        for d in text_decisions
        if d.rule.mode != "redact" and d.verdict is not None and d.verdict.flagged
    )
    return [*dict.fromkeys(flagged)]


def _mask(
    body: GuardrailRequest, texts: Sequence[_Text], decisions: Sequence[Sequence[Decision]]
) -> tuple[list[str], list[str]]:
    """Redact the texts; also return the probes that would redact a call.

    Args:
        body: The request.
        texts: The classified texts.
        decisions: Decisions on each of these.
    """
    masked, in_calls = [*(body.texts or ())], list[str]()
    for text, text_decisions in zip(texts, decisions, strict=True):
        redacting = [d for d in text_decisions if d.rule.mode == "redact"]
        spans = spans_of(redacting)
        if text.index < len(masked):
            masked[text.index] = redacted(text.words, spans)
        else:
            # The protocol cannot forward a modified call.
            in_calls += [d.rule.name for d in redacting if d.action == "redact"]
    return masked, in_calls
