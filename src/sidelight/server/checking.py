"""Verdicts on texts with nothing written: what the check-only endpoints share."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from sidelight.engines.events import PromptJudged
from sidelight.prompts import Message
from sidelight.server.context import Context
from sidelight.server.disconnect import unless_left
from sidelight.server.errors import RequestError
from sidelight.server.policy import Clause
from sidelight.server.policy.rules import Side
from sidelight.server.report import Reporter
from sidelight.types import Verdict

Turns = Sequence[Message]


@dataclass(frozen=True)
class Checked:
    """One text's verdicts, and how many tokens were read for them."""

    verdicts: tuple[Verdict, ...]
    tokens: int


async def checked(
    request: Request,
    context: Context,
    reporter: Reporter,
    conversations: Sequence[Turns],
    *,
    is_prompt_known: bool = True,
) -> list[Checked]:
    """What the chosen probes say of each conversation, from one pass each.

    A conversation that ends with the assistant's turn is judged by every chosen probe, any other by
    those that read the prompt alone.

    Args:
        request: Ends the work when its client leaves.
        context: The server's parts.
        reporter: On the chosen probes.
        conversations: What is judged.
        is_prompt_known: Whether the turns before the assistant's were said. Where they are filled
            in, no verdict on them counts.

    Raises:
        VerdictError: A chosen probe gave no verdict.
        RequestError: No chosen probe can judge one of them; an empty answer would look harmless. Or
            one is longer than the policy lets a chosen probe judge.
    """
    for turns in conversations:
        if not is_answered(turns):
            context.require_prompt_probe(reporter.probes)
    await context.require_size(conversations, max_tokens=0)
    await unless_left(request, context.engine.settled())
    asked = context.asked(None)
    judged = await unless_left(request, context.engine.judge(conversations))
    found: list[Checked] = []
    for index, (event, turns) in enumerate(zip(judged, conversations, strict=True)):
        context.metrics.note_judging(event)
        context.trace.prompt_tokens += event.tokens
        context.metrics.prompt_tokens.inc(event.tokens)
        prompt: set[Side] = {"input"} if is_prompt_known else set()
        response: set[Side] = {"output"} if is_answered(turns) else set()
        decided = asked.about(turns).on_check(event, prompt | response)
        _require_short(decided, asked.enforcement.clauses, reporter, index)
        verdicts = reporter.required(decided, has_response=is_answered(turns))
        found.append(Checked(verdicts, event.tokens))
    return found


def _require_short(
    decided: PromptJudged, clauses: Sequence[Clause], reporter: Reporter, index: int
) -> None:
    chosen = {probe.name for probe in reporter.probes} & set(decided.too_long)
    for clause in clauses:
        if clause.name in chosen:
            raise RequestError(
                f"Text {index} of those judged, counted from 0, has {decided.tokens} tokens, but "
                f"probe '{clause.name}' may judge at most {clause.rule.max_tokens}. Shorten it, or "
                "ask other probes.",
                code="verdict_failed",
            )


def as_user(text: str) -> list[Message]:
    """A bare text, as if a user had said it."""
    return [Message("user", text)]


def is_answered(turns: Turns) -> bool:
    """Whether the last turn is the assistant's and says something that can be judged."""
    return bool(turns) and turns[-1].role == "assistant" and bool(turns[-1].content)
