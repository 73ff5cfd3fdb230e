"""Sharing probes: a folder with its model card to the Hugging Face hub, and back."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from sidelight.artifact import MANIFEST, WEIGHTS, load_probe, read_manifest
from sidelight.cards import model_card
from sidelight.errors import SidelightError

_FILES = [MANIFEST, WEIGHTS, "README.md"]


def push(directory: str | Path, repository: str, *, private: bool = False) -> str:
    """Uploads an artifact with a model card written from its manifest.

    Args:
        directory: The artifact; its ``README.md`` is written.
        repository: ``owner/name`` on the hub.
        private: Whether a repository that this call creates is private.

    Returns:
        Where the commit can be seen.

    Raises:
        SidelightError: No artifact there, or the hub refuses.
    """
    directory = Path(directory)
    load_probe(directory)
    (directory / "README.md").write_text(model_card(read_manifest(directory)), "utf-8")
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            allow_patterns=_FILES,
            commit_message="Upload Sidelight probe",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _refused("push to", repository, error) from error
    return str(commit)


def pull(repository: str, directory: str | Path, *, revision: str | None = None) -> Path:
    """Downloads an artifact into a folder and checks it.

    Args:
        repository: ``owner/name`` on the hub.
        directory: Where to.
        revision: Branch, tag or commit; None is the main branch.

    Raises:
        SidelightError: The hub has no such artifact, or cannot be reached.
    """
    directory = Path(directory)
    try:
        snapshot_download(repository, revision=revision, local_dir=directory, allow_patterns=_FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _refused("pull", repository, error) from error
    load_probe(directory)
    return directory


def _refused(action: str, repository: str, error: Exception) -> SidelightError:
    first = str(error).strip().splitlines()[0]
    return SidelightError(
        f"Cannot {action} '{repository}' ({type(error).__name__}: {first}). Check the name, the "
        "network, and 'hf auth login'."
    )
