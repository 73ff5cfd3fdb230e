"""Shares artifacts, with their model cards, on the Hugging Face hub or in a folder."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError

from sidelight.errors import SidelightError, transport_errors
from sidelight.probes.artifact import copy_probe
from sidelight.probes.manifest import CARD, PROBE, require_free

# Other errors of the hub's client are errors of the operating system.
_FAILURES = (OSError, HFValidationError, *transport_errors())


def push(
    directory: str | Path, repository: str | Path, *, private: bool = False, force: bool = False
) -> str:
    """Uploads an artifact with a model card; changes nothing in its folder.

    Args:
        directory: The artifact. A card there is kept if it names this version; otherwise one is
            written from the manifest.
        repository: ``owner/name`` on the hub, or a ``Path``: a folder, such as a shared drive.
        private: Whether a hub repository that this call creates is private.
        force: Whether to replace the probe and the card of a folder; the hub keeps old versions.

    Returns:
        Where to find it.

    Raises:
        SidelightError: There is no artifact in the folder, the other one holds a probe or a card,
            or the hub refuses or cannot be reached.
    """
    if isinstance(repository, Path):
        return str(copy_probe(Path(directory), repository, force=force))
    with tempfile.TemporaryDirectory() as scratch:
        copy_probe(Path(directory), Path(scratch), force=False)
        api = HfApi()
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=scratch, commit_message="Upload Sidelight probe"
            )
        except _FAILURES as error:
            raise _refused("push to", repository, error) from error
    return str(commit)


def pull(
    repository: str | Path,
    directory: str | Path,
    *,
    revision: str | None = None,
    force: bool = False,
) -> Path:
    """Downloads an artifact, checks it, and puts it into a folder with its card.

    Args:
        repository: ``owner/name`` on the hub, or a ``Path`` that ``push`` wrote to.
        directory: Where to put it.
        revision: Branch, tag or commit on the hub; None means the main branch.
        force: Whether to replace the probe and the card in the folder.

    Raises:
        SidelightError: There is no such artifact, it is damaged, the hub cannot be reached, or the
            folder holds a probe or a card; an old probe stays then.
    """
    directory = Path(directory)
    if isinstance(repository, Path):
        return copy_probe(repository, directory, force=force)
    require_free(directory, force=force, with_card=True)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            snapshot_download(
                repository,
                revision=revision,
                local_dir=scratch,
                allow_patterns=[PROBE, CARD],
            )
        except _FAILURES as error:
            raise _refused("pull", repository, error) from error
        try:
            return copy_probe(Path(scratch), directory, force=force)
        except SidelightError as error:
            raise SidelightError(str(error).replace(scratch, repository)) from error


def _refused(action: str, repository: str, error: Exception) -> SidelightError:
    return SidelightError(
        f"Cannot {action} '{repository}' ({type(error).__name__}: {' '.join(str(error).split())}) "
        "Check the name (owner/name; for a folder write ./NAME), the network, and 'hf auth login'."
    )
