"""Notes what was decided and changed: as counts, in the log and in the audit log, without text."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from sidelight.engines.base import LoadedProbe
from sidelight.prompts import Conversation
from sidelight.server.audit import NOBODY, AuditLog, Note, now
from sidelight.server.errors import RequestError
from sidelight.server.metrics import Metrics
from sidelight.server.policy import Decision
from sidelight.server.tracing import Trace

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recorder:
    """Takes the decisions of one request.

    Attributes:
        metrics: Where they are counted.
        audit: Where they are written; None: nowhere.
        note: Whose request it is.
        text: The conversation or text that was judged; the audit log gets its hash.
        trace: Takes them too.
        is_output_only: Whether what is decided on the prompt has been recorded already.
    """

    metrics: Metrics
    audit: AuditLog | None = None
    note: Note = NOBODY
    text: Conversation = ()
    trace: Trace = field(default_factory=Trace)
    is_output_only: bool = False

    def __call__(self, decisions: Sequence[Decision]) -> None:
        """Counts and audits all; logs what was blocked, and what could not be judged.

        Raises:
            RequestError: The audit log cannot be written, and a rule of these blocks what cannot be
                judged. Without such a rule the failure is logged and counted, and that is all.
        """
        taken = [d for d in decisions if not self.is_output_only or d.clause.side == "output"]
        self.metrics.count(taken)
        self.trace.add(taken)
        for decision in taken:
            _log_one(decision)
        if self.audit is not None and taken:
            self._audit(self.audit, taken)

    def about(self, text: Conversation) -> "Recorder":
        """The same for this text."""
        return replace(self, text=text)

    def output_only(self) -> "Recorder":
        """The same for one more text of a prompt."""
        return replace(self, is_output_only=True)

    def note_change(self, change: str, probe: LoadedProbe) -> None:
        """Audits what an operator has done to a probe; it stands even where that fails."""
        if self.audit is not None:
            told = {"change": change, "probe": probe.name, "version": probe.version}
            with suppress(RequestError):
                self._write(self.audit, [{**self._who(), **told}])

    def _audit(self, audit: AuditLog, decisions: Sequence[Decision]) -> None:
        text_hmac = audit.hash(self.text)
        try:
            self._write(audit, [self._line(text_hmac, decision) for decision in decisions])
        except RequestError:
            if any(d.clause.is_blocking and d.clause.rule.on_failure == "block" for d in decisions):
                raise

    def _write(self, audit: AuditLog, lines: Sequence[dict[str, Any]]) -> None:
        try:
            audit.write(lines)
        except RequestError as error:
            self.metrics.audit_failures.inc()
            _log.error("The audit log cannot be written (%s).", type(error.__cause__).__name__)
            raise

    def _who(self) -> dict[str, Any]:
        return {
            "time": now(),
            "request_id": self.note.request_id,
            "key_id": self.note.key_id,
        }

    def _line(self, text_hmac: str, decision: Decision) -> dict[str, Any]:
        probe, verdict = decision.clause.probe, decision.verdict
        return {
            **self._who(),
            "text_hmac": text_hmac,
            "probe": probe.name,
            "version": probe.version,
            "side": decision.clause.side,
            "outcome": decision.outcome,
            "labels": None if verdict is None else list(verdict.labels),
            "scores": None if verdict is None else verdict.probabilities,
            "action": decision.action,
        }


def _log_one(decision: Decision) -> None:
    clause = decision.clause
    match decision.action:
        case "block":
            _log.info("Blocked the %s by probe '%s'.", clause.side, clause.name)
        case "fail_closed":
            _log.warning("Probe '%s' gave no verdict on the %s: blocked.", clause.name, clause.side)
        case "fail_open":
            _log.warning(
                "Probe '%s' gave no verdict on the %s: passed, as its rule says.",
                clause.name,
                clause.side,
            )
        case "none" | "flag" | "route" | "shadow":
            pass
