"""An answer with text, plain or streamed: what chat and text completions share.

``POST /v1/chat/completions``: text and every probe's verdict from one forward pass.

``POST /v1/completions``: goes on with plain texts, which are judged in the same pass.
"""

from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from openai.types import Completion
from openai.types.chat import ChatCompletion

from sidelight.prompts import Conversation
from sidelight.server.choices import begin
from sidelight.server.context import Context, InContext
from sidelight.server.enforcement import require_read
from sidelight.server.formats import (
    ChatForm,
    Chunks,
    Envelope,
    EventStream,
    Form,
    TextForm,
    completion,
)
from sidelight.server.middleware import unless_left
from sidelight.server.report import Extension
from sidelight.server.schemas import (
    EVENTS,
    ChatRequest,
    CompletionRequest,
    JsonRoute,
    WritingRequest,
)


async def answer(
    body: WritingRequest,
    request: Request,
    context: Context,
    prompts: Sequence[Conversation],
    form: Form,
) -> Response:
    """The texts, plain or streamed; either begins once all prompts have been judged."""
    context.require_model(body.model)
    require_read(prompts, context.registry.policy)
    sampling, n = body.sampling(), body.n or 1
    await context.require_size(prompts, n=n, max_tokens=sampling.max_tokens)
    await unless_left(request, context.engine.settled())
    asked = context.asked(body.probes, body.overrides())
    envelope = Envelope.new(body.model, form)
    choices = await begin(request, context, asked, prompts, sampling, n=n)
    if body.stream:
        chunks = Chunks(envelope, asked.reporter, choices, body.includes_usage)
        return EventStream(chunks.stream(), asked.headers(choices.judged))
    written = await unless_left(request, choices.collect())
    return JSONResponse(
        completion(envelope, asked.reporter, choices.judged, written),
        headers=asked.headers(choices.judged, [each.finished for each in written]),
    )


chat_completions_router = APIRouter(route_class=JsonRoute)


class ChatAnswer(ChatCompletion):
    """OpenAI's chat completion, with every verdict in a field of its own."""

    sidelight: Extension


@chat_completions_router.post(
    "/v1/chat/completions",
    response_class=Response,
    responses={200: {"model": ChatAnswer, "content": EVENTS}},
)
async def chat_completions_create(
    body: ChatRequest, request: Request, context: InContext
) -> Response:
    """The text, plain or streamed; either begins once the prompt has been judged."""
    form = ChatForm(has_logprobs=body.likeliest is not None)
    return await answer(body, request, context, [body.conversation()], form)


completions_router = APIRouter(route_class=JsonRoute)


class CompletionAnswer(Completion):
    """OpenAI's completion, with every verdict in a field of its own."""

    sidelight: Extension


@completions_router.post(
    "/v1/completions",
    response_class=Response,
    responses={200: {"model": CompletionAnswer, "content": EVENTS}},
)
async def completions_create(
    body: CompletionRequest, request: Request, context: InContext
) -> Response:
    """The texts, plain or streamed; no chat template is written around the prompts."""
    form = TextForm(has_logprobs=body.likeliest is not None)
    return await answer(body, request, context, body.texts(), form)
