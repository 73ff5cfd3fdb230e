"""Probes by name: ``guard:NAME`` can be used wherever the folder of a probe is expected.

The name resolves to the guard's probe for the model, either from an installed package of guards or
trained on this machine by ``sidelight guard``. ``guard:NAME@VERSION`` pins a version of the guard's
texts, ``guard:NAME,NAME`` names several guards, and ``guard:all`` names all of them.
``hf:OWNER/NAME@REVISION`` is a probe on the Hugging Face hub. Such a name takes precedence over a
folder of the same name in the working directory; name that folder by its absolute path.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from sidelight.data.guards import PREFIX, Guard, find_guard, guard_names
from sidelight.errors import SidelightError
from sidelight.models.fingerprint import accepted_copy, hash_of
from sidelight.models.smollm2 import EMBEDDED_NAME, cache_root
from sidelight.probes import hub
from sidelight.probes.card import PROBE, holds_probe, read_card

ALL = "all"
_NAME = re.compile(r"(?P<name>[^@:]+)(?:@(?P<version>[0-9]{1,9}))?")


class UntrainedGuardError(SidelightError):
    """Guards have no probes for a model; the message gives the command that trains them.

    Attributes:
        guards: The names of the guards.
    """

    def __init__(self, guards: Sequence[str], model: str | None):
        self.guards = tuple(guards)
        words = ["sidelight", "guard", "--only", ",".join(guards)]
        words += ["--model", model] if model and model != EMBEDDED_NAME else []
        named = ", ".join(f"'{name}'" for name in guards)
        subject, it = (
            (f"guard {named} has", "it") if len(guards) == 1 else (f"guards {named} have", "them")
        )
        super().__init__(
            f"The {subject} not been trained for {model or EMBEDDED_NAME}. Train {it} with: "
            f"{shlex.join(words)}"
        )


def is_guard(source: str | Path) -> bool:
    """Whether this names a guard rather than a folder."""
    return str(source).startswith(PREFIX)


def trained_guards(digest: str) -> Path:
    """The folder of the guards trained on this machine for a model.

    Args:
        digest: Digest of the model's fingerprint.
    """
    return _home() / digest


def local_name(guard: Guard) -> str:
    """The name of a guard's folder there, one for each version of its texts."""
    return f"{guard.name}@{guard.card.version}"


def named_sources(text: str) -> list[str]:
    """Split a list of folders and names at ``os.pathsep``."""
    # The separator may be the colon of guard:NAME or hf:NAME, at the start of a name.
    separator, prefixes = re.escape(os.pathsep), (PREFIX[:-1], hub.PREFIX[:-1])
    within = "".join(f"(?<!^{prefix})(?<!{separator}{prefix})" for prefix in prefixes)
    return [*filter(None, re.split(within + separator, text))]


def probe_folders(
    sources: Iterable[str | Path],
    model: str | None = None,
    digest: Callable[[], str] | None = None,
) -> list[Path]:
    """Resolve names to folders of probes; a probe on the hub is downloaded.

    Args:
        sources: Folders, names of guards, and of probes on the hub.
        model: Name of the model that runs the probes, for messages; None means the probes' own.
        digest: Function that returns the digest of the model's fingerprint, in about a second; it
            is called at most once. None resolves guards to the probes of the embedded model,
            packaged or trained on this machine.

    Raises:
        UntrainedGuardError: A guard has no probe for this model.
        SidelightError: A guard or its version does not exist, or a guard is named twice; or as for
            ``hub.download_probe``.
    """
    named = [(source, _guards(source) if is_guard(source) else []) for source in sources]
    names = [guard.name for _, guards in named for guard, _ in guards]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise SidelightError(f"The guard '{repeated}' is named twice. Name it once.")
    wanted = digest() if digest is not None and names else None
    folders: list[Path] = []
    untrained: list[str] = []
    for source, guards in named:
        if not guards:
            folders.append(hub.download_probe(source) if hub.is_on_hub(source) else Path(source))
        for guard, version in guards:
            folder = _trained(guard, version, wanted)
            if folder is None:
                untrained.append(guard.name)
            else:
                folders.append(folder)
    if untrained:
        raise UntrainedGuardError(untrained, model)
    return folders


def probe_folder(
    source: str | Path, model: str | None = None, digest: Callable[[], str] | None = None
) -> Path:
    """The folder of a single named probe; arguments and errors as for ``probe_folders``."""
    if is_guard(source) and len(guards := _guards(source)) > 1:
        names = ", ".join(guard.name for guard, _ in guards)
        raise SidelightError(f"'{source}' names several guards. Name one of them here: {names}.")
    (folder,) = probe_folders([source], model, digest)
    return folder


def packaged_folders(guard: Guard) -> list[Path]:
    """The probes that a guard's package ships; the one for the embedded model comes first."""
    return [path.parent for path in sorted(guard.folder.glob(f"**/{PROBE}"), key=_depth)]


def _depth(path: Path) -> tuple[int, str]:
    return len(path.parts), str(path)


def _home() -> Path:
    return cache_root() / "guards"


def _names(source: str) -> list[str]:
    """Expand ``guard:a,guard:b`` and ``guard:a,b`` to ``a`` and ``b``, and ``guard:all`` to all
    guards.
    """
    names = [name.strip().removeprefix(PREFIX) for name in source.split(",")]
    if names == [ALL]:
        # If no guard is installed, the error says what to install.
        return guard_names() or ["injection"]
    return names


def _guards(source: str | Path) -> list[tuple[Guard, int]]:
    """The guards of a name, each with the requested version."""
    try:
        return [_guard(name, source) for name in _names(str(source))]
    except SidelightError as error:
        if not os.path.exists(source):
            raise
        raise SidelightError(
            f"{error} If you mean the folder '{source}', write {Path(source).absolute()}."
        ) from error


def _guard(named: str, source: str | Path) -> tuple[Guard, int]:
    match = _NAME.fullmatch(named)
    if match is None:
        raise SidelightError(
            f"Cannot read '{source}' as the name of a probe. Write guard:NAME, guard:NAME@VERSION, "
            "guard:NAME,NAME or guard:all."
        )
    guard = find_guard(match["name"])
    return guard, guard.card.version if match["version"] is None else int(match["version"])


def _trained(guard: Guard, version: int, digest: str | None) -> Path | None:
    """The folder of a guard's probe; None if this version has not been trained for the model."""
    is_installed = version == guard.card.version
    for folder in packaged_folders(guard) if is_installed else ():
        trained_on = _packaged_digest(guard, folder)
        # Without a model, the probe's own model runs it.
        if digest is None or _fits(trained_on, digest):
            return folder
    for folder in _local_folders(f"{guard.name}@{version}", digest):
        backbone = read_card(folder).backbone
        if backbone.name == EMBEDDED_NAME if digest is None else _fits(backbone.digest, digest):
            return folder
    if not is_installed:
        raise SidelightError(
            f"Version {version} of the guard '{guard.name}' is not installed: the package has "
            f"version {guard.card.version}. Install the release that has {version}, or leave "
            f"'@{version}' out."
        )
    return None


def _local_folders(name: str, digest: str | None) -> Iterator[Path]:
    """Candidate folders of a guard trained on this machine; the model's own comes first."""
    homes = [] if digest is None else [trained_guards(digest)]
    if (digest is None or accepted_copy()) and _home().is_dir():
        homes += sorted(_home().iterdir())
    return (home / name for home in homes if holds_probe(home / name))


def _packaged_digest(guard: Guard, folder: Path) -> str:
    try:
        return read_card(folder).backbone.digest
    except SidelightError as error:
        raise SidelightError(
            f"{error} It is the packaged probe of the guard '{guard.name}'; reinstall its package."
        ) from error


def _fits(trained_on: str, served: str) -> bool:
    """Whether probes with this model digest belong to the served model, or are accepted on it."""
    return trained_on == served or hash_of(trained_on, served) == accepted_copy()
