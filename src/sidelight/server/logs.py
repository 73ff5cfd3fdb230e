"""The server's logs: where and what, never a message that may quote a prompt, never a key."""

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Any

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
