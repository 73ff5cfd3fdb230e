"""Extensions from other packages, by entry point: engines, commands, mechanisms and guards.

Each package declares the versions of Sidelight that it supports as a requirement. A package that
does not support the installed version is refused on load.
"""

from importlib.metadata import Distribution, EntryPoint, distribution, entry_points
from typing import Any

from sidelight.errors import SidelightError

_OURS = "sidelight"


def extension_names(group: str) -> list[str]:
    """The names that installed packages have in a group, sorted.

    Args:
        group: Group of entry points, such as ``sidelight.engines``.
    """
    return sorted({entry.name for entry in entry_points(group=group)})


def find_extension(group: str, name: str) -> EntryPoint | None:
    """The entry point with this name; None if no package provides it.

    Raises:
        SidelightError: Several packages provide it, or its package does not support this Sidelight.
    """
    found = {entry.value: entry for entry in entry_points(group=group, name=name)}
    if len(found) > 1:
        raise SidelightError(
            f"Several packages provide '{name}' in '{group}': {', '.join(sorted(found))}. "
            "Uninstall all but one."
        )
    for entry in found.values():
        if entry.dist is not None:
            _require_fit(entry.dist)
        return entry
    return None


def load_extension(group: str, name: str) -> Any:
    """Load the object of an entry point; None if no package provides it.

    Raises:
        SidelightError: As for ``find_extension``.
    """
    entry = find_extension(group, name)
    return None if entry is None else entry.load()


def require_fit(package: str) -> None:
    """Check that an installed package supports the installed version of Sidelight.

    Args:
        package: Name of the package, such as ``sidelight-vllm``.

    Raises:
        SidelightError: The package requires another version.
    """
    _require_fit(distribution(package))


def _require_fit(package: Distribution) -> None:
    # Imported here, because every command imports this module but few load a package.
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    ours = distribution(_OURS).version
    for line in package.requires or ():
        wanted = Requirement(line)
        is_asked = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if canonicalize_name(wanted.name) != _OURS or not is_asked:
            continue
        if wanted.specifier.contains(ours, prereleases=True):
            continue
        raise SidelightError(
            f"{package.name} {package.version} needs {_OURS}{wanted.specifier}, but {_OURS} "
            f"{ours} is installed. Install both from the same clone, or install compatible "
            "versions."
        )
