"""Probes on the Hugging Face hub by name: ``hf:OWNER/NAME@REVISION``."""

import re
from pathlib import Path

from sidelight.errors import SidelightError, transport_errors
from sidelight.probes.card import PROBE, holds_probe

PREFIX = "hf:"
_NAME = re.compile(rf"{PREFIX}(?P<repository>[^@]+)@(?P<revision>[^@]+)")


def is_on_hub(source: str | Path) -> bool:
    """Whether this names a probe on the hub rather than a folder."""
    return str(source).startswith(PREFIX)


def download_probe(source: str | Path) -> Path:
    """The folder of a probe in the hub's cache, downloaded first if necessary.

    Args:
        source: ``hf:OWNER/NAME@REVISION``, where the revision is a commit, a tag or a branch.

    Raises:
        SidelightError: The name has no revision, the repository contains no probe, or the hub
            refuses or cannot be reached.
    """
    # Imported here so that commands that do not use the hub start fast.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import disable_progress_bars, logging

    match = _NAME.fullmatch(str(source))
    if match is None:
        raise SidelightError(
            f"Cannot read '{source}' as a probe on the Hugging Face hub. Write "
            f"{PREFIX}OWNER/NAME@REVISION, where REVISION is a commit hash, a tag or a branch."
        )
    # A probe downloads in a second, so no progress bar is needed, and errors stay on one line.
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        folder = Path(
            snapshot_download(
                match["repository"], revision=match["revision"], allow_patterns=[PROBE]
            )
        )
    except (OSError, HFValidationError, *transport_errors()) as error:
        raise SidelightError(
            f"Cannot load '{source}' ({type(error).__name__}: {' '.join(str(error).split())}) "
            "Check the name, the network, and 'hf auth login'."
        ) from error
    if not holds_probe(folder):
        raise SidelightError(
            f"'{source}' contains no {PROBE}. Name a repository that contains a probe."
        )
    return folder
