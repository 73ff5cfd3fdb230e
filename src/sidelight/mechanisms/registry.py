"""Mechanisms by name, with their options checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from sidelight.errors import SidelightError, did_you_mean
from sidelight.mechanisms.base import Geometry, Mechanism

OptionValue = int | str


@dataclass(frozen=True)
class MechanismSpec:
    """A mechanism and its options, as an artifact's manifest records them."""

    name: str
    options: Mapping[str, OptionValue]

    def build(self, geometry: Geometry) -> Mechanism:
        """The mechanism with fresh parameters from torch's current seed."""
        entry = _entry(self.name)
        return entry.build(geometry, entry.options(**self.options))


@dataclass(frozen=True)
class _Entry:
    options: type[Any]
    build: Callable[[Geometry, Any], Mechanism]


_ENTRIES: dict[str, _Entry] = {}


def register(
    name: str, options: type[Any]
) -> Callable[[Callable[[Geometry, Any], Mechanism]], Callable[[Geometry, Any], Mechanism]]:
    """Makes a builder known by ``name``.

    Args:
        name: What users write.
        options: A frozen dataclass; its fields are the options and its defaults theirs.
    """

    def remember(
        build: Callable[[Geometry, Any], Mechanism],
    ) -> Callable[[Geometry, Any], Mechanism]:
        _ENTRIES[name] = _Entry(options, build)
        return build

    return remember


def mechanism_names() -> tuple[str, ...]:
    """All registered names, in alphabetical order."""
    return tuple(sorted(_ENTRIES))


def mechanism_spec(name: str, options: Mapping[str, OptionValue] | None = None) -> MechanismSpec:
    """A checked specification with every option filled in.

    Raises:
        SidelightError: Unknown mechanism or option, or a value that the mechanism refuses.
    """
    entry = _entry(name)
    known = {field.name: field.type for field in fields(entry.options)}
    for option, value in (options or {}).items():
        if option not in known:
            raise SidelightError(
                f"Unknown option '{option}' of mechanism '{name}'.{did_you_mean(option, known)}"
            )
        _check_value(f"{name}.{option}", value, known[option])
    return MechanismSpec(name, asdict(entry.options(**(options or {}))))


def spec_titles(specs: Sequence[MechanismSpec]) -> list[str]:
    """Each one's name; where several of a name differ, with the options in which they do."""
    named: dict[str, list[MechanismSpec]] = {}
    for spec in specs:
        named.setdefault(spec.name, []).append(spec)
    return [_title(spec, named[spec.name]) for spec in specs]


def _title(spec: MechanismSpec, others: Sequence[MechanismSpec]) -> str:
    differing = [
        f"{option}={value}"
        for option, value in spec.options.items()
        if any(other.options.get(option) != value for other in others)
    ]
    return " ".join([spec.name, *differing])


def _check_value(option: str, value: OptionValue, kind: Any) -> None:
    """Options are positive whole numbers, or one of a few names."""
    names = get_args(kind)
    if names and value not in names:
        raise SidelightError(
            f"{option} cannot be {value!r}.{did_you_mean(str(value), map(str, names))}"
        )
    if not names and (type(value) is not int or value < 1):
        raise SidelightError(f"{option} cannot be {value!r}: give a whole number, 1 or more.")


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise SidelightError(f"Unknown mechanism '{name}'.{did_you_mean(name, _ENTRIES)}")
    return _ENTRIES[name]
