"""Trained guards by name: ``guard:NAME`` names a probe wherever a folder of one is expected.

It is the probe that was trained for the model: one that a package of guards ships, or one that
``sidelight guard`` has trained on this machine. ``guard:NAME@VERSION`` pins a version of the
guard's texts, ``guard:NAME,NAME`` names several, and ``guard:all`` every one.
"""

import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

from sidelight.data.guards import PREFIX, Guard, find_guard, guard_names
from sidelight.errors import SidelightError
from sidelight.manifest import PROBE, read_manifest
from sidelight.smollm2 import EMBEDDED_NAME, cache_root

ALL = "all"
_NAME = re.compile(rf"(?:{PREFIX})?(?P<name>[^@]+)(?:@(?P<version>\d+))?")


class UntrainedGuardError(SidelightError):
    """There is no probe of a guard for a model; the message has the command that trains it.

    Attributes:
        guard: The name of the guard.
    """

    def __init__(self, guard: str, model: str | None):
        self.guard = guard
        words = ["sidelight", "guard", "--only", guard]
        words += ["--model", model] if model and model != EMBEDDED_NAME else []
        super().__init__(
            f"The guard '{guard}' has not been trained for {model or EMBEDDED_NAME}. Train it "
            f"with: {shlex.join(words)}"
        )


def is_guard(source: str | Path) -> bool:
    """Whether it is the name of a guard, and no folder's."""
    return str(source).startswith(PREFIX)


def trained_guards(digest: str) -> Path:
    """The folder of the guards that were trained on this machine for a model.

    Args:
        digest: Of the model's fingerprint.
    """
    return cache_root() / "guards" / digest


def local_name(guard: Guard) -> str:
    """The folder of a guard there, one for each version of its texts."""
    return f"{guard.name}@{guard.card.version}"


def probe_folders(
    sources: Iterable[str | Path],
    model: str | None = None,
    digest: Callable[[], str] | None = None,
) -> list[Path]:
    """The folders of probes that are named, with those of guards.

    Args:
        sources: Folders, and names of guards.
        model: The name of the model that is to run them, for messages; None: that of the probes.
        digest: Gives the digest of its fingerprint, which takes about a second; it is called at
            most once. None: a guard is the one that its package ships for the embedded model.

    Raises:
        SidelightError: There is no such guard, not of this version, or none for this model.
    """
    given = [*sources]
    wanted: str | None = None
    if digest is not None and any(map(is_guard, given)):
        wanted = digest()
    folders: list[Path] = []
    for source in given:
        if not is_guard(source):
            folders.append(Path(source))
            continue
        folders += [_folder(name, model, wanted) for name in _names(str(source))]
    return folders


def probe_folder(
    source: str | Path, model: str | None = None, digest: Callable[[], str] | None = None
) -> Path:
    """The folder of the one probe that is named; arguments and errors as for ``probe_folders``."""
    folders = probe_folders([source], model, digest)
    if len(folders) > 1:
        raise SidelightError(f"'{source}' names {len(folders)} guards; name one here.")
    return folders[0]


def packaged_folders(guard: Guard) -> list[Path]:
    """The trained probes that a guard's package ships, that for the embedded model first."""
    return [path.parent for path in sorted(guard.folder.glob(f"**/{PROBE}"), key=_depth)]


def _depth(path: Path) -> tuple[int, str]:
    return len(path.parts), str(path)


def _names(source: str) -> list[str]:
    """``guard:a,b`` as ``a`` and ``b``; ``guard:all`` as all that are installed."""
    names = [name.strip() for name in source.split(",")]
    if names == [f"{PREFIX}{ALL}"]:
        # Where there is none, the error says what to install.
        return guard_names() or ["injection"]
    return names


def _folder(named: str, model: str | None, digest: str | None) -> Path:
    match = _NAME.fullmatch(named)
    if match is None:
        raise SidelightError(
            f"Cannot read the guard '{named}'. Write guard:NAME, guard:NAME@VERSION, "
            "guard:NAME,NAME or guard:all."
        )
    name, version = match["name"], match["version"]
    guard = find_guard(name)
    if version is not None and int(version) != guard.card.version:
        local = None if digest is None else trained_guards(digest) / f"{name}@{version}"
        if local is not None and (local / PROBE).exists():
            return local
        raise SidelightError(
            f"Version {version} of the guard '{name}' is not installed: the package has version "
            f"{guard.card.version}. Install the release that has {version}, or leave '@{version}' "
            "out."
        )
    packaged = packaged_folders(guard)
    if digest is None:
        if packaged:
            return packaged[0]
        raise UntrainedGuardError(name, model)
    local = trained_guards(digest) / local_name(guard)
    for folder in (*packaged, local):
        if (folder / PROBE).exists() and read_manifest(folder).backbone.digest == digest:
            return folder
    raise UntrainedGuardError(name, model)
