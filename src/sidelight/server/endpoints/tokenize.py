"""``POST /tokenize``: a prompt or conversation as the model reads it, as vLLM words it."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator

from sidelight.prompts import Conversation, PlainText
from sidelight.server.body import JsonRoute
from sidelight.server.context import InContext
from sidelight.server.schemas import ChatMessage, Listed, Name, StrictBody

router = APIRouter(route_class=JsonRoute)


class TokenizeRequest(StrictBody):
    """Either ``prompt``, as ``/v1/completions`` reads it, or ``messages``, as a chat does."""

    model: Name | None = None
    prompt: str | None = None
    messages: Listed[ChatMessage] | None = Field(None, min_length=1)
    add_generation_prompt: Literal[True] = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _has_one_text(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    def conversation(self) -> Conversation:
        """What is to be tokenised."""
        if self.messages is None:
            return PlainText(self.prompt or "")
        return [message.as_message() for message in self.messages]


class TokenizeResponse(BaseModel):
    """Token ids, and their texts where they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


@router.post("/tokenize")
async def create(body: TokenizeRequest, context: InContext) -> TokenizeResponse:
    """Nothing is run through the model."""
    if body.model is not None:
        context.require_model(body.model)
    tokens = await context.engine.tokenize(body.conversation())
    return TokenizeResponse(
        count=len(tokens.ids),
        max_model_len=context.engine.max_tokens,
        tokens=list(tokens.ids),
        token_strs=list(tokens.texts) if body.return_token_strs else None,
    )
