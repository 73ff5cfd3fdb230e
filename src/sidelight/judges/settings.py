"""A judge, as a policy or a file describes it: which server, which question, and what it may cost.

No client and no network lives here: ``judges.client`` asks.
"""

import hashlib
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, model_validator

from sidelight.errors import SidelightError, did_you_mean
from sidelight.judges.profiles import PROFILES
from sidelight.judges.question import Question
from sidelight.models.conversation import PlainText
from sidelight.types import visible

JudgeKind = Literal["chat", "decisions", "moderations"]

# A judge that says nothing of its errors flags what it takes to be more probable than not.
JUDGE_THRESHOLD = 0.5
# The header that tells a Sidelight server that another one asks it as a judge.
JUDGE_HEADER = "x-sidelight-judge"
# The fields of a request that a judge's own `extra` must not replace.
_FIXED = frozenset(
    {"model", "messages", "input", "questions", "max_tokens", "logprobs", "top_logprobs", "stream"}
)
# Questions whose wording stands for that of all.
_SAMPLES = (Question.about(PlainText("prompt")), Question.about(PlainText("prompt"), "response"))
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PerMinute = Annotated[int, Field(ge=1, strict=True)]
_Text = Annotated[StrictStr, Field(min_length=1)]


class JudgeSettings(BaseModel):
    """One judge.

    Attributes:
        url: Base of its API, such as ``http://127.0.0.1:11434/v1``; https unless on this machine.
        model: Name of the model there.
        kind: The route that is asked: chat completions, decisions or moderations.
        profile: Chats: how the question is written and the answer read.
        criterion: The rule in English, in Markdown; a file names the file that holds it.
        category: Decisions: the question's name, on another Sidelight server a probe or category.
            Moderations: the category whose score counts; None: the highest of all.
        key_env: The environment variable that holds the API key; None: no key is sent.
        timeout_s: Seconds for an answer, retries and the wait for a free place included.
        retries: How often a failed request is sent again.
        concurrency: Most questions at once; API keys take turns.
        budget_per_minute: Most questions a minute.
        budget_per_key: Most questions a minute for each API key of our server.
        max_characters: Longest text that is sent; a longer one is a failure, never a cut.
        extra: Further fields of the request's body, such as ``reasoning_effort``.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    url: _Text
    model: _Text
    kind: JudgeKind = "chat"
    profile: str = "yes-no"
    criterion: _Text | None = None
    category: _Text | None = None
    key_env: _Text | None = None
    timeout_s: Annotated[float, Field(gt=0, le=120)] = 10.0
    retries: Annotated[int, Field(ge=0, le=5, strict=True)] = 1
    concurrency: Annotated[int, Field(ge=1, le=1024, strict=True)] = 16
    budget_per_minute: _PerMinute = 600
    budget_per_key: _PerMinute = 60
    max_characters: Annotated[int, Field(ge=1, strict=True)] = 32_000
    extra: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _require_url(self.url)
        if self.profile not in PROFILES:
            raise ValueError(
                f"there is no profile '{self.profile}'.{did_you_mean(self.profile, PROFILES)}"
            )
        if reserved := sorted(_FIXED & self.extra.keys()):
            raise ValueError(f"extra cannot set {', '.join(reserved)}. Leave it out")
        if self.kind != "chat" and "profile" in self.model_fields_set:
            raise ValueError(f"kind '{self.kind}' has no profile. Leave it out")
        uses = "unused" if self.kind == "moderations" else "optional"
        if self.kind == "chat":
            uses = PROFILES[self.profile].criterion
        where = f"profile '{self.profile}'" if self.kind == "chat" else f"kind '{self.kind}'"
        if uses == "required" and self.criterion is None:
            raise ValueError(f"{where} asks about a criterion. Name a file: criterion = 'rule.md'")
        if uses == "unused" and self.criterion is not None:
            raise ValueError(f"{where} has a policy of its own. Leave 'criterion' out")
        if self.kind == "chat" and self.category is not None:
            raise ValueError("kind 'chat' has no categories. Leave 'category' out")
        if self.kind == "decisions" and self.category is None:
            raise ValueError("kind 'decisions' asks a named question. Set 'category'")
        return self

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of all that decides an answer: what a fit is bound to."""
        fields = self.model_dump(include={"model", "kind", "profile", "criterion", "category"})
        # A release may change how a profile asks.
        asked = [
            PROFILES[self.profile].request(question, self.criterion or "") for question in _SAMPLES
        ]
        fields |= {"extra": self.extra, "asked": asked if self.kind == "chat" else None}
        text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def key(self) -> str | None:
        """The API key.

        Raises:
            SidelightError: The variable that should hold it is not set.
        """
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise SidelightError(
                f"The judge's key is read from {self.key_env}, which is not set. Export it, or "
                "leave 'key_env' out."
            )
        if not key.isascii() or not key.isprintable():
            raise SidelightError(
                f"The judge's key in {self.key_env} holds a character that no header can carry. "
                "Export the key alone."
            )
        return key


def _require_url(url: str) -> None:
    try:
        split = urlsplit(url)
        host, scheme = split.hostname or "", split.scheme
        _ = split.port
    except ValueError as error:
        raise ValueError(f"url is no address ({error})") from error
    if scheme not in ("http", "https") or not host:
        raise ValueError("url must begin with https://, or http:// on this machine")
    if split.username or split.password or split.query or split.fragment:
        raise ValueError("url must hold no user, query or fragment. Keys go into 'key_env'")
    if scheme == "http" and not is_loopback(host):
        raise ValueError(
            "url must be https unless it is on this machine: texts and keys would travel openly"
        )


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def port_of(url: str) -> int:
    split = urlsplit(url)
    return split.port or (443 if split.scheme == "https" else 80)


def judges_from(tables: Any, folder: Path, place: str) -> dict[str, JudgeSettings]:
    """The judges of a table, by name.

    Args:
        tables: A table of tables.
        folder: Where files of criteria are looked for.
        place: The file that holds them, for messages.

    Raises:
        SidelightError: One is wrong, or its criterion cannot be read.
    """
    if not isinstance(tables, Mapping):
        raise SidelightError(f"judges in {place}: write a table for each, [judges.NAME].")
    judges: dict[str, JudgeSettings] = {}
    for name, table in tables.items():
        if not _NAME.fullmatch(name):
            raise SidelightError(
                f"A judge cannot be called {visible(name)[:80]!r} in {place}. Use A-Z, a-z, 0-9, "
                "'_' and '-'."
            )
        judges[name] = _judge_from(table, folder, f"judges.{name} in {place}")
    return judges


def read_judge(path: Path, criterion: str | None = None) -> JudgeSettings:
    """The judge in a TOML file, whose keys are those of ``[judges.NAME]`` in a policy.

    Args:
        path: The file.
        criterion: Counts in place of the one that the file names.

    Raises:
        SidelightError: The file cannot be read, or a key is wrong.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise SidelightError(f"Cannot read {path}: {error}. Name a TOML file in UTF-8.") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SidelightError(f"{path} is not TOML: {error}. Write texts in quotes.") from error
    return _judge_from(table, path.parent, str(path), criterion)


def _judge_from(
    table: Any, folder: Path, place: str, criterion: str | None = None
) -> JudgeSettings:
    if not isinstance(table, Mapping):
        raise SidelightError(f"{place}: write a table with 'url' and 'model'.")
    for key in table:
        if key not in JudgeSettings.model_fields:
            known = JudgeSettings.model_fields
            raise SidelightError(
                f"{place} has an unknown key: {visible(key)}.{did_you_mean(key, known)}"
            )
    values = dict(table)
    if criterion is not None:
        values["criterion"] = criterion
    elif isinstance(name := values.get("criterion"), str):
        values["criterion"] = read_criterion(folder / name)
    try:
        return JudgeSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        problem = first["msg"].removeprefix("Value error, ")
        raise SidelightError(f"{place}: {f'{key}: ' if key else ''}{problem}.") from error


def read_criterion(path: Path) -> str:
    """The rule in a Markdown file.

    Raises:
        SidelightError: It cannot be read, or is empty.
    """
    try:
        text = path.read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SidelightError(
            f"Cannot read the criterion {path}: {error}. Name a Markdown file in UTF-8."
        ) from error
    if not text:
        raise SidelightError(
            f"The criterion {path} is empty. Write what a text must do to meet it."
        )
    return text
