"""An answer with text, plain or streamed: what chat and text completions share."""

from collections.abc import Sequence

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from sidelight.prompts import Conversation
from sidelight.server.choices import begin
from sidelight.server.completions import Envelope, completion
from sidelight.server.context import Context
from sidelight.server.disconnect import unless_left
from sidelight.server.forms import Form
from sidelight.server.policy import require_read
from sidelight.server.schemas import WritingRequest
from sidelight.server.streaming import Chunks, EventStream


async def answer(
    body: WritingRequest,
    request: Request,
    context: Context,
    prompts: Sequence[Conversation],
    form: Form,
) -> Response:
    """The texts, plain or streamed; either begins once all prompts have been judged."""
    context.require_model(body.model)
    require_read(prompts, context.roster.policy)
    sampling, n = body.sampling(), body.n or 1
    await context.require_size(prompts, n=n, max_tokens=sampling.max_tokens)
    await unless_left(request, context.engine.settled())
    asked = context.asked(body.probes, body.wishes())
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
