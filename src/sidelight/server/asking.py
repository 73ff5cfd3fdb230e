"""Questions put to the probes about one text, which is read once."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from sidelight.prompts import Message
from sidelight.server.checking import checked, is_answered
from sidelight.server.context import Context
from sidelight.server.policy import require_read
from sidelight.server.questions import Findings


@dataclass(frozen=True)
class Found:
    """What was found, and what it cost.

    Attributes:
        findings: The verdicts, by the names that questions use.
        tokens: Tokens read; 0 where no question names a probe that can judge the text.
    """

    findings: Findings
    tokens: int


async def find(
    request: Request, context: Context, turns: Sequence[Message], names: Sequence[str | None]
) -> Found:
    """Judges the conversation by the probes that ``names`` mean; others are not reported.

    Raises:
        RequestError: The policy refuses how it begins.
    """
    require_read([turns], context.roster.policy)
    blank = Findings.of(context.probes, context.names, ())
    can_judge = {
        probe.name for probe in context.probes if probe.reads.side == "prompt" or is_answered(turns)
    }
    asked = [name for name in blank.asked(names) if name in can_judge]
    if not asked:
        return Found(blank, tokens=0)
    reporter = context.reporter(asked)
    (found,) = await checked(request, context, reporter, [turns])
    findings = Findings.of(context.probes, context.names, found.verdicts)
    return Found(findings, found.tokens)
