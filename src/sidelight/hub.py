"""Shares artifacts, with their model cards, on the Hugging Face hub or in a folder."""

import shutil
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError

from sidelight.artifact import load_probe, save_probe
from sidelight.errors import SidelightError, transport_errors
from sidelight.manifest import CARD, MANIFEST, WEIGHTS, model_card, read_manifest
from sidelight.storage import write_text

_FILES = [MANIFEST, WEIGHTS, CARD]
# Other errors of the hub's client are errors of the operating system.
_FAILURES = (OSError, HFValidationError, *transport_errors())


def push(directory: str | Path, repository: str | Path, *, private: bool = False) -> str:
    """Uploads an artifact with a model card written from its manifest.

    Args:
        directory: The artifact; the card is written there, unless one names this very version.
        repository: ``owner/name`` on the hub, or a ``Path``: a folder, such as a shared drive.
        private: Whether a hub repository that this call creates is private.

    Returns:
        Where to find it.

    Raises:
        SidelightError: There is no artifact in the folder, or the hub refuses or cannot be reached.
    """
    directory = Path(directory)
    probe = load_probe(directory)
    manifest, card = read_manifest(directory), directory / CARD
    if not card.exists() or manifest.version not in card.read_text("utf-8"):
        write_text(card, model_card(manifest))
    if isinstance(repository, Path):
        save_probe(probe, repository)
        shutil.copy(card, repository / CARD)
        return str(repository)
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            allow_patterns=_FILES,
            commit_message="Upload Sidelight probe",
        )
    except _FAILURES as error:
        raise _refused("push to", repository, error) from error
    return str(commit)


def pull(repository: str | Path, directory: str | Path, *, revision: str | None = None) -> Path:
    """Downloads an artifact into a folder and checks it.

    Args:
        repository: ``owner/name`` on the hub, or a ``Path`` that ``push`` wrote to.
        directory: Where to put it.
        revision: Branch, tag or commit on the hub; None means the main branch.

    Raises:
        SidelightError: There is no such artifact, or the hub cannot be reached.
    """
    directory = Path(directory)
    if isinstance(repository, Path):
        save_probe(load_probe(repository), directory)
        return directory
    try:
        snapshot_download(repository, revision=revision, local_dir=directory, allow_patterns=_FILES)
    except _FAILURES as error:
        raise _refused("pull", repository, error) from error
    load_probe(directory)
    return directory


def _refused(action: str, repository: str, error: Exception) -> SidelightError:
    return SidelightError(
        f"Cannot {action} '{repository}': {type(error).__name__}. Check the name (owner/name; for "
        "a folder write ./NAME), the network, and 'hf auth login'."
    )
