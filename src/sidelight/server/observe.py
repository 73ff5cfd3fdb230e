"""What is told of each request to a tracing system. Knows none: ``otel.py`` does.

Numbers and the operator's own names only: never a text, a key, or a word that a client chose.

The audit log: who had which text judged, by which probe, and what followed; without the text.

Notes what was decided and changed: as counts, in the log and in the audit log, without text.

The server's logs: where and what, never a message that may quote a prompt, never a key.
"""

import hashlib
import hmac
import json
import logging
import os
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidelight.engines.base import Event, PromptJudged, written_by
from sidelight.errors import SidelightError
from sidelight.policy.decisions import Decision
from sidelight.probe import Probe
from sidelight.prompts import Conversation, PlainText
from sidelight.server.config import Caller
from sidelight.server.errors import RequestError
from sidelight.server.metrics import Metrics
from sidelight.server.middleware import route_of

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Asked every few seconds by machines.
_UNTRACED = frozenset({"/health", "/ready", "/metrics"})


@dataclass
class Trace:
    """One request, as it goes on.

    Attributes:
        start_ns: Unix time of its begin.
        traceparent: The caller's span, as W3C's header names it; None: none.
        method: ``_OTHER`` for one that HTTP does not define.
        route: The route's template.
        status: Of the answer; 500 where there was none.
        request_id: The server's.
        model: The served model; None where the request did not come to it.
        prompt_tokens: Of its texts, each once.
        completion_tokens: Written.
        decisions: What followed from each verdict.
    """

    start_ns: int = 0
    traceparent: str | None = None
    method: str = "_OTHER"
    route: str = ""
    status: int = 500
    request_id: str = ""
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    decisions: list[Decision] = field(default_factory=list[Decision])

    @classmethod
    def of(cls, request: Request) -> "Trace":
        """The request's; where nobody traces, one that nobody reads."""
        return getattr(request.state, "trace", None) or cls()

    def add(self, decisions: Sequence[Decision]) -> None:
        """Takes note of what was decided."""
        self.decisions += decisions

    async def followed(
        self, events: AsyncGenerator[Event, None], *, is_prompt_known: bool
    ) -> AsyncGenerator[Event, None]:
        """The same events of one text, with its tokens counted.

        Args:
            events: As the engine gives them.
            is_prompt_known: Whether another text has counted the prompt.
        """
        written = 0
        try:
            async with aclosing(events):
                async for event in events:
                    written = max(written, written_by(event))
                    if isinstance(event, PromptJudged) and not is_prompt_known:
                        self.prompt_tokens += event.tokens
                    yield event
        finally:
            self.completion_tokens += written


# Takes a request that is over.
Sink = Callable[[Trace], None]


class TraceRequests:
    """Follows each request to its end, and hands over what there is to tell of it.

    Args:
        app: What answers.
        sink: Takes it.
    """

    def __init__(self, app: ASGIApp, *, sink: Sink):
        self._app = app
        self._sink = sink

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if scope["type"] != "http" or scope["path"] in _UNTRACED:
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["trace"] = trace = Trace(
            start_ns=time.time_ns(),
            traceparent=Headers(scope=scope).get("traceparent"),
            method=scope["method"] if scope["method"] in _METHODS else "_OTHER",
            request_id=state.get("request_id", ""),
        )

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            trace.route = route_of(scope)
            self._sink(trace)


@dataclass(frozen=True)
class Note:
    """What the audit log says of a request.

    Attributes:
        request_id: As in the answer's ``x-request-id``.
        key_id: Of the key that was sent; None: nobody's.
    """

    request_id: str | None = None
    key_id: str | None = None

    @classmethod
    def of(cls, request: Request) -> "Note":
        """From what the middleware has put into the request's state."""
        caller: Caller = getattr(request.state, "caller", Caller())
        return cls(getattr(request.state, "request_id", None), caller.key_id)


class AuditLog:
    """Appends JSON lines to a file.

    A line is handed to the operating system before the request goes on, and not synced to the disk:
    it outlives the process, but not a crash of the machine. Where another file stands at the path,
    or none, as after a rotation, that one is written from then on.

    Args:
        path: The file.
        salt: Secret of the texts' hashes; the same text has the same hash under the same salt.

    Raises:
        SidelightError: It cannot be written.
    """

    def __init__(self, path: Path, *, salt: bytes):
        self._path = path
        self._salt = salt
        self._lock = threading.Lock()
        self._is_torn = False
        try:
            self._file = self._opened()
        except OSError as error:
            raise SidelightError(
                f"Cannot write the audit log {path} ({error.strerror}). Name another file."
            ) from error

    def write(self, lines: Sequence[dict[str, Any]]) -> None:
        """Appends the lines, all at once.

        Raises:
            RequestError: They could not be written, or not wholly.
        """
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        try:
            with self._lock:
                self._follow()
                # After half a line, the next one begins on a line of its own.
                data = b"\n" * self._is_torn + data
                written = os.write(self._file, data)
                self._is_torn = 0 < written < len(data) or (self._is_torn and not written)
        except OSError as error:
            raise _unwritten() from error
        if written < len(data):
            raise _unwritten()

    def hash(self, text: Conversation) -> str:
        """HMAC-SHA256 of the conversation as compact JSON, ``[["user","Hello"]]``."""
        turns = [["text", text.content]] if isinstance(text, PlainText) else _turns(text)
        words = json.dumps(turns, ensure_ascii=False, separators=(",", ":"))
        return hmac.new(self._salt, words.encode(), hashlib.sha256).hexdigest()

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _follow(self) -> None:
        """Opens the file that stands at the path now, if it is another one."""
        mine = os.fstat(self._file)
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            # Opened first: where that fails, the old file stays.
            new = self._opened()
            os.close(self._file)
            self._file = new


NOBODY = Note()


def now() -> str:
    """The time as a line has it: UTC, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _turns(text: Conversation) -> list[list[str]]:
    assert not isinstance(text, PlainText)
    return [[message.role, message.content] for message in text]


def _unwritten() -> RequestError:
    return RequestError(
        "The audit log cannot be written, and the policy answers nothing that is not audited. Ask "
        "the operator to look at the disk.",
        status=500,
        type="server_error",
        code="audit_failed",
    )


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
        taken = [d for d in decisions if not self.is_output_only or d.rule.side == "output"]
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

    def note_change(self, change: str, probe: Probe) -> None:
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
            if any(d.rule.fails_closed for d in decisions):
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
        probe, verdict = decision.rule.probe, decision.verdict
        return {
            **self._who(),
            "text_hmac": text_hmac,
            "probe": probe.name,
            "version": probe.version,
            "side": decision.rule.side,
            "outcome": decision.outcome,
            "labels": None if verdict is None else list(verdict.labels),
            "scores": None if verdict is None else verdict.probabilities,
            "action": decision.action,
        }


def _log_one(decision: Decision) -> None:
    rule = decision.rule
    match decision.action:
        case "block":
            _log.info("Blocked the %s by probe '%s'.", rule.side, rule.name)
        case "fail_closed":
            _log.warning("Probe '%s' gave no verdict on the %s: blocked.", rule.name, rule.side)
        case "fail_open":
            _log.warning(
                "Probe '%s' gave no verdict on the %s: passed, as its rule says.",
                rule.name,
                rule.side,
            )
        case "none" | "flag" | "route" | "shadow":
            pass


# Fields that the server's own records carry, next to the message.
_FIELDS = ("request_id", "key_id", "method", "route", "status", "seconds")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: record.__dict__[name] for name in _FIELDS if name in record.__dict__}
        if record.exc_text:
            line["exception"] = record.exc_text
        return json.dumps(line)


def without_message(record: logging.LogRecord) -> bool:
    """A log filter: keeps where an exception happened; its message may quote a prompt."""
    if record.name == "asyncio":
        # Behind the bracket are a callback's arguments, in further lines a task with its exception.
        record.msg = record.getMessage().split("\n")[0].split("(")[0]
        record.args = None
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        places = "".join(traceback.format_tb(error.__traceback__))
        record.exc_text = f"{type(error).__name__} at\n{places}"
        record.exc_info = None
    return True


def log_settings(level: str, *, as_json: bool) -> dict[str, Any]:
    """Settings for ``logging.config``: every record of the process goes to standard error.

    Args:
        level: Of the server's own loggers; others are logged from ``warning`` on.
        as_json: One JSON object a line, in place of text.
    """
    text = {"format": "%(levelname)s %(name)s: %(message)s"}
    handler = {
        "class": "logging.StreamHandler",
        "stream": "ext://sys.stderr",
        "formatter": "json" if as_json else "text",
        "filters": ["without_message"],
    }
    own = {"level": level.upper()}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"without_message": {"()": lambda: without_message}},
        "formatters": {"text": text, "json": {"()": JsonFormatter}},
        "handlers": {"stderr": handler},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {"uvicorn": own, "sidelight": own},
    }
