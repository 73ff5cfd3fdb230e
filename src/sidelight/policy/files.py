"""A policy as a TOML file. Every key is checked: an ignored safety setting is a hole."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sidelight.errors import SidelightError, did_you_mean
from sidelight.policy.rules import Mode, OnFailure, Policy, Rule, SystemTurns

_Probability = Annotated[float, Field(ge=0, le=1)]


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Rule(_Table):
    mode: Mode = "score"
    threshold: _Probability | None = None
    labels: list[str] = []
    on_failure: OnFailure = "block"
    max_tokens: int | None = Field(None, ge=1)
    shadow_of: str | None = None

    def rule(self) -> Rule:
        """As the server uses it."""
        fields: dict[str, Any] = self.model_dump()
        fields["labels"] = tuple(self.labels)
        return Rule(**fields)


class _InputRule(_Rule):
    routes: dict[str, str] = {}


class _OutputRule(_Rule):
    consecutive: int = Field(2, ge=1)
    warm_up: int = Field(0, ge=0)
    hold_back: int | None = Field(None, ge=0)


class _File(_Table):
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    system_turns: SystemTurns | None = None
    input: dict[str, _InputRule] = {}
    output: dict[str, _OutputRule] = {}


def read_policy(path: Path) -> Policy:
    """The policy in a TOML file.

    Raises:
        SidelightError: Not readable, not TOML, an unknown key, or a value that cannot be.
    """
    try:
        file = _File.model_validate(tomllib.loads(path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise SidelightError(f"Cannot read {path}: {error}. Name a TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise SidelightError(f"{path} is not TOML: {error}.") from error
    except ValidationError as error:
        raise SidelightError(_wrong(path, error)) from error
    return Policy(
        input={name: table.rule() for name, table in file.input.items()},
        output={name: table.rule() for name, table in file.output.items()},
        timeout_s=file.timeout_s,
        system_turns=file.system_turns,
    )


def _wrong(path: Path, error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        *above, key = map(str, first["loc"])
        return f"{path} has an unknown key: {place}.{did_you_mean(key, _table(above).model_fields)}"
    return f"{place} in {path}: {first['msg']}, got {first['input']!r}."


def _table(place: Sequence[str]) -> type[_Table]:
    match place:
        case ["input", _]:
            return _InputRule
        case ["output", _]:
            return _OutputRule
        case _:
            return _File
