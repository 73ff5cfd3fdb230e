"""What an operator decides about a server, whatever its engine and address."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sidelight.server.audit import AuditLog
from sidelight.server.keys import Access
from sidelight.server.limits import ServerLimits
from sidelight.server.policy import Policy
from sidelight.server.tracing import Sink


@dataclass(frozen=True)
class Service:
    """How requests are served.

    Attributes:
        policy: What follows from verdicts; by default nothing, they are told.
        sources: The folders that probes came from, by name: where they are reloaded from.
        access: Who may do what; by default everybody everything but administer.
        limits: How much a request may take.
        audit: Where decisions are written; None: nowhere.
        traces: Takes what there is to tell of each request; None: nobody.
    """

    policy: Policy = field(default_factory=Policy)
    sources: Mapping[str, Path] = field(default_factory=dict[str, Path])
    access: Access = field(default_factory=Access)
    limits: ServerLimits = field(default_factory=ServerLimits)
    audit: AuditLog | None = None
    traces: Sink | None = None
