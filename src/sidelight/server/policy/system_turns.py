"""Whether a request may begin with a turn that no probe reads."""

from collections.abc import Sequence

from sidelight.prompts import Conversation, PlainText
from sidelight.server.errors import RequestError
from sidelight.server.policy.rules import Policy

_ROLES = frozenset({"system", "developer"})


def require_read(texts: Sequence[Conversation], policy: Policy) -> None:
    """Checks that probes read each conversation from its first turn on, where the policy wants it.

    Args:
        texts: Of one request.
        policy: Of the server.

    Raises:
        RequestError: One begins with a system or developer turn, and the policy refuses these.
    """
    if not policy.refuses_system_turns:
        return
    for text in texts:
        if not isinstance(text, PlainText) and text and text[0].role in _ROLES:
            raise RequestError(
                f"The conversation begins with a {text[0].role} turn. Probes of chats do not read "
                "it, so the server's policy refuses it. Begin with a user's turn. If nobody but "
                'the operator writes such turns, the policy may say system_turns = "trust".',
                code="system_turn_refused",
            )
