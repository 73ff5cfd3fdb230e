"""``POST /v1/completions``: goes on with plain texts, which are judged in the same pass."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from openai.types import Completion

from sidelight.server.answering import answer
from sidelight.server.body import JsonRoute
from sidelight.server.context import InContext
from sidelight.server.forms import TextForm
from sidelight.server.openapi import EVENTS
from sidelight.server.report import Extension
from sidelight.server.schemas import CompletionRequest

router = APIRouter(route_class=JsonRoute)


class CompletionAnswer(Completion):
    """OpenAI's completion, with every verdict in a field of its own."""

    sidelight: Extension


@router.post(
    "/v1/completions",
    response_class=Response,
    responses={200: {"model": CompletionAnswer, "content": EVENTS}},
)
async def create(body: CompletionRequest, request: Request, context: InContext) -> Response:
    """The texts, plain or streamed; no chat template is written around the prompts."""
    form = TextForm(has_logprobs=body.likeliest is not None)
    return await answer(body, request, context, body.texts(), form)
