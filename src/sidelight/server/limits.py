"""How much one client, and all of them together, may take of the server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerLimits:
    """Bounds of the HTTP layer; the engine has its own.

    Attributes:
        body_bytes: Of one request.
        batch_items: Texts of one request.
        request_tokens: Tokens of one request, all its texts and what it may write together; None:
            as many as the model's context, per text.
        concurrent: Requests being answered; further ones are a 429.
        connections: Open connections; further ones are closed at once.
        deadline_s: Seconds from the end of a request's head to the last byte of the answer.
        header_s: Seconds that a client may take to send a request's head.
        body_s: Seconds that it may take to send the body.
        write_s: Seconds that it may leave what is sent to it unread.
    """

    body_bytes: int = 4 * 2**20
    batch_items: int = 512
    request_tokens: int | None = None
    concurrent: int = 256
    connections: int = 4096
    deadline_s: float = 600.0
    header_s: float = 10.0
    body_s: float = 30.0
    write_s: float = 30.0
