"""Whether every client got its own verdicts, each once. Knows what each ticket has to give."""

from collections.abc import Mapping, Sequence

from sidelight.bench.load.clients import Answer
from sidelight.bench.load.preparing import PROMPT_PROBES, RESPONSE_PROBES

_PROBES = (*PROMPT_PROBES, *RESPONSE_PROBES)
_BLOCKED = "content_filter"


def faults(answers: Sequence[Answer]) -> Mapping[str, int]:
    """How many answers have each fault; a sound run has none.

    Args:
        answers: Of the server with probes and blocking policies.
    """
    written = [answer for answer in answers if answer.id is not None]
    return {
        "failed requests": sum(_is_failed(answer) for answer in answers),
        "lost verdicts": sum(_count(answer, 0) for answer in written),
        "duplicated verdicts": sum(_count(answer, 2) for answer in written),
        "answers that share an id": len(written) - len({answer.id for answer in written}),
        "verdicts of another request": sum(_is_swapped(answer) for answer in written),
        "header unlike the answer": sum(_is_contradicted(answer) for answer in written),
        "abuse that was answered": sum(answer.ticket.is_abuse for answer in written),
        "others that were blocked": sum(
            answer.ending == _BLOCKED and not answer.ticket.is_abuse
            for answer in answers
            if answer.id is None
        ),
    }


def _is_failed(answer: Answer) -> bool:
    return answer.id is None and answer.ending != _BLOCKED


def _count(answer: Answer, times: int) -> int:
    """How many probes have no verdict (0), or two or more (2)."""
    names = [verdict["probe"] for verdict in answer.verdicts if "error" not in verdict]
    counts = [names.count(probe) for probe in _PROBES]
    return sum(count == 0 if times == 0 else count >= times for count in counts)


def _is_swapped(answer: Answer) -> bool:
    said = [v for v in (*answer.verdicts, *answer.in_header) if v["probe"] == "word"]
    return any(verdict.get("label", answer.ticket.word) != answer.ticket.word for verdict in said)


def _is_contradicted(answer: Answer) -> bool:
    own = {verdict["probe"]: verdict.get("label") for verdict in answer.verdicts}
    return any(own.get(v["probe"]) != v.get("label") for v in answer.in_header)
