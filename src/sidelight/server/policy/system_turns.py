"""Whether a request may begin with a turn that no probe reads."""

from collections.abc import Sequence

from sidelight.prompts import Conversation, PlainText
from sidelight.server.errors import RequestError
from sidelight.server.policy.rules import SystemTurns

_ROLES = frozenset({"system", "developer"})


def require_read(texts: Sequence[Conversation], system_turns: SystemTurns) -> None:
    """Checks that probes read each conversation from its first turn on, where the policy wants it.

    Args:
        texts: Of one request.
        system_turns: What the policy says.

    Raises:
        RequestError: One begins with a system or developer turn, and the policy refuses these.
    """
    if system_turns == "trust":
        return
    for text in texts:
        if not isinstance(text, PlainText) and text and text[0].role in _ROLES:
            raise RequestError(
                f"The conversation begins with a {text[0].role} turn, which no probe reads, and "
                "the server's policy says system_turns = \"refuse\". Begin with a user's turn.",
                code="system_turn_refused",
            )
