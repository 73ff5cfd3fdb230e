"""The configuration of a server: command-line options, environment variables, one TOML file."""

import os
import secrets
import tomllib
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from sidelight.errors import SidelightError, did_you_mean
from sidelight.server.keys import Access, keys_of

if TYPE_CHECKING:
    from sidelight.policy.rules import Policy

_PREFIX = "SIDELIGHT_"
_SECRETS = frozenset({"api_key", "admin_key", "metrics_key", "audit_salt"})


def _as_secret(value: Any) -> Any:
    """Strip the line break at the end of a secret from a file."""
    if not isinstance(value, str):
        return value
    secret = value.strip(" \t\r\n")
    if not secret:
        raise ValueError("is blank. Set it to a secret, or remove it")
    # Bytes of an environment variable that are not UTF-8 become lone surrogates.
    if any(0xD800 <= ord(character) <= 0xDFFF for character in secret):
        raise ValueError("is not valid UTF-8. Use another secret")
    return secret


def _as_secrets(value: Any) -> Any:
    values = [value] if isinstance(value, str) else value
    return [_as_secret(each) for each in values] if isinstance(values, list | tuple) else values


_Keys = Annotated[tuple[SecretStr, ...], BeforeValidator(_as_secrets)]


class ServerConfig(BaseModel):
    """The configuration of one server.

    A keyword argument (an option of ``sidelight serve``) overrides an environment variable, which
    overrides the TOML file named by ``config``. Fields with a description are command-line options,
    whose names have hyphens; the file may set every field except ``config``.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )

    config: Path | None = Field(
        default=None,
        description="TOML file with these options; write their names with underscores.",
    )
    probe: tuple[Path, ...] = Field(
        default=(),
        description="Probe folder, guard:NAME, or hf:OWNER/NAME@REVISION; may be repeated.",
    )
    policy: Path | None = Field(
        default=None,
        description="TOML file with the rules that act on verdicts; see docs/policies.md.",
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="Model name that clients use in requests. [default: that of --model; for a "
        "file, without folder and extension]",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(
        default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one."
    )
    playground: bool = Field(
        default=False, description="Serve a page at /playground to try the model and its probes."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Level of the server log."
    )
    json_logs: bool = Field(default=False, description="Write the log as one JSON object per line.")
    audit_log: Path | None = Field(
        default=None, description="File to which every decision is appended."
    )
    audit_salt: Annotated[SecretStr | None, BeforeValidator(_as_secret)] = Field(
        default=None,
        description="Secret salt for the hashes in the audit log. [env: SIDELIGHT_AUDIT_SALT; "
        "default: a random one]",
    )
    trace_events: bool = Field(
        default=False,
        description="Add an OpenTelemetry event to a request's span for each verdict that the "
        "policy discloses.",
    )
    api_key: _Keys = Field(
        default=(),
        description="Key that requests must send; may be repeated. [env: SIDELIGHT_API_KEY]",
    )
    api_keys_file: Path | None = Field(
        default=None, description="File with API keys, one 'ID KEY' per line."
    )
    admin_key: _Keys = Field(
        default=(), description="Key that opens /admin; may be repeated. [env: SIDELIGHT_ADMIN_KEY]"
    )
    admin_keys_file: Path | None = Field(
        default=None, description="File with keys that open /admin, one 'ID KEY' per line."
    )
    metrics_key: _Keys = Field(
        default=(),
        description="Key that opens /metrics only; may be repeated. [env: SIDELIGHT_METRICS_KEY]",
    )
    allow_anonymous: bool = Field(
        default=False, description="Accept requests from other machines even without API keys."
    )
    allowed_host: tuple[str, ...] = Field(
        default=(),
        description="Host name that a server without keys accepts, besides localhost and IP "
        "addresses; may be repeated.",
    )
    max_body_bytes: int = Field(
        default=4 * 2**20, ge=1, description="Maximum size of a request body, in bytes."
    )
    max_batch_items: int = Field(
        default=512, ge=1, le=512, description="Maximum number of texts per request."
    )
    max_request_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Maximum tokens that a request may read and write. [default: 65536, or the "
        "context of one text and its n answers if that is more]",
    )
    deadline: float = Field(default=600, gt=0, description="Seconds before a request is cancelled.")
    # Options shared with other commands.
    engine: str = "auto"
    engine_option: dict[str, Any] = Field(default_factory=dict)
    model: str | None = None
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    # Grace period of running requests after SIGTERM, in seconds.
    drain_s: float = Field(default=30, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _read_sources(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Merge keyword arguments, environment variables and the file, in this precedence."""
        # Only secrets have variables, because Kubernetes sets SIDELIGHT_PORT for a service named
        # sidelight.
        every = {variable.upper(): text for variable, text in os.environ.items()}
        variables = {n: every[v] for n in _SECRETS if (v := f"{_PREFIX}{n.upper()}") in every}
        path = arguments.get("config")
        file = {} if path is None else _read_file(Path(path), cls.model_fields.keys() - {"config"})
        values = {**file, **variables, **arguments}
        if isinstance(of_file := file.get("engine_option"), dict):
            # Each is a separate option.
            values["engine_option"] = {**of_file, **arguments.get("engine_option", {})}
        return values

    @cached_property
    def access(self) -> Access:
        """The access rights of callers, from the key files as read at startup.

        Raises:
            SidelightError: A key or a key file is not valid.
        """
        return Access(
            keys_of("api-key", self.api_key, self.api_keys_file),
            keys_of("admin-key", self.admin_key, self.admin_keys_file),
            keys_of("metrics-key", self.metrics_key, None),
        )

    @property
    def hosts(self) -> frozenset[str] | None:
        """The host names that requests may use; None allows any, because a key is required too."""
        if self.access.keys and not self.allowed_host:
            return None
        return frozenset({"localhost", *map(name_of, (self.host, *self.allowed_host))} - {""})

    @cached_property
    def salt(self) -> bytes:
        """Secret salt of the hashes in the audit log; random unless configured."""
        if self.audit_salt is None:
            return secrets.token_bytes(32)
        return self.audit_salt.get_secret_value().encode()

    @cached_property
    def loaded_policy(self) -> "Policy":
        """The policy in the configured file; without one, every probe is in mode ``score``.

        Raises:
            SidelightError: The file is not valid.
        """
        # Imported here, because the command line derives its options from this class and must start
        # fast.
        from sidelight.policy.rules import Policy, read_policy

        return read_policy(self.policy) if self.policy else Policy()


def name_of(place: str) -> str:
    """The host of an origin or of ``HOST:PORT``, in lower case; "" if there is none."""
    try:
        host = urlsplit(place if "//" in place else f"//{place}").hostname or ""
    except ValueError:
        return ""
    # The trailing dot of an absolute name, which browsers keep.
    return host.removesuffix(".")


def _read_file(path: Path, known: Collection[str]) -> dict[str, Any]:
    if not path.is_file():
        raise SidelightError(f"There is no configuration file {path}. Name an existing TOML file.")
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SidelightError(f"Cannot read {path}: {error}. Name a readable TOML file.") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SidelightError(f"{path} is not TOML: {error}.") from error
    for name in values:
        if name not in known:
            raise SidelightError(f"{path} has an unknown key: {name}.{did_you_mean(name, known)}")
    return values


def read_config(**options: Any) -> ServerConfig:
    """Read the configuration from these options, the environment, and the file named by ``config``.

    Raises:
        SidelightError: A value is not valid; the message says where it is.
    """
    try:
        return ServerConfig(**options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    variable = f"{_PREFIX}{name.upper()}"
    if name in options:
        place = f"--{name.replace('_', '-')}"
    elif name in _SECRETS and variable in os.environ:
        place = variable
    else:
        place = f"{'.'.join(map(str, first['loc']))} in {options.get('config')}"
    if first["type"] == "value_error":
        raise SidelightError(f"{place} {first['msg'].removeprefix('Value error, ')}.")
    # Engine options may contain secrets, such as vLLM's `hf_token`.
    got = "" if name in _SECRETS | {"engine_option"} else f", got {first['input']!r}"
    raise SidelightError(f"{place}: {first['msg']}{got}.")
