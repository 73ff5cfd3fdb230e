"""``POST /v1/chat/completions``: text and every probe's verdict from one forward pass."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types.chat import ChatCompletion

from sidelight.engines.base import PromptJudged
from sidelight.server.body import JsonRoute
from sidelight.server.completions import Envelope, collect, completion
from sidelight.server.context import InContext
from sidelight.server.disconnect import unless_left
from sidelight.server.openapi import EVENTS
from sidelight.server.report import Extension
from sidelight.server.schemas import ChatRequest
from sidelight.server.streaming import Chunks

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
    context.require_model(body.model)
    await context.require_size([body.conversation()], max_tokens=body.sampling().max_tokens)
    asked = context.asked(body.probes, body.wishes())
    envelope = Envelope.new(body.model)
    events = context.generate(body.conversation(), body.sampling(), asked)
    judged = await unless_left(request, anext(events))
    assert isinstance(judged, PromptJudged)
    prompt = asked.reporter.side(judged)
    if body.stream:
        chunks = Chunks(envelope, asked.reporter, prompt, body.includes_usage)
        return StreamingResponse(
            chunks.stream(events),
            media_type="text/event-stream",
            headers={**asked.headers(judged), "Cache-Control": "no-cache"},
        )
    written = await unless_left(request, collect(events))
    return JSONResponse(
        completion(envelope, asked.reporter, prompt, written),
        headers=asked.headers(judged, written.finished),
    )
