"""vLLM's classification API: one probe, and a label for each text."""

import time
import uuid
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from openai.types import CompletionUsage
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from sidelight.errors import did_you_mean
from sidelight.models.conversation import Message
from sidelight.policy.request import RequestContext
from sidelight.policy.rules import Side
from sidelight.server.checks import as_answer, as_user, check, require_prompt_probe
from sidelight.server.errors import RequestError
from sidelight.server.requests import Route, ServerRequest
from sidelight.server.schemas import (
    MAX_ITEMS,
    ChatMessage,
    MessageList,
    Name,
    StrictBody,
    Texts,
    Unread,
)
from sidelight.types import NONE, Verdict

router = APIRouter(route_class=Route)


def _refuse_token_ids(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], int | list):
        raise PydanticCustomError("token_ids", "Send a text or a list of texts, not token ids")
    return value


class ClassifyRequest(StrictBody):
    """Texts, each as a user message, or one conversation."""

    unread: ClassVar[Unread] = {
        # Content goes through the chat template, which writes the special tokens.
        "add_generation_prompt": (True,),
        "add_special_tokens": (True,),
        "cache_salt": (),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
        "normalize": (),
        "padding": ("do_not_pad",),
        "priority": (0,),
        "request_id": None,
        "truncate_prompt_tokens": (),
        "truncation_side": (),
        "user": None,
    }
    unsupported: ClassVar[str] = (
        "Leave it out: a text is read whole, in the model's own chat template, and scores are "
        "calibrated probabilities."
    )

    model: Name | None = Field(
        None, description="A probe's name. The served model's name means its only prompt probe."
    )
    input: Annotated[Texts, BeforeValidator(_refuse_token_ids)] | None = Field(
        None, min_length=1, max_length=MAX_ITEMS
    )
    messages: MessageList[ChatMessage] | None = Field(None, min_length=1)
    use_activation: Literal[True] | None = Field(
        None, description="Scores are probabilities, never logits."
    )

    @model_validator(mode="after")
    def _require_one_content(self) -> "ClassifyRequest":
        if (self.input is None) == (self.messages is None):
            raise RequestError(
                "Send either 'input' (a text or a list of texts) or 'messages' (one conversation).",
                code="missing_parameter",
                param="input",
            )
        return self

    def conversations(self, side: Side) -> list[list[Message]]:
        """The conversations for a probe of this side; a plain text is on the side that the probe
        reads.
        """
        if self.messages is not None:
            return [[message.as_message() for message in self.messages]]
        return [as_user(text) if side == "input" else as_answer(text) for text in self.input or ()]


class Classification(BaseModel):
    """One text's label, and the probabilities of all labels in the order of ``/v1/models``.

    ``label`` is the decision at the server's threshold, not the most probable label: the
    highest-scoring label that holds. If none does, it is the negative label of a binary probe,
    the predicted class, or ``none`` for multi-label and span probes.
    """

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(BaseModel):
    """One classification per text, in order; ``model`` is the probe."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: CompletionUsage


@router.post("/classify", name="create")
@router.post("/v1/classify", name="create")
async def classify(body: ClassifyRequest, request: ServerRequest) -> ClassifyResponse:
    """Classify texts with the single probe that ``model`` names."""
    context = _of_one_probe(await request.begin(body.conversations("input")), body.model)
    (bound,) = context.chosen
    conversations = body.conversations(bound.side)
    checked = await check(
        request, context, conversations, decides_prompt=bound.side == "input" or bool(body.messages)
    )
    told = [each for _, decisions in checked for each in context.visible(decisions)]
    tokens = sum(event.tokens for event, _ in checked)
    return ClassifyResponse(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=bound.name,
        data=[classification_of(index, each.verdict) for index, each in enumerate(told)],
        usage=CompletionUsage(prompt_tokens=tokens, completion_tokens=0, total_tokens=tokens),
    )


def classification_of(index: int, verdict: Verdict | None) -> Classification:
    """A verdict in the format of vLLM's classification API."""
    assert verdict is not None, "check refuses a text without one"
    probabilities = verdict.probabilities
    label = max(verdict.labels, key=probabilities.__getitem__, default=NONE)
    probs = [*probabilities.values()]
    return Classification(index=index, label=label, probs=probs, num_classes=len(probs))


def _of_one_probe(context: RequestContext, name: str | None) -> RequestContext:
    """A copy that reports the probe selected by a request's ``model``.

    Raises:
        RequestError: It selects no probe, or is ambiguous.
    """
    named = [bound for bound in context.chosen if bound.name == name]
    if named:
        return replace(context, chosen=tuple(named))
    names = [bound.name for bound in context.chosen]
    if name not in (None, context.model):
        raise RequestError(
            f"Unknown probe '{name}'.{did_you_mean(name or '', [*names, context.model])}",
            status=404,
            code="model_not_found",
            param="model",
        )
    if not names:
        require_prompt_probe(context)
    of_prompts = tuple(bound for bound in context.chosen if bound.side == "input")
    if len(of_prompts) != 1:
        raise RequestError(
            f"Model '{context.model}' has {len(of_prompts)} probes that read prompts instead of "
            f"one. Name a probe in 'model': {', '.join(names)}.",
            code="probe_required",
            param="model",
        )
    return replace(context, chosen=of_prompts)
