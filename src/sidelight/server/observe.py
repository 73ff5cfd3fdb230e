"""Observation of a request: metrics, trace spans, audit lines and log lines.

Only names, numbers and hashes are recorded, never a text, a key, or client-chosen words.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import os
import time
import traceback
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from starlette.types import Message, Send

from sidelight.engines.base import Event, Finished, PromptClassified, ResponseScored, TextDelta
from sidelight.errors import SidelightError
from sidelight.models.conversation import Conversation, PlainText
from sidelight.policy.decisions import Decision
from sidelight.policy.request import visible_to
from sidelight.policy.rules import LOGGED, BoundRule
from sidelight.server.config import ServerConfig
from sidelight.server.errors import RequestError
from sidelight.server.metrics import Metrics, scores
from sidelight.types import Verdicts

try:
    from opentelemetry import trace as otel
except ImportError:
    otel = None

_log = logging.getLogger(__name__)
# OpenTelemetry's names for a verdict, whose conventions for generative AI are in development.
EVALUATION = {
    "event": "gen_ai.evaluation.result",
    "probe": "gen_ai.evaluation.name",
    "label": "gen_ai.evaluation.score.label",
    "score": "gen_ai.evaluation.score.value",
    "failure": "error.type",
}
_APPENDING = os.O_WRONLY | os.O_APPEND | os.O_CREAT


@dataclass
class RequestObserver:
    """Counts, audits and logs the events of one request.

    Attributes:
        metrics: Metrics of the server.
        audit: Audit log; None without one.
        request_id: As in the response header ``x-request-id``.
        key_id: Id of the API key; None if the request had none.
        decisions: Decisions so far.
        trace_events: Whether to add a span event for each disclosed verdict.
    """

    metrics: Metrics
    audit: "AuditLog | None" = None
    request_id: str = ""
    key_id: str | None = None
    decisions: list[Decision] = field(default_factory=list[Decision])
    trace_events: bool = False
    _traced: int = field(default=0, init=False)

    def of(self, request_id: str, *, key_id: str | None = None) -> "RequestObserver":
        """A copy for one request."""
        observer = RequestObserver(self.metrics, self.audit, request_id, key_id)
        observer.trace_events = self.trace_events
        return observer

    def annotate_span(self) -> None:
        """Set the verdicts as attributes of the current span, if OpenTelemetry records one.

        The attributes of a probe are lists with one entry per verdict, because a request may have
        several texts. Each event is added only once, even if this is called repeatedly.
        """
        span = None if otel is None else otel.get_current_span()
        if span is None or not span.is_recording():
            return
        span.set_attribute("sidelight.request_id", self.request_id)
        lists: dict[str, list[Any]] = defaultdict(list)
        for decision in self.decisions:
            name = f"sidelight.probe.{decision.rule.name}"
            lists[f"{name}.outcome"].append(decision.status)
            lists[f"{name}.action"].append(decision.action)
            if decision.verdict is not None:
                for label, score in scores(decision.rule.probe, decision.verdict).items():
                    lists[f"{name}.score.{label}"].append(score)
        span.set_attributes(lists)
        # Readers of traces may not be allowed to see what rules hide.
        new, self._traced = self.decisions[self._traced :], len(self.decisions)
        for each in visible_to(new, is_admin=False) if self.trace_events else ():
            attributes: dict[str, str | float] = {EVALUATION["probe"]: each.probe}
            if each.verdict is None:
                attributes[EVALUATION["failure"]] = "verdict_failed"
            else:
                attributes[EVALUATION["label"]] = each.verdict.label
                if each.has_scores:
                    score = each.verdict.probabilities[each.verdict.label]
                    attributes[EVALUATION["score"]] = score
            span.add_event(EVALUATION["event"], attributes)

    def annotating(self, send: Send) -> Send:
        """Annotate the span before the last message, with which instrumentation ends it."""

        async def send_annotated(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self.annotate_span()
            await send(message)

        return send_annotated

    def change(self, rules: Sequence[BoundRule]) -> None:
        """Audit which probes are served by which rules after a change.

        The change persists even if this fails.
        """
        line = {
            "change": "replace",
            "probes": {bound.name: bound.probe.version for bound in rules},
            "rules": {b.name: {"mode": b.mode, "thresholds": dict(b.thresholds)} for b in rules},
        }
        with suppress(RequestError):
            self.append([line])

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write lines to the audit log, if there is one.

        Raises:
            RequestError: The audit log cannot be written.
        """
        if self.audit is None:
            return
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        who = {"time": time, "request_id": self.request_id, "key_id": self.key_id}
        try:
            self.audit.write([{**who, **line} for line in lines])
        except RequestError as error:
            self.metrics.audit_failures.inc()
            _log.error("The audit log cannot be written (%s).", type(error.__cause__).__name__)
            raise


class RequestTextObserver:
    """The ``policy.enforcement.TextObserver`` of one text, whose clock starts at its creation.

    If the audit log cannot be written, ``prompt``, ``check`` and ``end`` raise ``RequestError`` if
    one of their rules fails closed; otherwise the failure is only logged and counted. A text that
    is only classified has a ``check`` and no other event.

    Args:
        request: Observer of the request.
        text: The classified text; the audit log gets its hash.
        is_prompt_known: Whether the decisions on its prompt have already been recorded with another
            text.
    """

    def __init__(
        self, request: RequestObserver, text: Conversation, *, is_prompt_known: bool = False
    ):
        self._request, self._metrics = request, request.metrics
        self._text = text
        self._is_prompt_known = is_prompt_known
        self._start = self._last = time.perf_counter()
        self._next_text_histogram = self._metrics.time_to_first_text
        self._tokens = 0
        self._classification_s: float | None = None
        self._has_ended = False

    def prompt(self, event: PromptClassified, decisions: Sequence[Decision]) -> None:
        self.check(event, decisions)
        self._metrics.time_to_verdict.observe(time.perf_counter() - self._start)

    def check(self, event: PromptClassified, decisions: Sequence[Decision]) -> None:
        """As ``prompt``, for a text that is only classified."""
        self._metrics.prompt_tokens.inc(event.tokens)
        self._metrics.classification.labels("input").observe(event.classification_s)
        self._record(decisions)

    def shadow_opinions(self, decisions: Sequence[Decision], beside: Sequence[Decision]) -> None:
        self._record(decisions, beside)

    def read(self, event: Event) -> None:
        if isinstance(event, TextDelta | ResponseScored):
            self._tokens = max(self._tokens, event.tokens)
        elif isinstance(event, Finished):
            self._tokens = event.completion_tokens
        # A text that no probe reads has no classification time.
        if isinstance(event, ResponseScored | Finished) and event.verdicts != Verdicts():
            self._classification_s = event.classification_s

    def delta(self) -> None:
        now = time.perf_counter()
        self._next_text_histogram.observe(now - self._last)
        self._last = now
        self._next_text_histogram = self._metrics.inter_text_latency

    def end(self, decisions: Sequence[Decision], *, is_cancelled: bool = False) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        self._metrics.completion_tokens.inc(self._tokens)
        if self._classification_s is not None:
            self._metrics.classification.labels("output").observe(self._classification_s)
        if is_cancelled:
            # The response has ended, so it can no longer be refused.
            with suppress(RequestError):
                self._record(decisions)
        else:
            self._record(decisions)
            self._metrics.request_latency.observe(time.perf_counter() - self._start)

    def _record(self, decisions: Sequence[Decision], beside: Sequence[Decision] = ()) -> None:
        new = [d for d in decisions if not self._is_prompt_known or d.rule.side == "output"]
        self._metrics.count(new, beside)
        self._request.decisions += new
        for decision in new:
            if decision.action in LOGGED:
                level = logging.WARNING if decision.verdict is None else logging.INFO
                message, rule = LOGGED[decision.action] + _cause(decision), decision.rule
                ids = {"request_id": self._request.request_id, "key_id": self._request.key_id}
                _log.log(level, message, rule.name, rule.side, extra=ids)
        if self._request.audit is None or not new:
            return
        text_hmac = self._request.audit.hash(self._text)
        lines = [
            {
                "text_hmac": text_hmac,
                "probe": d.rule.name,
                "version": d.rule.probe.version,
                "side": d.rule.side,
                "outcome": d.status,
                "labels": None if d.verdict is None else list(d.verdict.labels),
                "scores": None if d.verdict is None else d.verdict.probabilities,
                "thresholds": dict(d.rule.thresholds),
                "turn": None if d.verdict is None else d.verdict.turn,
                "action": d.action,
                **({"decided_by": d.decided_by} if d.rule.rule.defer else {}),
                **({"judge": d.second.to_json()} if d.second else {}),
            }
            for d in new
        ]
        try:
            self._request.append(lines)
        except RequestError:
            if any(d.rule.fails_closed for d in new):
                raise


def _cause(decision: Decision) -> str:
    """The judge and its failures, if they are why there is no verdict."""
    second = decision.second
    if decision.verdict is not None or second is None or not second.failures:
        return ""
    return f" Judge '{second.judge}': {', '.join(dict.fromkeys(second.failures))}."


class AuditLog(WatchedFileHandler):
    """Appends JSON lines to a file, and follows log rotation.

    A line is passed to the operating system before the request continues, but not synced to disk:
    it survives a crash of the process, but not of the machine.

    Args:
        path: The file.
        salt: Secret salt of the text hashes; equal texts have equal hashes under the same salt.

    Raises:
        SidelightError: It cannot be written.
    """

    def __init__(self, path: Path, *, salt: bytes):
        self._salt = salt
        try:
            super().__init__(path, encoding="utf-8")
        except OSError as error:
            raise SidelightError(
                f"Cannot write the audit log {path} ({error.strerror}). Name another file."
            ) from error

    def write(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append the lines.

        Raises:
            RequestError: The lines could not be written completely.
        """
        text = "\n".join(map(json.dumps, lines))
        try:
            self.handle(logging.makeLogRecord({"msg": text}))
        except OSError as error:
            raise RequestError(
                "The audit log cannot be written, and the policy refuses requests that cannot be "
                "audited. Ask the operator to check the disk.",
                status=500,
                code="audit_failed",
            ) from error

    def hash(self, text: Conversation) -> str:
        """HMAC-SHA256 of the conversation as compact JSON, ``[["user","Hello"]]``."""
        turns = (
            [["text", text.content]]
            if isinstance(text, PlainText)
            else [[message.role, message.content] for message in text]
        )
        words = json.dumps(turns, ensure_ascii=False, separators=(",", ":"))
        return hmac.new(self._salt, words.encode(), hashlib.sha256).hexdigest()

    def close(self) -> None:
        """Close the file; requests whose lines were not written have already been refused."""
        with suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Called by ``emit`` while its exception is handled; logging would only print it."""
        raise

    def _open(self) -> Any:
        return open(os.open(self.baseFilename, _APPENDING, 0o600), "a", encoding="utf-8")


def audit_of(config: ServerConfig) -> AuditLog | None:
    """The audit log of a server's configuration; None without one.

    Raises:
        SidelightError: It cannot be written.
    """
    if config.audit_log is None:
        return None
    return AuditLog(config.audit_log, salt=config.salt)


# Extra fields of the server's own records.
_FIELDS = ("request_id", "key_id", "method", "route", "status", "seconds")


class LogFormatter(logging.Formatter):
    """One line: time in UTC, level, logger, message, and the ids of the request and its key.

    Only the location of an exception is logged, because its message may quote a prompt.

    Args:
        as_json: Whether to write a JSON object, which has all fields of the record.
    """

    def __init__(self, *, as_json: bool):
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """Format the record; the location of an exception follows the line, or is a field."""
        message, places = record.getMessage(), ""
        if record.name == "asyncio":
            # The bracket contains a callback's arguments; the following lines are a task with its
            # exception.
            message = message.split("\n")[0].split("(")[0]
        if record.exc_info and (error := record.exc_info[1]) is not None:
            trace = "".join(traceback.format_tb(error.__traceback__))
            places = f"{type(error).__name__} at\n{trace}"
        fields = {name: record.__dict__[name] for name in _FIELDS if name in record.__dict__}
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
            **fields,
        }
        if self._as_json:
            return json.dumps(line | ({"exception": places} if places else {}))
        ids = " ".join(filter(None, (fields.get("request_id"), fields.get("key_id"))))
        text = f"{line['time']} {record.levelname} {record.name}: {message}"
        text += f" [{ids}]" if ids else ""
        return f"{text}\n{places}" if places else text


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Drop the traceback of a request that uvicorn cancelled during shutdown."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def log_settings(level: str, *, as_json: bool) -> dict[str, Any]:
    """Settings for ``logging.config`` that send every record of the process to standard error.

    Args:
        level: Level of the server's own loggers; others log only warnings and errors. At ``info``,
            uvicorn's startup and shutdown lines are left out in favour of the server's own.
        as_json: Write one JSON object per line instead of text.
    """
    handler = {
        "class": "logging.StreamHandler",
        "stream": "ext://sys.stderr",
        "formatter": "line",
    }
    settings = {"level": level.upper()}
    uvicorn = {"level": "WARNING"} if level == "info" else settings
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"not cancelled": {"()": lambda: _is_no_cancellation}},
        "formatters": {"line": {"()": LogFormatter, "as_json": as_json}},
        "handlers": {"stderr": handler},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {
            "uvicorn": uvicorn,
            "uvicorn.error": {"filters": ["not cancelled"]},
            "sidelight": settings,
        },
    }
