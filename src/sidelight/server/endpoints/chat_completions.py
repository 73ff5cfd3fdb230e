"""``POST /v1/chat/completions``: text and every probe's verdict from one forward pass."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from openai.types.chat import ChatCompletion

from sidelight.server.answering import answer
from sidelight.server.body import JsonRoute
from sidelight.server.context import InContext
from sidelight.server.forms import ChatForm
from sidelight.server.openapi import EVENTS
from sidelight.server.report import Extension
from sidelight.server.schemas import ChatRequest

router = APIRouter(route_class=JsonRoute)


class ChatAnswer(ChatCompletion):
    """OpenAI's chat completion, with every verdict in a field of its own."""

    sidelight: Extension


@router.post(
    "/v1/chat/completions",
    response_class=Response,
    responses={200: {"model": ChatAnswer, "content": EVENTS}},
)
async def create(body: ChatRequest, request: Request, context: InContext) -> Response:
    """The text, plain or streamed; either begins once the prompt has been judged."""
    form = ChatForm(has_logprobs=body.likeliest is not None)
    return await answer(body, request, context, [body.conversation()], form)
